"""Rows of jagged results that belong to no sequence (beyond the last offset) are 0, not uninitialised memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 64


@triton.jit(do_not_specialize=["total_rows", "batch"])
def zero_tail_kernel(outs, widths, seq_offsets_ptr, total_rows, batch, BLOCK: tl.constexpr):
    """One launch for all results of a call: pointers and the elements of a row of each."""
    first = tl.load(seq_offsets_ptr + batch).to(tl.int64)
    for row in range(first + tl.program_id(0), total_rows, tl.num_programs(0)):
        for i in tl.static_range(len(outs)):
            for start in range(0, widths[i], BLOCK):
                cols = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), outs[i].dtype.element_ty)
                tl.store(outs[i] + row * widths[i] + cols, zeros, mask=cols < widths[i])


def zero_tail(outs: tuple[Tensor, ...], seq_offsets: Tensor) -> None:
    """outs [T, H, D] contiguous: zero the rows from seq_offsets[-1] on, without reading the offset back to the host."""
    outs = tuple(out for out in outs if out.numel())
    if outs:
        widths = tuple(out[0].numel() for out in outs)
        with torch.cuda.device_of(outs[0]):
            zero_tail_kernel[(PROGRAMS,)](
                outs, widths, seq_offsets, outs[0].shape[0], seq_offsets.shape[0] - 1, BLOCK=1024
            )
