"""New keys and values into the pages of a paged cache, in Triton; a program a tile of new tokens of a head."""

import functools
from collections.abc import Hashable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.attention_tiles import Sequences, load_rows, locate, row_cells
from hstu_compile.ops.kernels.attention_triton import rows_of
from hstu_compile.ops.kernels.launch import Extent, Launch, run
from hstu_compile.ops.kernels.paged_attention_triton import pages_of
from hstu_compile.ops.kernels.slots import slots_of, tile_of_program

ROWS = 16


@triton.jit(do_not_specialize=["slots_per_seq", "num_sequences", "num_heads", "max_pages", "num_pages"])
def append_kernel(
    k_rows, v_rows, pool_rows, pages, valid_lengths, sequences, slots_per_seq, num_sequences, num_heads, max_pages,
    num_pages,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Candidates have no place, nor has a token whose page is beyond the table or unknown to the pool."""
    batch, head, tile, _ = tile_of_program(
        num_heads, num_sequences, sequences.offsets, slots_per_seq, tl.arange(0, 32), ROWS
    )
    start, new = locate(sequences, batch, 0x7FFFFFFF)
    if sequences.num_targets is not None:
        new -= tl.load(sequences.num_targets + batch).to(tl.int32)
    if tile * ROWS >= new:
        return
    rows = tile * ROWS + tl.arange(0, ROWS)
    position = tl.load(pages.cached_lengths + batch).to(tl.int32) + rows
    index = position // pages.SIZE
    row_of_table = pages.table + tl.cast(batch, tl.int64) * pages.table_stride
    is_open = (rows < new) & (index < max_pages)
    if valid_lengths is not None:
        is_open = is_open & (index >= tl.load(valid_lengths + batch) // pages.SIZE)
    page = tl.load(row_of_table + index, mask=is_open, other=-1)
    stored = (page >= 0) & (page < num_pages)
    at = (batch, start, head)
    for side in tl.static_range(2):
        if side == 0:
            values = load_rows(k_rows, at, rows, new)
        else:
            values = load_rows(v_rows, at, rows, new)
        place = (page.to(tl.int64) * 2 + side) * pages.SIZE + position % pages.SIZE
        pointers, inside = row_cells(pool_rows, (0, 0, head), tl.where(stored, place, -1), 1 << 62, 0, pool_rows.BLOCK)
        tl.store(pointers, values, mask=inside & stored[:, None])


def append(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None,
    valid_lengths: Tensor | None,
    memory: dict[Hashable, Any] | None = None,
) -> None:
    """The kernel's side of `hstu_compile::append_kv`; memory: as in paged_attention_triton."""
    if k.numel() and pool.numel():
        extent = Extent(k.shape[0], seq_offsets.shape[0] - 1)
        tensors = (pool.flatten(0, 2), k, v, seq_offsets, page_table, cached_lengths, num_targets, valid_lengths)
        pages = pool.shape[0], pool.shape[2]
        run(memory, "append", tensors, extent, lambda _: [append_launch(*tensors, extent, *pages)])


def append_launch(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None,
    valid_lengths: Tensor | None,
    extent: Extent,
    num_pages: int,
    page_size: int,
) -> Launch:
    """pool: its rows, [num_pages * 2 * page_size, H, D]."""
    sizes = functools.partial(append_sizes, k.shape[1])
    programs, numbers = sizes(extent)
    counts = (t if t is None else t.contiguous() for t in (seq_offsets, None, num_targets, None))
    arguments = (
        *map(rows_of, (k, v, pool)),
        pages_of(page_table, cached_lengths, page_size),
        valid_lengths if valid_lengths is None else valid_lengths.contiguous(),
        Sequences(*counts),
        *numbers.values(),
        k.shape[1],
        page_table.shape[1],
        num_pages,
    )
    return Launch(append_kernel, programs, arguments, {"ROWS": ROWS, "num_warps": 4}, sizes)


def append_sizes(heads: int, extent: Extent) -> tuple[int, dict[str, int]]:
    slots = slots_of(True, ROWS, extent._replace(max_seq_len=extent.rows))
    return slots.number * heads, {"slots_per_seq": slots.slots_per_seq, "num_sequences": extent.sequences}
