"""silu of x in place, and slices of it into the pages of a cache, in Triton; a program a tile of rows and columns."""

import functools
from collections.abc import Hashable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.attention_tiles import Sequences
from hstu_compile.ops.kernels.early_launch import let_next_begin, may_begin_early
from hstu_compile.ops.kernels.launch import Extent, Launch, run
from hstu_compile.ops.kernels.paged_attention_triton import pages_of
from hstu_compile.ops.kernels.silu import silu_of_torch

ROWS, COLS = 8, 256  # of 16 bits: two loads of 16 bytes a thread, of neighbouring columns


@triton.jit
def sequence_of(rows, seq_offsets, num_sequences):
    """The last sequence that begins at each row or before it; num_sequences where the last one ends there or before."""
    found = tl.zeros_like(rows)
    span = num_sequences
    while span > 0:  # it is one of found, found + 1, ... found + span
        half = (span + 1) // 2
        begins = tl.load(seq_offsets + found + half) <= rows
        found = tl.where(begins, found + half, found)
        span -= half
    return found


@triton.jit
def places_of(rows, total_rows, pages, valid_lengths, sequences, num_sequences, max_pages, num_pages):
    """Where in the pool's pages the keys of rows have their place, in tokens of keys and values; -1: nowhere."""
    sequence = sequence_of(rows, sequences.offsets, num_sequences)
    used = (sequence < num_sequences) & (rows < total_rows)
    start = tl.load(sequences.offsets + sequence, mask=used, other=0).to(tl.int32)
    end = tl.load(sequences.offsets + sequence + 1, mask=used, other=0).to(tl.int32)
    if sequences.num_targets is not None:
        end -= tl.load(sequences.num_targets + sequence, mask=used, other=0).to(tl.int32)
    position = tl.load(pages.cached_lengths + sequence, mask=used, other=0).to(tl.int32) + rows - start
    index = position // pages.SIZE
    is_open = used & (rows < end) & (index < max_pages)
    if valid_lengths is not None:
        is_open = is_open & (index >= tl.load(valid_lengths + sequence, mask=used, other=0) // pages.SIZE)
    page = tl.load(pages.table + sequence.to(tl.int64) * pages.table_stride + index, mask=is_open, other=-1)
    known = (page >= 0) & (page < num_pages)
    return tl.where(known, page.to(tl.int64) * (2 * pages.SIZE) + position % pages.SIZE, -1)


@triton.jit
def store_heads(pool, places, cols, values, AT, STEP, HEADS, DIM):
    """The columns of a slice among `cols`, heads side by side at each place."""
    at = cols - AT
    head = at // STEP
    inside = (at >= 0) & (head < HEADS)
    if STEP != DIM:
        at = head * DIM + at % STEP
        inside = inside & ((cols - AT) % STEP < DIM)
    pointers = pool + (places * (HEADS * DIM))[:, None] + at[None, :]
    tl.store(pointers, values, mask=(places >= 0)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["total_rows", "num_sequences", "max_pages", "num_pages"])
def silu_append_kernel(
    x, row_stride, pool, pages, valid_lengths, sequences, total_rows, num_sequences, max_pages, num_pages,
    WIDTH: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, K_AT: tl.constexpr, K_STEP: tl.constexpr,
    V_AT: tl.constexpr, V_STEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, LIBDEVICE: tl.constexpr,
    NEXT_EARLY: tl.constexpr,
):  # fmt: skip
    """x [total_rows, WIDTH]. Candidates have no place, nor has a token whose page is beyond the table or unknown.

    NEXT_EARLY: the kernel behind may begin, see early_launch.py.
    """
    if NEXT_EARLY:
        let_next_begin()
    blocks = tl.cdiv(WIDTH, COLS)
    rows = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    col0 = tl.program_id(0) % blocks * COLS
    cols = col0 + tl.arange(0, COLS)
    inside = (rows < total_rows)[:, None] & (cols < WIDTH)[None, :]
    pointers = x + rows[:, None].to(tl.int64) * row_stride + cols[None, :]
    values = tl.load(pointers, mask=inside, other=0.0)
    has_k = (col0 < K_AT + (HEADS - 1) * K_STEP + DIM) & (col0 + COLS > K_AT)
    has_v = (col0 < V_AT + (HEADS - 1) * V_STEP + DIM) & (col0 + COLS > V_AT)
    places = tl.full((ROWS,), -1, tl.int64)
    if has_k | has_v:  # while x is on its way
        places = places_of(rows, total_rows, pages, valid_lengths, sequences, num_sequences, max_pages, num_pages)
    values = silu_of_torch(values.to(tl.float32), LIBDEVICE).to(x.dtype.element_ty)
    tl.store(pointers, values, mask=inside)
    if has_k:
        store_heads(pool, places, cols, values, K_AT, K_STEP, HEADS, DIM)
    if has_v:
        beside = tl.where(places >= 0, places + pages.SIZE, -1)
        store_heads(pool, beside, cols, values, V_AT, V_STEP, HEADS, DIM)


def silu_append(
    x: Tensor,
    pool: Tensor,
    k_at: int,
    k_head_stride: int,
    v_at: int,
    v_head_stride: int,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None,
    valid_lengths: Tensor | None,
    memory: dict[Hashable, Any] | None = None,
) -> None:
    """The kernel's side of `hstu_compile::silu_append_kv`; memory: as in paged_attention_triton."""
    if x.numel():
        extent = Extent(x.shape[0], seq_offsets.shape[0] - 1)
        places = k_at, k_head_stride, v_at, v_head_stride
        tensors = x, pool, seq_offsets, page_table, cached_lengths, num_targets, valid_lengths
        run(memory, "silu_append", tensors, extent, lambda _: [silu_append_launch(*tensors, places, extent)])


def silu_append_launch(
    x: Tensor,
    pool: Tensor,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None,
    valid_lengths: Tensor | None,
    places: tuple[int, int, int, int],
    extent: Extent,
) -> Launch:
    """places: the first column of k, that from head to head, and both of v."""
    num_pages, _, page_size, heads, dim = pool.shape
    sizes = functools.partial(silu_append_sizes, x.shape[1])
    programs, numbers = sizes(extent)
    offsets, targets, valid = (t if t is None else t.contiguous() for t in (seq_offsets, num_targets, valid_lengths))
    arguments = (
        x,
        x.stride(0),
        pool,
        pages_of(page_table, cached_lengths, page_size),
        valid,
        Sequences(offsets, None, targets, None),
        *numbers.values(),
        page_table.shape[1],
        num_pages,
    )
    names = "K_AT", "K_STEP", "V_AT", "V_STEP"
    constants = {"WIDTH": x.shape[1], "HEADS": heads, "DIM": dim, **dict(zip(names, places, strict=True))}
    constants |= {
        "ROWS": ROWS,
        "COLS": COLS,
        "LIBDEVICE": x.is_cuda,
        "NEXT_EARLY": may_begin_early(x.device),
        "num_warps": 4,
    }
    return Launch(silu_append_kernel, programs, arguments, constants, sizes)


def silu_append_sizes(width: int, extent: Extent) -> tuple[int, dict[str, int]]:
    programs = -(-extent.rows // ROWS) * -(-width // COLS)
    return programs, {"total_rows": extent.rows, "num_sequences": extent.sequences}
