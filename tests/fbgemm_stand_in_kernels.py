"""The stand-ins of fbgemm_stand_ins.py on a GPU: one kernel a call, as in fbgemm_gpu."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy_rows(source, found, otherwise, out, row, total, D, col_stride, COLS: tl.constexpr):
    """Rows of `out`: those that `source` points to where they were `found`, else one number."""
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    values = tl.load(source[:, None] + cols.to(tl.int64) * col_stride, mask=found[:, None] & (cols < D), other=0)
    values = tl.where(found[:, None], values, tl.cast(otherwise, values.dtype))
    tl.store(out + row[:, None].to(tl.int64) * D + cols, values, mask=(row < total)[:, None] & (cols < D))


@triton.jit(do_not_specialize=["total", "N"])
def pad_kernel(
    values, offsets, out, total, N, D, row_stride, col_stride,
    PADDING: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = row % N + tl.load(offsets + row // N, mask=row < total, other=0)
    found = token < tl.load(offsets + row // N + 1, mask=row < total, other=0)
    padding = tl.full((), PADDING, tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32)
    source = values + token.to(tl.int64) * row_stride
    copy_rows(source, found, padding, out, row, total, D, col_stride, COLS)


@triton.jit(do_not_specialize=["total", "B", "N"])
def unpad_kernel(
    dense, offsets, out, total, B, N, D, batch_stride, row_stride, col_stride,
    STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sequence = tl.full((ROWS,), -1, tl.int32)  # the last that starts at or before the token; -1 and B: none
    for step in tl.static_range(STEPS):
        later = sequence + (1 << (STEPS - 1 - step))
        start = tl.load(offsets + later, mask=later <= B, other=0)
        sequence = tl.where((later <= B) & (start <= token), later, sequence)
    found = (token < total) & (sequence >= 0) & (sequence < B)
    column = token - tl.load(offsets + sequence, mask=found, other=0)
    source = dense + sequence.to(tl.int64) * batch_stride + column.to(tl.int64) * row_stride
    copy_rows(source, found & (column < N), 0, out, token, total, D, col_stride, COLS)


def copy(kernel, source: Tensor, offsets: Tensor, out: Tensor, *sizes: int, **constants: float) -> Tensor:
    total, D = out.shape[:-1].numel(), out.shape[-1]
    if total and D:
        cols = min(triton.next_power_of_2(D), 512)
        rows = 4096 // cols
        arguments = source, offsets, out, total, *sizes, D, *source.stride()
        with torch.cuda.device_of(source):
            kernel[triton.cdiv(total, rows), triton.cdiv(D, cols)](*arguments, **constants, ROWS=rows, COLS=cols)
    return out


def pad(values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0.0) -> Tensor:
    B, N, D = offsets[0].shape[0] - 1, max_lengths[0], values.shape[1]
    return copy(pad_kernel, values, offsets[0], values.new_empty(B, N, D), N, PADDING=padding_value)


def unpad(dense: Tensor, x_offsets: list[Tensor], total_L: int | None = None) -> Tensor:
    (offsets,), (B, N, D) = x_offsets, dense.shape
    out = dense.new_empty(int(offsets[-1]) if total_L is None else total_L, D)
    return copy(unpad_kernel, dense, offsets, out, B, N, STEPS=(B + 1).bit_length())
