"""How tiles reach the consumers of a Hopper attention kernel: warp-specialised and persistent.

One warp schedules output tiles. Another loads the resident operands a and da of each, and streams tiles of COLS rows of
b and c by TMA. Two consumers of four warps own ROWS rows of an output tile each and run independently, so that one's
pointwise work and epilogue hide under the other's tensor-core work. (One consumer of eight warps gains nothing: its
halves move in step.)
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.attention_sm90_pairs import lists_of, occupied_spans
from hstu_compile.ops.kernels.attention_sm90_schedule import take_over
from hstu_compile.ops.kernels.attention_sm90_tiles import (
    ROW_LIMIT,
    barriers,
    cached_at,
    load_tile,
    mask_of,
    matrix,
    part_of,
    pinned,
    sequence_of,
)
from hstu_compile.ops.kernels.gluon_compat import async_load, gl, gluon, mbarrier
from hstu_compile.ops.kernels.mask_intervals import whole_columns
from hstu_compile.ops.kernels.mask_tiles import (
    first_tile,
    key_spans,
    last_tile,
    nth_tile,
    num_tiles,
    query_spans,
    tiles_upto,
)
from hstu_compile.ops.kernels.paged_tiles import paged_key_spans, part_of_spans, tile_start

ROWS = gl.constexpr(64)  # of a consumer: one m64 instruction a warpgroup


class Ring(NamedTuple):
    """Tiles in shared memory, and a barrier a stage for the loads that fill it and for the consumers that empty it."""

    tiles: Any
    full: Any
    empty: Any


@gluon.jit
def ring(desc, STAGES: gl.constexpr, LOADS: gl.constexpr, CONSUMERS: gl.constexpr):
    shape: gl.constexpr = [STAGES] + desc.block_type.shape
    tiles = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    full, empty = barriers(STAGES, LOADS, CONSUMERS)
    return Ring(tiles, full, empty)


@gluon.jit
def wait_full(ring, n, STAGES: gl.constexpr):
    """The n-th tile that passes through the ring, when it is there."""
    mbarrier.wait(ring.full.index(n % STAGES), (n // STAGES) & 1)
    return matrix(ring.tiles.index(n % STAGES))


@gluon.jit
def release(ring, n, STAGES: gl.constexpr):
    mbarrier.arrive(ring.empty.index(n % STAGES), count=1)


@gluon.jit
def wait_empty(ring, n, STAGES: gl.constexpr):
    mbarrier.wait(ring.empty.index(n % STAGES), ((n // STAGES) & 1) ^ 1)


@gluon.jit
def resident(tiles, W: gl.constexpr):
    """Consumer W's tile. (Where it is a constant, ptxas keeps the descriptors of all its slices, and spills.)"""
    return matrix(tiles.index(pinned(gl.to_tensor(W))))


@gluon.jit
def loaded(tiles, W: gl.constexpr, layout: gl.constexpr, IN_REGISTERS: gl.constexpr):
    """Consumer W's tile as a left operand in registers, where it takes no bandwidth of shared memory.

    For the forward up to head dim 128: with two such operands ptxas runs out of registers and waits for every wgmma
    (in the one that triton 3.9 brings).
    """
    if IN_REGISTERS:
        return resident(tiles, W).load(gl.DotOperandLayout(operand_index=0, parent=layout, k_width=2))
    else:
        return W


@gluon.jit
def operand(tiles, rows, W: gl.constexpr, IN_REGISTERS: gl.constexpr):
    if IN_REGISTERS:
        return rows
    else:
        return resident(tiles, W)


@gluon.jit
def streamed_spans(
    row0, NUM_ROWS: gl.constexpr, COLS: gl.constexpr, mask, cached, FAMILY: gl.constexpr, KEYS: gl.constexpr
):
    """The tiles of COLS that NUM_ROWS resident rows meet."""
    if KEYS:
        return query_spans(row0, COLS, NUM_ROWS, mask, FAMILY)
    elif cached is not None:
        return paged_key_spans(row0, NUM_ROWS, COLS, cached, mask, FAMILY)
    else:
        return key_spans(row0, NUM_ROWS, COLS, mask, FAMILY)


@gluon.jit
def meets_any(row0, sequence, spans, lists):
    """Whether an output tile streams any tile."""
    if lists is not None:
        return num_tiles(spans) > 0
    else:
        return row0 < sequence.length


