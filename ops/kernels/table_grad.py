"""The gradient of a gather from a tiny table, without atomics: every GPU thread sums into a column of its own.

A program is 32 threads (more only for very wide tables) and owns a [table rows, threads] block of partial sums, small
enough for the L1 cache. Thread t adds only to column t, so nothing races, the order of the sums is fixed, and a warp's
accesses to one row are one cache line. Neighbouring lookups mostly agree (buckets of time differences along a row):
a thread keeps the running sum of the row that it met last in a register, and touches memory only where the row
changes. Zeros, half of all gradients under a causal mask, touch nothing. Channels lie across the threads: with C
channels, threads t, t + C, ... hold channel t.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, run

UNROLL = 16  # loads in flight
PROGRAMS = 2112  # 16 for each of the largest GPU's 132 multiprocessors
SLICE = 512  # table rows of one program: larger tables are read once for every slice
PARTIAL_BYTES = 64 << 20
MAX_THREADS = 1024  # of one program


@triton.jit(do_not_specialize=["n", "steps"])
def accumulate(
    grad, index, partial, n, channels, table_size, slices, slice_rows, steps,
    CHANNELS: tl.constexpr, THREADS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """partial[program, slice, row, thread] += grad[k, channel] for the program's k with index[k] = slice row.

    A program and slice is one of the grid.
    """
    program, slice_id = (tl.program_id(0) // slices).to(tl.int64), tl.program_id(0) % slices
    PER_STEP: tl.constexpr = THREADS // CHANNELS
    thread = tl.arange(0, THREADS)
    channel = thread % CHANNELS
    own = partial + tl.program_id(0).to(tl.int64) * slice_rows * THREADS + thread
    first_row = slice_id * slice_rows
    end_row = tl.minimum(slice_rows, table_size - first_row)
    row = tl.zeros((THREADS,), tl.int32)
    total = tl.zeros((THREADS,), partial.dtype.element_ty)
    for step in range(steps):
        first = (program * steps + step) * UNROLL * PER_STEP + thread // CHANNELS
        rows, values = (), ()
        for u in tl.static_range(UNROLL):  # all of the indices before any gradient: one wait for each kind
            k = first + u * PER_STEP
            rows = rows + (tl.load(index + k, mask=k < n, other=-1) - first_row,)
        for u in tl.static_range(UNROLL):
            inside = (rows[u] >= 0) & (rows[u] < end_row) & (channel < channels)
            g = tl.load(grad + (first + u * PER_STEP) * channels + channel, mask=inside, other=0.0)
            values = values + (g.to(total.dtype),)
        for u in tl.static_range(UNROLL):
            # Where threads keep to their columns no barrier is needed between this store and the next load.
            changed = (rows[u] != row) & (values[u] != 0)
            so_far = tl.load(own + row * THREADS, mask=changed, other=0.0)
            tl.store(own + row * THREADS, so_far + total, mask=changed)
            total = tl.where(changed, 0.0, total) + values[u]
            row = tl.where(changed, rows[u].to(tl.int32), row)
    tl.store(own + row * THREADS, tl.load(own + row * THREADS) + total)


def table_grad(grad: Tensor, index: Tensor, table_size: int, memory: dict[Hashable, Any] | None = None) -> Tensor:
    """See `hstu_compile::table_grad`. memory: the same for calls that differ at most in addresses and lookups."""
    channels = grad.shape[-1] if grad.dim() > index.dim() else 1
    if channels > MAX_THREADS:
        return torch.cat([table_grad(part, index, table_size) for part in grad.split(MAX_THREADS, -1)], -1)
    grad, index = grad.contiguous(), index.contiguous()
    padded = 1 << max(channels - 1, 0).bit_length()
    threads = max(32, padded)
    slices = -(-table_size // SLICE)
    slice_rows = -(-table_size // max(slices, 1))
    sizes = functools.partial(lookup_sizes, threads // padded, slices, slices * slice_rows * threads)
    extent = Extent(index.numel())
    programs, numbers = sizes(extent)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    shape = (programs // max(slices, 1), slices, slice_rows, threads // padded, padded)
    partial = grad.new_zeros(shape, dtype=dtype)

    def launches(_: Workspace) -> list[Launch]:
        n, steps = numbers.values()
        arguments = (grad, index, partial, n, channels, table_size, slices, slice_rows, steps)
        constants = {"CHANNELS": padded, "THREADS": threads, "UNROLL": UNROLL, "num_warps": threads // 32}
        return [Launch(accumulate, programs, arguments, constants, sizes)]

    if partial.numel() and grad.numel():
        run(memory, "accumulate", [grad, index, partial], extent, launches)
    total = partial.sum((0, 3)).view(slices * slice_rows, padded)[:table_size, :channels]
    return total.reshape(table_size, *grad.shape[index.dim() :]).to(grad.dtype)


def lookup_sizes(a_step: int, slices: int, partials: int, extent: Extent) -> tuple[int, dict[str, int]]:
    """a_step: lookups of a program at a time, UNROLL of them in flight; partials: sums of a program, of all slices."""
    steps = -(-extent.rows // (UNROLL * a_step))
    affordable = PARTIAL_BYTES // (4 * max(partials, 1))
    programs = max(1, min(steps, affordable, PROGRAMS // max(slices, 1)))
    return programs * slices, {"n": extent.rows, "steps": -(-steps // programs)}
