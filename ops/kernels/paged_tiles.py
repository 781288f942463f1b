"""Tiles of keys where the history lies in pages: the first ones hold history alone, the others new tokens alone.

Both kinds start at their own beginning, so that no tile has two sources: between the last token of history and the
first new one there is a gap, of less than a tile, that is filled with zeros. Positions in the mask are true ones.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu_compile.ops.kernels.mask_tiles import Spans, key_spans, num_tiles, spans_of


class Pages(NamedTuple):
    """The cached history of every sequence. In a kernel without one, every field is None."""

    table: Any  # int32 [B, max_pages]
    table_stride: Any
    cached_lengths: Any
    SIZE: tl.constexpr  # tokens of a page


@triton.jit
def gap_after(cached, COLS: tl.constexpr):
    """Columns between history and new tokens."""
    return tl.cdiv(cached, COLS) * COLS - cached


@triton.jit
def tile_start(tile, cached, COLS: tl.constexpr):
    """The position of a tile's first key."""
    start = tile * COLS
    return tl.where(start < cached, start, start - gap_after(cached, COLS))


@triton.jit
def paged_key_spans(row0, ROWS: tl.constexpr, COLS: tl.constexpr, cached, mask, family):
    """`key_spans`, for queries at the positions row0 ..., in tiles that begin at `tile_start`."""
    runs = key_spans(row0, ROWS, 1, mask, family)
    gap = gap_after(cached, COLS)
    end0 = runs.start0 + runs.count0
    end1 = runs.start1 + runs.count1
    return spans_of(
        runs.start0 + tl.where(runs.start0 >= cached, gap, 0),
        end0 + tl.where(end0 > cached, gap, 0),
        runs.start1 + tl.where(runs.start1 >= cached, gap, 0),
        end1 + tl.where(end1 > cached, gap, 0),
        0,
        0,
        COLS,
    )


@triton.jit
def part_of_spans(spans, part, parts):
    """The part-th of `parts` equal parts of the tiles, each one's a run of them."""
    tiles = num_tiles(spans)
    first = tiles * part // parts
    last = tiles * (part + 1) // parts
    first0 = tl.minimum(first, spans.count0)
    last0 = tl.minimum(last, spans.count0)
    first1 = tl.minimum(first - first0, spans.count1)
    last1 = tl.minimum(last - last0, spans.count1)
    first2 = first - first0 - first1
    last2 = last - last0 - last1
    return Spans(
        spans.start0 + first0,
        last0 - first0,
        spans.start1 + first1,
        last1 - first1,
        spans.start2 + first2,
        last2 - first2,
    )
