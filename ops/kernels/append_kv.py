"""New keys and values into the pages of a paged cache, in Triton; a program a tile of new tokens of a head.

The attention, which comes next, reads the pages of the history. Of a small batch other programs ask for them, so that
they are in the L2 by then.
"""

import functools
from collections.abc import Hashable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.attention_tiles import Sequences, load_rows, locate, row_cells
from hstu_compile.ops.kernels.attention_triton import rows_of
from hstu_compile.ops.kernels.launch import Extent, Launch, processors, run
from hstu_compile.ops.kernels.paged_attention_triton import pages_of
from hstu_compile.ops.kernels.slots import slots_of, tile_of_program

ROWS = 16
L2_BYTES = 32 << 20  # of history that is asked for, or nothing
FEW = 32  # sequences
LINE = 128  # bytes


@triton.jit
def fetch(pointers):
    """Have lines of memory brought to the L2; nothing waits for them."""
    asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(asm, "=r,l", [pointers.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_history(
    pool_rows, pages, program, programs, num_sequences, num_pages,
    L2_BYTES: tl.constexpr, FEW: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """The pages of all history, each by one of the programs; nothing if there is too much of it."""
    token_elements = 2 * pool_rows.row_stride
    element_bytes: tl.constexpr = pool_rows.ptr.dtype.element_ty.primitive_bitwidth // 8
    lanes = tl.arange(0, FEW)
    cached = tl.load(pages.cached_lengths + lanes, mask=lanes < num_sequences, other=0)
    if tl.sum(cached.to(tl.int64)) * token_elements * element_bytes <= L2_BYTES:
        line = tl.arange(0, 128) * (LINE // element_bytes)
        page_elements = pages.SIZE * token_elements
        before = 0  # pages
        for z in range(num_sequences):
            count = tl.cdiv(tl.load(pages.cached_lengths + z).to(tl.int32), pages.SIZE)
            for i in range((program + programs - before % programs) % programs, count, programs):
                page = tl.load(pages.table + tl.cast(z, tl.int64) * pages.table_stride + i)
                if (page >= 0) & (page < num_pages):
                    start = pool_rows.ptr + page.to(tl.int64) * page_elements
                    for first in range(0, page_elements, 128 * (LINE // element_bytes)):
                        fetch(start + tl.minimum(first + line, page_elements - 1))
            before += count


@triton.jit(
    do_not_specialize=["slots_per_seq", "num_sequences", "fetchers", "appenders", "num_heads", "max_pages", "num_pages"]
)
def append_kernel(
    k_rows, v_rows, pool_rows, pages, valid_lengths, sequences, slots_per_seq, num_sequences, fetchers, appenders,
    num_heads, max_pages, num_pages,
    ROWS: tl.constexpr, FETCH: tl.constexpr, L2_BYTES: tl.constexpr, FEW: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Candidates have no place, nor has a token whose page is beyond the table or unknown to the pool."""
    if FETCH:
        program = tl.program_id(0) - appenders
        if program >= 0:
            fetch_history(pool_rows, pages, program, fetchers, num_sequences, num_pages, L2_BYTES, FEW, LINE)
            return
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

        def launches(_: Any) -> list[Launch]:
            sms = processors(pool.device) if pool.is_cuda else 0
            return [append_launch(*tensors, extent, pool.shape[0], pool.shape[2], sms)]

        run(memory, "append", tensors, extent, launches)


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
    sms: int,
) -> Launch:
    """pool: its rows, [num_pages * 2 * page_size, H, D]. sms: multiprocessors; 0: no history is fetched."""
    sizes = functools.partial(append_sizes, k.shape[1], sms)
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
    constants = {"ROWS": ROWS, "FETCH": sms > 0, "L2_BYTES": L2_BYTES, "FEW": FEW, "LINE": LINE, "num_warps": 4}
    return Launch(append_kernel, programs, arguments, constants, sizes)


def append_sizes(heads: int, sms: int, extent: Extent) -> tuple[int, dict[str, int]]:
    slots = slots_of(True, ROWS, extent._replace(max_seq_len=extent.rows))
    appenders, fetchers = slots.number * heads, sms if extent.sequences <= FEW else 0
    sizes = {"slots_per_seq": slots.slots_per_seq, "num_sequences": extent.sequences}
    return appenders + fetchers, sizes | {"fetchers": fetchers, "appenders": appenders}
