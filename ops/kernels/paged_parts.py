"""Keys split over programs where a small batch would leave multiprocessors idle: partial sums, added in a fixed order.

How many parts is decided from shapes alone: it does not change under a CUDA graph, and no length is read back.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch

BLOCK = 1024
TOGETHER = 8  # loads in flight


def parts_of(extent: Extent, heads: int, rows: int, cols: int, processors: int) -> int:
    """Of the keys of each tile of `rows` queries of a head, in tiles of `cols`."""
    programs = -(-extent.rows // rows) * heads
    return max(1, min(processors // max(1, programs), extent.max_seq_len // cols))


def partial_sums(like: Tensor, parts: int) -> Tensor | None:
    """[T, parts * H, D] for results like [T, H, D]; None where there is but one part."""
    if parts == 1:
        return None
    total, heads, dim = like.shape
    return torch.empty(total, parts * heads, dim, dtype=torch.float32, device=like.device)


@triton.jit(do_not_specialize=["batch", "parts"])
def sum_parts_kernel(
    sums_ptr, out_ptr, seq_offsets_ptr, batch, parts, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr
):
    """out [T, WIDTH] from sums [T, parts, WIDTH], 0 in rows of no sequence; a program a block of a row."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cols = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if row < tl.load(seq_offsets_ptr + batch):
        sums_ptr += row * parts * WIDTH
        for first in range(0, parts, TOGETHER):
            for i in tl.static_range(TOGETHER):
                inside = (cols < WIDTH) & (first + i < parts)
                total += tl.load(sums_ptr + (first + i) * WIDTH + cols, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + cols, total.to(out_ptr.dtype.element_ty), mask=cols < WIDTH)


def sum_launch(sums: Tensor, out: Tensor, seq_offsets: Tensor, extent: Extent, parts: functools.partial) -> Launch:
    """parts: for an extent, how many there are."""
    width = out.shape[1] * out.shape[2]
    sizes = functools.partial(sum_sizes, parts, -(-width // BLOCK))
    programs, numbers = sizes(extent)
    arguments = (sums, out, seq_offsets, *numbers.values())
    constants = {"WIDTH": width, "BLOCK": BLOCK, "TOGETHER": TOGETHER, "num_warps": 4}
    return Launch(sum_parts_kernel, programs, arguments, constants, sizes)


def sum_sizes(parts: functools.partial, blocks: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return extent.rows * blocks, {"batch": extent.sequences, "parts": parts(extent)}
