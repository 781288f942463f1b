"""Rows of a jagged result that belong to no sequence (beyond the last offset) are 0, not uninitialised memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 64


@triton.jit(do_not_specialize=["total_rows", "batch"])
def _zero_tail(out_ptr, seq_offsets_ptr, total_rows, batch, width, BLOCK: tl.constexpr):
    first = tl.load(seq_offsets_ptr + batch).to(tl.int64)
    for row in range(first + tl.program_id(0), total_rows, tl.num_programs(0)):
        for start in range(0, width, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(out_ptr + row * width + cols, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=cols < width)


def zero_tail(out: Tensor, seq_offsets: Tensor) -> None:
    """out [T, H, D] contiguous: zero the rows from seq_offsets[-1] on, without reading the offset back to the host."""
    if out.numel() == 0:
        return
    with torch.cuda.device_of(out):
        _zero_tail[(PROGRAMS,)](out, seq_offsets, out.shape[0], seq_offsets.shape[0] - 1, out[0].numel(), BLOCK=1024)
