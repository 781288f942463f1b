"""Portable paged HSTU attention in Triton: any NVIDIA GPU from sm_80 on (and the Triton interpreter). Deterministic."""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels import attention_triton
from hstu_compile.ops.kernels.attention_tiles import (
    Sequences,
    add_product,
    half_argument,
    load_rows,
    locate,
    mask_of,
    store_rows,
    takes_no_weights,
    weighted,
    weights,
)
from hstu_compile.ops.kernels.attention_triton import capability_and_memory, constant, family_of, rows_of
from hstu_compile.ops.kernels.attention_triton_tiles import tiles_for
from hstu_compile.ops.kernels.launch import Extent, Launch, processors
from hstu_compile.ops.kernels.mask_tiles import nth_tile, num_tiles
from hstu_compile.ops.kernels.paged_parts import parts_of, run_in_parts
from hstu_compile.ops.kernels.paged_tiles import Pages, paged_key_spans, part_of_spans, tile_start
from hstu_compile.ops.kernels.partial_sums import Parts
from hstu_compile.ops.kernels.silu import silu
from hstu_compile.ops.kernels.slots import slots_of, tile_of_program


def unsupported(capability: tuple[int, int], *, dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernel can't run a call, in words; None if it can."""
    return attention_triton.unsupported(
        capability, dtype=dtype, attn_dim=dim, hidden_dim=dim, has_mask=False, has_bias=False
    )


@triton.jit
def load_page_numbers(positions, pages, sequence, cached):
    """The page of each position of history, anything elsewhere."""
    places = pages.table + tl.cast(sequence, tl.int64) * pages.table_stride + positions // pages.SIZE
    return tl.load(places, mask=positions < cached, other=0)


@triton.jit
def load_keys(new_rows, pool_rows, side, page, at, col0, positions, cached, limit, pages):
    """[positions, BLOCK] of keys (side 0) or values (1), 0 where there is nothing: a tile that begins at col0."""
    old = col0 < cached
    base = tl.where(old, pool_rows.ptr, new_rows.ptr)
    old_row = (page.to(tl.int64) * 2 + side) * pages.SIZE + positions % pages.SIZE
    new_row = at[1] + positions - cached
    head = tl.cast(at[2], tl.int64)
    places = tl.where(
        old,
        old_row * pool_rows.row_stride + head * pool_rows.head_stride,
        new_row * new_rows.row_stride + head * new_rows.head_stride,
    )
    cols = tl.arange(0, new_rows.BLOCK)
    inside = (positions < tl.where(old, cached, limit))[:, None]
    if new_rows.DIM != new_rows.BLOCK:
        inside = inside & (cols < new_rows.DIM)[None, :]
    return tl.load(base + (places[:, None] + cols[None, :]), mask=inside, other=0.0)


RUNTIME = [
    "slots_per_seq",
    "num_sequences",
    "parts",
    "total_rows",
    "N",
    "num_heads",
    "contextual_seq_len",
    "target_group_size",
    "max_attn_len",
    "min_full_attn_seq_len",
    "alpha",
    "scale",
]


@triton.jit(do_not_specialize=RUNTIME)
def paged_attention_kernel(
    q_rows,
    k_rows,
    v_rows,
    pool_rows,
    out_rows,
    pages,
    sequences,
    slots_per_seq,
    num_sequences,
    parts,
    total_rows,
    N,
    family,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    alpha,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """`product_kernel` by queries, of new tokens: a program a tile of queries, a head and a part of the keys."""
    batch, share, tile, _ = tile_of_program(
        num_heads * parts, num_sequences, sequences.offsets, slots_per_seq, tl.arange(0, 32), ROWS
    )
    start, new = locate(sequences, batch, N)
    if tile * ROWS >= new:
        return
    cached = tl.load(pages.cached_lengths + batch).to(tl.int32)
    m = mask_of(
        sequences, batch, cached + new, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
    )  # fmt: skip
    at = (batch, start, share % num_heads)
    new_rows = tile * ROWS + tl.arange(0, ROWS)
    row0 = cached + tile * ROWS
    rows = row0 + tl.arange(0, ROWS)
    spans = part_of_spans(paged_key_spans(row0, ROWS, COLS, cached, m, family), share // num_heads, parts)
    q = load_rows(q_rows, at, new_rows, new)
    out = tl.zeros((ROWS, out_rows.BLOCK), tl.float32)
    lost = tl.zeros((ROWS, out_rows.BLOCK), tl.float32)
    col0 = tile_start(nth_tile(0, spans), cached, COLS)
    page = load_page_numbers(col0 + tl.arange(0, COLS), pages, batch, cached)
    for i in range(num_tiles(spans)):
        cols = col0 + tl.arange(0, COLS)
        k = load_keys(k_rows, pool_rows, 0, page, at, col0, cols, cached, m.length, pages)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = silu(half_argument(scores, 0.5 * alpha, None, at, rows[:, None], cols[None, :], m), FAST)
        if not takes_no_weights(row0, col0, ROWS, COLS, True, None, m, family):
            p = weighted(p, weights(None, at, rows[:, None], cols[None, :], m, family))
        v = load_keys(v_rows, pool_rows, 1, page, at, col0, cols, cached, m.length, pages)
        out, lost = add_product(out, lost, p.to(v.dtype), v)
        col0 = tile_start(nth_tile(i + 1, spans), cached, COLS)
        page = load_page_numbers(col0 + tl.arange(0, COLS), pages, batch, cached)
    own_start = start + (share // num_heads).to(tl.int64) * total_rows
    store_rows(out_rows, (batch, own_start, share % num_heads), new_rows, out * scale, new, N, True)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    *,
    memory: dict[Hashable, Any] | None = None,
    gate: dict[str, Any] | None = None,
    **call: Any,
) -> Tensor:
    """The kernels' side of `hstu_compile::paged_hstu_attention`, whose keywords they are; scale = 1 / scaling_seq_len.

    memory, gate: see `run_in_parts`.
    """
    parts = parts_for(q, processors(q.device))
    operands = q, k, v, pool, page_table, cached_lengths
    return run_in_parts(*operands, attention_launch, parts, 0, memory, call, gate)


def tile_for(q: Tensor) -> Any:
    return tiles_for(q.dtype, q.shape[-1], *capability_and_memory(q.device), has_cells=False).forward


def parts_for(q: Tensor, sms: int) -> Parts:
    """On a GPU with so many multiprocessors."""
    tile = tile_for(q)
    return functools.partial(parts_of, q.shape[1], tile.rows, tile.cols, sms)


def attention_launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    result: Tensor,
    counter: None,
    *,
    page_size: int,
    parts: Parts,
    seq_offsets: Tensor,
    num_targets: Tensor | None,
    num_contextuals: Tensor | None,
    max_seq_len: int,
    alpha: float,
    scale: float,
    causal: bool,
    contextual_seq_len: int,
    target_group_size: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    targets_share_position: bool,
) -> Launch:
    """See `run_in_parts`."""
    tile, heads = tile_for(q), q.shape[1]
    sizes = functools.partial(paged_sizes, heads, tile.rows, parts)
    programs, numbers = sizes(Extent(q.shape[0], seq_offsets.shape[0] - 1, max_seq_len))
    offsets, targets, contextuals = (
        t if t is None else t.contiguous() for t in (seq_offsets, num_targets, num_contextuals)
    )
    family = family_of(
        causal,
        num_contextuals is not None or contextual_seq_len != 0,
        num_targets is not None,
        max_attn_len != 0,
        targets_share_position and num_targets is not None,
    )
    rows = rows_of(result)._replace(batch_stride=0)
    arguments = (
        *map(rows_of, (q, k, v, pool)),
        rows,
        pages_of(page_table, cached_lengths, page_size),
        Sequences(offsets, None, targets, contextuals),
        *numbers.values(),
        family,
        heads,
        contextual_seq_len,
        target_group_size,
        max_attn_len,
        min_full_attn_seq_len,
        float(alpha),
        float(scale),
    )
    constants = {"ROWS": tile.rows, "COLS": tile.cols, "FAST": q.is_cuda and q.element_size() == 2}
    constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Launch(paged_attention_kernel, programs, arguments, constants, sizes)


def pages_of(page_table: Tensor, cached_lengths: Tensor, page_size: int) -> Pages:
    table = page_table if page_table.stride(-1) == 1 else page_table.contiguous()
    return Pages(table, table.stride(0), cached_lengths.contiguous(), constant(page_size))


def paged_sizes(heads: int, rows: int, parts: Parts, extent: Extent) -> tuple[int, dict[str, int]]:
    """In the order of the kernel's arguments."""
    slots = slots_of(True, rows, extent._replace(max_seq_len=min(extent.max_seq_len, extent.rows)))
    sizes = {"slots_per_seq": slots.slots_per_seq, "num_sequences": extent.sequences, "parts": parts(extent)}
    return slots.number * heads * sizes["parts"], sizes | {"total_rows": extent.rows, "N": extent.max_seq_len}
