"""Keys split over programs where a small batch would leave multiprocessors idle: partial sums, added in a fixed order.

How many parts is decided from shapes alone: it does not change under a CUDA graph, and no length is read back.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, run
from hstu_compile.ops.kernels.zero_tail import zero_launch

BLOCK = 1024
TOGETHER = 8  # loads in flight
LEAST = 4  # tiles of keys of the longest sequence in a part: one more part costs as much time as a seventh of a tile

Parts = Callable[[Extent], int]


def parts_of(heads: int, rows: int, cols: int, processors: int, extent: Extent) -> int:
    """Of the keys of each tile of `rows` queries of a head, in tiles of `cols`."""
    tiles = max(-(-extent.rows // rows), min(extent.sequences, extent.rows))
    return max(1, min(processors // max(1, tiles * heads), extent.max_seq_len // (LEAST * cols)))


def run_in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    attention_launch: Callable[..., Launch],
    parts: Parts,
    counter_size: int,
    memory: dict[Hashable, Any] | None,
    call: dict[str, Any],
) -> Tensor:
    """The attention's result.

    attention_launch: takes the tensors, with the pool as its rows [num_pages * 2 * page_size, H, D]; for its results
        [T, H, D] or partial sums [parts, T, H, D]; a counter, None where there are parts; the page size; `parts`; and
        the call.
    counter_size: int32 elements of the counter, 0 when the attention starts.
    memory: the same for all calls, and no others, whose launches differ at most in addresses and their extent.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    seq_offsets = call["seq_offsets"]
    extent = Extent(q.shape[0], seq_offsets.shape[0] - 1, call["max_seq_len"])
    in_parts = parts(extent) > 1
    rows = pool.flatten(0, 2) if pool.numel() else k  # with no page at all, nothing is read
    operands = q, k, v, rows, page_table, cached_lengths

    def launches(workspace: Workspace) -> list[Launch]:
        if in_parts:
            sums = workspace.empty(torch.float32, lambda extent: (parts(extent), extent.rows, *q_shape))
            attention = attention_launch(*operands, sums, None, page_size=pool.shape[2], parts=parts, **call)
            return [attention, sum_launch(sums, out, seq_offsets, extent, parts)]
        counters = (workspace.empty(torch.int32, (counter_size,)),) if counter_size else ()
        counter = counters[0] if counters else None
        attention = attention_launch(*operands, out, counter, page_size=pool.shape[2], parts=parts, **call)
        return [zero_launch((out,), seq_offsets, extent, counters), attention]

    q_shape = q.shape[1:]
    tensors = [*operands, out, seq_offsets, call["num_targets"], call["num_contextuals"]]
    run(memory, in_parts, tensors, extent, launches)
    return out


@triton.jit(do_not_specialize=["total_rows", "batch", "parts"])
def sum_parts_kernel(
    sums_ptr, out_ptr, seq_offsets_ptr, total_rows, batch, parts,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out [T, WIDTH] from sums [parts, T, WIDTH], 0 in rows of no sequence; a program a block of a row."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    cols = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if row < tl.load(seq_offsets_ptr + batch):
        for first in range(0, parts, TOGETHER):
            for i in tl.static_range(TOGETHER):
                inside = (cols < WIDTH) & (first + i < parts)
                own = sums_ptr + ((first + i) * tl.cast(total_rows, tl.int64) + row) * WIDTH
                total += tl.load(own + cols, mask=inside, other=0.0)
    tl.store(out_ptr + row * WIDTH + cols, total.to(out_ptr.dtype.element_ty), mask=cols < WIDTH)


def sum_launch(sums: Tensor, out: Tensor, seq_offsets: Tensor, extent: Extent, parts: Parts) -> Launch:
    """out from sums [parts, T, H, D]."""
    width = out.shape[1] * out.shape[2]
    sizes = functools.partial(sum_sizes, parts, -(-width // BLOCK))
    programs, numbers = sizes(extent)
    arguments = (sums, out, seq_offsets.contiguous(), *numbers.values())
    constants = {"WIDTH": width, "BLOCK": BLOCK, "TOGETHER": TOGETHER, "num_warps": 4}
    return Launch(sum_parts_kernel, programs, arguments, constants, sizes)


def sum_sizes(parts: Parts, blocks: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return extent.rows * blocks, {"total_rows": extent.rows, "batch": extent.sequences, "parts": parts(extent)}
