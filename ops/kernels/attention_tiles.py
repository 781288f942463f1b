"""Loads, stores and the pointwise middle of the portable attention kernels. `at` is (batch, first row, head)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu_compile.ops.kernels.mask_tiles import Mask, Spans, all_cells_live, live_cells, nth_tile


class Rows(NamedTuple):
    """q, k, v, a result or a gradient of one: [T, H, DIM] or [B, N, H, DIM], the last dimension contiguous."""

    ptr: Any
    batch_stride: Any  # 0 if jagged
    row_stride: Any
    head_stride: Any
    DIM: tl.constexpr
    BLOCK: tl.constexpr  # DIM rounded up to what tl.dot takes


class Cells(NamedTuple):
    """attn_mask, attn_bias or its gradient: [B, H, N, N], a broadcast dimension has stride 0."""

    ptr: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    col_stride: Any
    GRAIN: tl.constexpr  # divides N: so many columns exist together, which lets a load take them at once


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
def mask_of(
    sequences, batch, length, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
):  # fmt: skip
    """The mask of a sequence."""
    history_end = length
    if sequences.num_targets is not None:
        history_end = length - tl.load(sequences.num_targets + batch).to(tl.int32)
    contextual = contextual_seq_len
    if sequences.num_contextuals is not None:
        contextual = tl.load(sequences.num_contextuals + batch).to(tl.int32)
    return Mask(length, history_end, contextual, target_group_size, max_attn_len, min_full_attn_seq_len)


@triton.jit
def row_cells(tensor, at, rows, limit, col0, WIDTH: tl.constexpr):
    """Pointers to [rows, WIDTH] and which of them exist: rows below `limit`, columns below DIM."""
    cols = col0 + tl.arange(0, WIDTH)
    inside = rows[:, None] < limit
    if tensor.DIM != WIDTH:
        inside = inside & (cols[None, :] < tensor.DIM)
    base = tensor.ptr + tl.cast(at[0], tl.int64) * tensor.batch_stride + at[1] * tensor.row_stride
    base += tl.cast(at[2], tl.int64) * tensor.head_stride
    return base + (rows[:, None].to(tl.int64) * tensor.row_stride + cols[None, :]), inside


@triton.jit
def load_rows(tensor, at, rows, limit):
    """[rows, BLOCK], 0 where there is nothing: what lies in unused rows may be NaN."""
    pointers, inside = row_cells(tensor, at, rows, limit, 0, tensor.BLOCK)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def load_chunk(tensor, at, rows, limit, chunk, WIDTH: tl.constexpr):
    """The `chunk`-th WIDTH columns of `load_rows`."""
    pointers, inside = row_cells(tensor, at, rows, limit, chunk * WIDTH, WIDTH)
    return tl.load(pointers, mask=inside & (chunk * WIDTH < tensor.DIM), other=0.0)


@triton.jit
def store_rows(tensor, at, rows, values, length, N, JAGGED: tl.constexpr):
    """The rows of a sequence; of a dense tensor also its unused rows, as 0."""
    if JAGGED:
        pointers, inside = row_cells(tensor, at, rows, length, 0, tensor.BLOCK)
    else:
        pointers, inside = row_cells(tensor, at, rows, N, 0, tensor.BLOCK)
        values = tl.where(rows[:, None] < length, values, 0.0)
    tl.store(pointers, values.to(tensor.ptr.dtype.element_ty), mask=inside)


@triton.jit
def cells(matrix, at, rows, cols, limit):
    """Pointers to cells (rows, cols), which broadcast, and which are below `limit`, in columns rounded up to GRAIN."""
    base = matrix.ptr + tl.cast(at[0], tl.int64) * matrix.batch_stride + tl.cast(at[2], tl.int64) * matrix.head_stride
    offsets = rows.to(tl.int64) * matrix.row_stride + cols.to(tl.int64) * matrix.col_stride
    return base + offsets, (rows < limit) & (cols < tl.cdiv(limit, matrix.GRAIN) * matrix.GRAIN)


@triton.jit
def load_cells(matrix, at, rows, cols, limit):
    """Cells in fp32, 0 where `cells` has none."""
    pointers, inside = cells(matrix, at, rows, cols, limit)
    return tl.load(pointers, mask=inside, other=0).to(tl.float32)


@triton.jit
def store_cells(matrix, at, rows, cols, limit, values):
    pointers, inside = cells(matrix, at, rows, cols, limit)
    tl.store(pointers, values.to(matrix.ptr.dtype.element_ty), mask=inside)


@triton.jit
def half_argument(scores, half_alpha, bias, at, rows, cols, m):
    """Half of silu's argument, alpha * scores + bias."""
    half = scores * half_alpha
    if bias is not None:
        half += 0.5 * load_cells(bias, at, rows, cols, m.length)
    return half


@triton.jit
def takes_no_weights(row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr, ones, bias, m, family):
    """Whether every cell of a tile counts as it is; `ones`: whether the mask tensor is all ones there."""
    whole = ones & all_cells_live(row0, col0, ROWS, COLS, m, family)
    if bias is not None:  # what lies beyond the sequence may be NaN there
        whole = whole & (row0 + ROWS <= m.length) & (col0 + COLS <= m.length)
    return whole


@triton.jit
def weights(mask, at, rows, cols, m, family):
    """The mask tensor, if any, where the mask family lives, else 0."""
    live = live_cells(rows, cols, m, family)
    if mask is not None:
        return tl.where(live, load_cells(mask, at, rows, cols, m.length), 0.0)
    else:
        return tl.where(live, 1.0, 0.0)


@triton.jit
def weighted(values, weight):
    """values * weight, 0 where the weight is, whatever the value."""
    return tl.where(weight != 0, values * weight, 0.0)


@triton.jit
def add_product(total, lost, left, right):
    """total += left right, and what that lost.

    fp32 sums are compensated: a chain of additions as long as the sequence loses several times what eager's products of
    few columns lose, which are sums of partial sums.
    """
    if left.dtype == tl.float32:
        step = tl.dot(left, right, -lost, input_precision="ieee")
        new_total = total + step
        return new_total, (new_total - total) - step
    else:
        return tl.dot(left, right, total), lost


@triton.jit
def tile_line(at, tile, tiles, mask_batches, mask_heads):
    """Which line of the lists of occupied tiles (mask_occupancy.py) is that of a row of tiles."""
    return (at[0] % mask_batches * mask_heads + at[2] % mask_heads).to(tl.int64) * tiles + tile


@triton.jit
def occupied(spans, ranks, line, tiles):
    """Runs of tiles as runs of their occupied ones; `tiles` are in a line. Unchanged without a mask tensor."""
    if ranks is not None:
        ranks += line * (tiles + 1)
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
def visit(i, count, spans, visits, line, tiles):
    """The i-th tile of `count` to visit, and whether the mask tensor (if any) is all ones there."""
    tile = nth_tile(i, spans)
    if visits is not None:
        entry = tl.load(visits + line * tiles + tile, mask=i < count, other=0)
        return entry // 2, entry % 2 == 1
    else:
        return tile, tl.full((), True, tl.int1)
