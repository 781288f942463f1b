"""Rows of jagged results that belong to no sequence (beyond the last offset) are 0, not uninitialised memory."""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch
from hstu_compile.ops.kernels.strides import in_one_piece

PROGRAMS = 64
BLOCK = 1024


@triton.jit(do_not_specialize=["total_rows", "batch", "num_zeros"])
def zero_tail_kernel(
    outs, strides, widths, seq_offsets_ptr, total_rows, batch, counters, num_zeros, pieces, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One launch for all results of a call: pointers, from row to row, elements of a piece, pieces of a row, from piece
    to piece. And for its counters."""
    if counters is not None:
        for start in range(tl.program_id(0) * BLOCK, num_zeros, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            for i in tl.static_range(len(counters)):
                tl.store(counters[i] + at, tl.zeros((BLOCK,), tl.int32), mask=at < num_zeros)
    if seq_offsets_ptr is not None:
        first = tl.load(seq_offsets_ptr + batch).to(tl.int64)
        for row in range(first + tl.program_id(0), total_rows, tl.num_programs(0)):
            for i in tl.static_range(len(outs)):
                for piece in range(pieces[i]):
                    for start in range(0, widths[i], BLOCK):
                        cols = start + tl.arange(0, BLOCK)
                        zeros = tl.zeros((BLOCK,), outs[i].dtype.element_ty)
                        begin = outs[i] + row * strides[i] + piece * steps[i]
                        tl.store(begin + cols, zeros, mask=cols < widths[i])


def zero_launch(
    outs: tuple[Tensor, ...],
    seq_offsets: Tensor | None,
    extent: Extent,
    counters: tuple[Tensor, ...] = (),
    num_zeros: Callable[[Extent], int] | None = None,
) -> Launch:
    """outs [T, H, D], a head in one piece: zero the rows from seq_offsets[-1] (dense: none), not read back to the host.

    counters: int32, as many zeros at the start of each of them; all of the first if not said otherwise.
    """
    strides = tuple(out.stride(0) for out in outs)
    pieces = tuple(1 if in_one_piece(out) else out.shape[-2] for out in outs)
    steps = tuple(0 if in_one_piece(out) else out.stride(-2) for out in outs)
    widths = tuple(out.shape[-2:].numel() // count for out, count in zip(outs, pieces, strict=True))
    number = counters[0].numel() if counters else 0
    sizes = functools.partial(zero_sizes, number if num_zeros is None else num_zeros)
    programs, numbers = sizes(extent)
    total_rows, batch, number = numbers.values()
    arguments = (outs, strides, widths, seq_offsets, total_rows, batch, counters or None, number, pieces, steps)
    return Launch(zero_tail_kernel, programs, arguments, {"BLOCK": BLOCK}, sizes)


def zero_sizes(number: int | Callable[[Extent], int], extent: Extent) -> tuple[int, dict[str, int]]:
    number = number if isinstance(number, int) else number(extent)
    return PROGRAMS, {"total_rows": extent.rows, "batch": extent.sequences, "num_zeros": number}
