"""Loads, stores and the pointwise middle of the portable attention kernels. `at` is (batch, first row, head)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu_compile.ops.kernels.mask_tiles import Spans, live_cells, nth_tile


class Rows(NamedTuple):
    """q, k, v, a result or a gradient of one: [T, H, DIM] or [B, N, H, DIM], the last dimension contiguous."""

    ptr: Any
    batch_stride: Any  # 0 if jagged
    row_stride: Any
    head_stride: Any
    DIM: tl.constexpr
    BLOCK: tl.constexpr  # DIM rounded up to what tl.dot takes


class Cells(NamedTuple):
    """attn_mask or attn_bias: [B, H, N, N], a broadcast dimension has stride 0."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    col_stride: Any


class Sequences(NamedTuple):
    """Per-sequence tensors, each may be None: offsets if jagged, lengths if dense and ragged."""

    offsets: Any
    lengths: Any
    num_targets: Any
    num_contextuals: Any


@triton.jit
def locate(sequences, batch, N):
    """First row of a sequence (0 if dense: the batch stride leads there) and its length."""
    if sequences.offsets is not None:
        start = tl.load(sequences.offsets + batch).to(tl.int64)
        length = (tl.load(sequences.offsets + batch + 1).to(tl.int64) - start).to(tl.int32)
        return start, tl.minimum(length, N)
    elif sequences.lengths is not None:
        return tl.zeros((), tl.int64), tl.load(sequences.lengths + batch).to(tl.int32)
    else:
        return tl.zeros((), tl.int64), N


@triton.jit
def counts(sequences, batch, length, contextual_seq_len):
    """End of history and number of contextual tokens."""
    history_end = length
    if sequences.num_targets is not None:
        history_end = length - tl.load(sequences.num_targets + batch).to(tl.int32)
    contextual = contextual_seq_len
    if sequences.num_contextuals is not None:
        contextual = tl.load(sequences.num_contextuals + batch).to(tl.int32)
    return history_end, contextual


@triton.jit
def row_cells(tensor, at, rows, limit):
    """Pointers to [rows, BLOCK] and which of them exist: rows below `limit`, columns below DIM."""
    cols = tl.arange(0, tensor.BLOCK)
    inside = rows[:, None] < limit
    if tensor.DIM != tensor.BLOCK:
        inside = inside & (cols[None, :] < tensor.DIM)
    base = tensor.ptr + tl.cast(at[0], tl.int64) * tensor.batch_stride + at[1] * tensor.row_stride
    base += tl.cast(at[2], tl.int64) * tensor.head_stride
    return base + (rows[:, None].to(tl.int64) * tensor.row_stride + cols[None, :]), inside


@triton.jit
def load_rows(tensor, at, rows, limit):
    """[rows, BLOCK], 0 where there is nothing: what lies in unused rows may be NaN."""
    pointers, inside = row_cells(tensor, at, rows, limit)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_rows(tensor, at, rows, values, length, N, JAGGED: tl.constexpr):
    """The rows of a sequence; of a dense tensor also its unused rows, as 0."""
    if JAGGED:
        pointers, inside = row_cells(tensor, at, rows, length)
    else:
        pointers, inside = row_cells(tensor, at, rows, N)
        values = tl.where(rows[:, None] < length, values, 0.0)
    tl.store(pointers, values.to(tensor.ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_cells(matrix, at, rows, cols, limit):
    """Cells (rows, cols) in fp32, 0 beyond `limit`; rows and cols broadcast against each other."""
    base = matrix.ptr + tl.cast(at[0], tl.int64) * matrix.batch_stride + tl.cast(at[2], tl.int64) * matrix.head_stride
    offsets = rows.to(tl.int64) * matrix.row_stride + cols.to(tl.int64) * matrix.col_stride
    return tl.load(base + offsets, mask=(rows < limit) & (cols < limit), other=0).to(tl.float32)


@triton.jit
def half_argument(scores, half_alpha, bias, at, rows, cols, m):
    """Half of silu's argument, alpha * scores + bias."""
    half = scores * half_alpha
    if bias is not None:
        half += 0.5 * load_cells(bias, at, rows, cols, m.length)
    return half


@triton.jit
def masked(values, whole, rows, cols, m, family):
    """values where the mask family lives, else 0; nothing to do where the tile is whole."""
    if not whole:
        values = tl.where(live_cells(rows, cols, m, family), values, 0.0)
    return values


@triton.jit
def weighted(values, ones, mask, at, rows, cols, m):
    """values times the mask tensor; nothing to do where it is all ones."""
    if mask is not None:
        if not ones:
            weight = load_cells(mask, at, rows, cols, m.length)
            values = tl.where(weight != 0, values * weight, 0.0)
    return values


@triton.jit
def occupied(spans, ranks):
    """Runs of tiles as runs of their occupied ones (mask_occupancy.py); unchanged without a mask tensor."""
    if ranks is not None:
        first0 = tl.load(ranks + spans.start0)
        first1 = tl.load(ranks + spans.start1)
        first2 = tl.load(ranks + spans.start2)
        count0 = tl.load(ranks + spans.start0 + spans.count0) - first0
        count1 = tl.load(ranks + spans.start1 + spans.count1) - first1
        count2 = tl.load(ranks + spans.start2 + spans.count2) - first2
        return Spans(first0, count0, first1, count1, first2, count2)
    else:
        return spans


@triton.jit
def visit(i, spans, visits):
    """The i-th tile to visit, and whether the mask tensor (if any) is all ones there."""
    tile = nth_tile(i, spans)
    if visits is not None:
        entry = tl.load(visits + tile)
        return entry // 2, entry % 2 == 1
    else:
        return tile, True
