"""Sums in parts, each by programs of its own, and added up in a fixed order: by a kernel, or where the sum is read."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch

BLOCK = 1024
SHARED_MEMORY = tl.constexpr(64 << 10)  # bytes of them

Parts = Callable[[Extent], int]  # how many there are


def buffers_of(parts: int) -> int:
    """How many are on their way to shared memory at a time: few leave room for the programs of more rows."""
    return 7 if parts <= 8 else 15


class PartialSums(NamedTuple):
    """fp32 [parts, T, H, D], uninitialised in rows of no sequence, where the sum is 0."""

    sums: Tensor
    dtype: torch.dtype  # that the sum is rounded to
    seq_offsets: Tensor
    parts: Parts


@triton.jit
def sum_of_parts(places, parts, size, inside, BUFFERS: tl.constexpr):
    """Of pointers into the first part, `size` elements from part to part; 0 outside."""
    FIT: tl.constexpr = SHARED_MEMORY // (4 * inside.numel)
    STAGES: tl.constexpr = 1 + (BUFFERS if FIT > BUFFERS else FIT)
    total = tl.zeros(inside.shape, tl.float32)
    for part in tl.range(0, parts, num_stages=STAGES):
        total += tl.load(places + part * size, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["total_rows", "batch", "parts"])
def sum_parts_kernel(
    sums_ptr, out_ptr, seq_offsets_ptr, total_rows, batch, parts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BUFFERS: tl.constexpr,
):  # fmt: skip
    """out [T, WIDTH] from sums [parts, T, WIDTH], 0 in rows of no sequence; a program a block of a row."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cols = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(seq_offsets_ptr + batch)
    size = tl.cast(total_rows, tl.int64) * WIDTH
    total = sum_of_parts(sums_ptr + row * WIDTH + cols, parts, size, cols < WIDTH, BUFFERS)
    total = tl.where(row < end, total, 0.0).to(out_ptr.dtype.element_ty)  # not before: the sum would wait for `end`
    tl.store(out_ptr + row * WIDTH + cols, total, mask=cols < WIDTH)


def sum_launch(given: PartialSums, out: Tensor, extent: Extent) -> Launch:
    """Of out [T, H, D]."""
    width = out.shape[1:].numel()
    sizes = functools.partial(sum_sizes, given.parts, -(-width // BLOCK))
    programs, numbers = sizes(extent)
    arguments = (given.sums, out, given.seq_offsets.contiguous(), *numbers.values())
    constants = {"WIDTH": width, "BLOCK": BLOCK, "BUFFERS": buffers_of(numbers["parts"]), "num_warps": 4}
    return Launch(sum_parts_kernel, programs, arguments, constants, sizes)


def sum_sizes(parts: Parts, blocks: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return extent.rows * blocks, {"total_rows": extent.rows, "batch": extent.sequences, "parts": parts(extent)}