@gluon.jit
def streamed_row(t, tiles, spans, lists, cached, COLS: gl.constexpr, KEYS: gl.constexpr):
    """First row of the t-th streamed tile, from the masked diagonal outwards; whether a mask tensor is all 1 there."""
    if KEYS:
        tile = nth_tile(t, spans)
    else:
        tile = nth_tile(tiles - 1 - t, spans)
    if lists is not None:
        entry = gl.load(lists.visits + tile)
        return entry // 2 * COLS, entry % 2 == 1
    elif cached is not None:
        return tile_start(tile, cached, COLS), True
    else:
        return tile * COLS, True


@gluon.jit
def tiles_before(tiles, spans, own, KEYS: gl.constexpr):
    """How many streamed tiles come before the first of a consumer's own: those are the other consumer's alone."""
    if KEYS:
        return tiles_upto(first_tile(own) - 1, spans)
    else:
        return tiles - tiles_upto(last_tile(own), spans)


@gluon.jit
def output_tile(
    tile, tiles_per_seq, batch, pairs,
    FAMILY: gl.constexpr, NUM_ROWS: gl.constexpr, COLS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Sequence, mask, first row and streamed tiles of an output tile of NUM_ROWS: see `occupied_spans`."""
    sequence = sequence_of(tile // tiles_per_seq, batch)
    mask = mask_of(sequence.z, batch, FAMILY)
    cached = cached_at(sequence.z, batch)
    row0 = tile % tiles_per_seq * NUM_ROWS
    if cached is not None:
        row0 += cached
    lists = lists_of(pairs, tile, tiles_per_seq, batch, COLS)
    spans = occupied_spans(streamed_spans(row0, NUM_ROWS, COLS, mask, cached, FAMILY, KEYS), lists)
    if cached is not None:
        part, _ = part_of(tile // tiles_per_seq, batch)
        spans = part_of_spans(spans, part, batch.parts)
    return sequence, mask, row0, spans


@gluon.jit
def page_numbers(pool_desc, pages, sequence, cached, col0):
    """The pages of the history from position col0 on, one for each box of `load_pages`, in the lanes of a warp.

    Anything where there is none: col0 may be before the first position.
    """
    if pages is not None:
        lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        position = col0 + lanes * pool_desc.block_type.shape[2]
        table = pages.table + sequence.z.to(gl.int64) * pages.table_stride
        return gl.load(table + position // pages.SIZE, mask=(position >= 0) & (position < cached), other=0)


@gluon.jit
def load_pages(desc, pages, numbers, side, sequence, cached, col0, bar, tiles, slot, COLS: gl.constexpr):
    """Keys (side 0) or values (1) of the history from position col0 on into a stage, zeros from `cached` on.

    By boxes as high as a page, or a tile, and as wide as the pattern in which TMA swizzles, which lie in the stage one
    behind the other. Rows of a page are cut off as those of a sequence are.
    """
    WIDTH: gl.constexpr = desc.block_type.shape[4]
    HEIGHT: gl.constexpr = desc.block_type.shape[2]
    ACROSS: gl.constexpr = tiles.shape[5] // WIDTH
    DOWN: gl.constexpr = COLS // HEIGHT
    boxes = tiles._reinterpret(desc.dtype, [tiles.shape[0] * ACROSS * DOWN] + desc.block_type.shape, desc.layout)
    lanes = gl.arange(0, 32, layout=numbers.type.layout)
    mbarrier.expect(bar, ACROSS * DOWN * desc.block_type.nbytes)
    for i in range(0, DOWN):
        page = gl.sum(gl.where(lanes == i, numbers, 0), axis=0)
        position = col0 + i * HEIGHT
        rest = cached - position
        end = (page * 2 + side) * pages.SIZE + position % pages.SIZE + rest
        for j in gl.static_range(ACROSS):
            box = boxes.index((slot * ACROSS + j) * DOWN + i)
            async_load(desc, [ROW_LIMIT, end, ROW_LIMIT - rest, sequence.head, j * WIDTH], bar, box)


@gluon.jit
def load_streamed(desc, pool_desc, pages, numbers, side, sequence, cached, col0, ring, slot, COLS: gl.constexpr):
    """The streamed tile from row col0 on into a stage; side: see `load_pages`."""
    if pages is None:
        load_tile(desc, sequence, col0, ring.full.index(slot), ring.tiles.index(slot), True)
    elif col0 < cached:
        bar = ring.full.index(slot)
        load_pages(pool_desc, pages, numbers, side, sequence, cached, col0, bar, ring.tiles, slot, COLS)
    else:
        load_tile(desc, sequence, col0, ring.full.index(slot), ring.tiles.index(slot), True)


@gluon.jit
def producer(
    a_desc, da_desc, b_desc, c_desc, pool_desc, pages, batch, pairs, a, da, b, c, queue, tiles_per_seq,
    FAMILY: gl.constexpr, COLS: gl.constexpr, B_STAGES: gl.constexpr, C_STAGES: gl.constexpr,
    TILES: gl.constexpr, TWO: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """An output tile has TILES resident tiles of ROWS. TWO: of da too, behind the barrier of a.

    pages: where the history of b and c is, in the pool; else None, as is pool_desc.
    """
    filled = 0  # b, c tiles so far
    number = 0  # output tiles so far
    tile = take_over(number, queue)
    while tile >= 0:
        sequence, mask, row0, spans = output_tile(tile, tiles_per_seq, batch, pairs, FAMILY, TILES * ROWS, COLS, KEYS)
        lists = lists_of(pairs, tile, tiles_per_seq, batch, COLS)
        cached = cached_at(sequence.z, batch)
        any_tiles = meets_any(row0, sequence, spans, lists)
        for w in gl.static_range(TILES):
            full = a.full.index(w)
            mbarrier.wait(a.empty.index(w), (number & 1) ^ 1)
            load_tile(a_desc, sequence, row0 + w * ROWS, full, a.tiles.index(w), any_tiles)
            if TWO:
                load_tile(da_desc, sequence, row0 + w * ROWS, full, da.index(w), any_tiles)
            mbarrier.arrive(full, count=2 if TWO else 1, pred=not any_tiles)
        if any_tiles:
            tiles = num_tiles(spans)
            if pages is not None:
                col0, _ = streamed_row(0, tiles, spans, lists, cached, COLS, KEYS)
                next_numbers = page_numbers(pool_desc, pages, sequence, cached, col0)
            for t in range(0, tiles):
                col0, _ = streamed_row(t, tiles, spans, lists, cached, COLS, KEYS)
                numbers = None
                if pages is not None:  # read a tile ahead: a wait of their own would delay b
                    numbers = next_numbers
                    next_col0, _ = streamed_row(t + 1, tiles, spans, lists, cached, COLS, KEYS)
                    next_numbers = page_numbers(pool_desc, pages, sequence, cached, next_col0)
                slot = filled % B_STAGES
                wait_empty(b, filled, B_STAGES)
                load_streamed(b_desc, pool_desc, pages, numbers, 0, sequence, cached, col0, b, slot, COLS)
                slot = filled % C_STAGES
                wait_empty(c, filled, C_STAGES)
                load_streamed(c_desc, pool_desc, pages, numbers, 1, sequence, cached, col0, c, slot, COLS)
                filled += 1
        number += 1
        tile = take_over(number, queue)


@gluon.jit
def own_tiles(row0, mask, tiles, spans, lists, cached, FAMILY: gl.constexpr, COLS: gl.constexpr, KEYS: gl.constexpr):
    """The first of an output tile's streamed tiles that a consumer with ROWS rows from row0 needs."""
    own = occupied_spans(streamed_spans(row0, ROWS, COLS, mask, cached, FAMILY, KEYS), lists)
    first = tiles
    if num_tiles(own) > 0:
        first = tiles_before(tiles, spans, own, KEYS)
    return first


@gluon.jit
def whole_tiles(row0, mask, pairs, FAMILY: gl.constexpr, KEYS: gl.constexpr):
    """Streamed rows [low, high) that every resident row of a consumer meets, bias and mask tensor included."""
    low, high = whole_columns(row0, ROWS, mask, FAMILY, KEYS)
    if pairs.bias.ptr is not None or pairs.mask.ptr is not None:
        high = gl.minimum(high, mask.length)  # what these hold beyond may be NaN
    return low, high


@gluon.jit
def at_border(col0, COLS: gl.constexpr, ones, whole):
    """Whether a streamed tile has dead cells or, unless all are `ones`, others in the mask tensor."""
    return (col0 < whole[0]) | (col0 + COLS > whole[1]) | (not ones)


@gluon.jit
def skip(b, c, done, count, B_STAGES: gl.constexpr, C_STAGES: gl.constexpr):
    """Let `count` tiles pass that are the other consumer's alone."""
    for _ in range(0, count):
        wait_full(b, done, B_STAGES)
        release(b, done, B_STAGES)
        wait_full(c, done, C_STAGES)
        release(c, done, C_STAGES)
        done += 1
    return done
