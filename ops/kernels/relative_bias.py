"""The relative bias of a call: its tables as kernels read them, and the range of buckets of every tile.

Ranges come from the extremes of a tile's times. Differences wrap around as they do in PyTorch, and those of infinite
times are NaN: where that can happen, a tile's range is all buckets. (A comparison with NaN is false, hence bucket 0.)
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.attention_tiles import locate
from hstu_compile.ops.kernels.relative_tiles import NO_POSITION, NO_TIME, PAD, Position, Relative, Time, narrowed

WIDTH = 16  # tiles whose ranges are found at a time


@triton.jit
def differs_safely(one, other):
    """Whether one - other is a number that does not wrap around."""
    difference = one - other
    if one.dtype.is_floating():
        return difference - difference == 0
    else:
        return ((one ^ other) & (one ^ difference)) >= 0


@triton.jit
def bucket_of(difference, num_boundaries, boundaries, STEPS: tl.constexpr):
    low = tl.zeros(difference.shape, tl.int32)
    width = num_boundaries
    for _ in tl.static_range(STEPS):
        half = (width + 1) // 2
        low = narrowed(low, half, boundaries, difference)
        width -= half
    return low


@triton.jit(do_not_specialize=["N"])
def time_ranges_kernel(ranges, time, sequences, N, num_boundaries, WIDTH: tl.constexpr):
    """The range of buckets of each tile in a row of tiles: 0 to all where a difference may wrap around or be NaN.

    Nothing for tiles that begin beyond the sequence.
    """
    row_tiles = tl.cdiv(N, time.ROWS)
    col_tiles = tl.cdiv(N, time.COLS)
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    row0 = tl.program_id(0) % row_tiles * time.ROWS
    _, length = locate(sequences, batch, N)
    if row0 < length:
        rows = tl.minimum(row0 + tl.arange(0, time.ROWS), length - 1)
        row_time = tl.load(time.row_times + batch * time.row_step + rows)
        row_low, row_high = tl.min(row_time), tl.max(row_time)
        row_numbers = tl.min((row_time - row_time == 0).to(tl.int32))  # min and max do not see a NaN
        for first in range(0, tl.cdiv(length, time.COLS), WIDTH):
            tiles = first + tl.arange(0, WIDTH)
            cols = tl.minimum(tiles[:, None] * time.COLS + tl.arange(0, time.COLS)[None, :], length - 1)
            col_time = tl.load(time.col_times + batch * time.col_step + cols)
            col_low, col_high = tl.min(col_time, axis=1), tl.max(col_time, axis=1)
            numbers = row_numbers & tl.min((col_time - col_time == 0).to(tl.int32), axis=1)
            least, greatest = row_low - col_high, row_high - col_low
            safe = (numbers == 1) & differs_safely(row_low, col_high) & differs_safely(row_high, col_low)
            zero = least - least
            if time.SYMMETRIC:
                safe = safe & differs_safely(zero, least)  # |least| wraps around too
                largest = tl.maximum(tl.abs(least), tl.abs(greatest))
                least, greatest = tl.maximum(tl.maximum(least, -greatest), zero), largest
            low = bucket_of(least, num_boundaries, time.boundaries, time.STEPS)
            high = bucket_of(greatest, num_boundaries, time.boundaries, time.STEPS)
            where = ranges + ((batch * row_tiles + row0 // time.ROWS) * col_tiles + tiles) * 2
            inside = tiles < col_tiles
            tl.store(where, tl.where(safe, low, 0), mask=inside)
            tl.store(where + 1, tl.where(safe, high, num_boundaries), mask=inside)


class RelativeBias:
    """The relative bias of one call, or that there is none."""

    def __init__(self, bias: Any, sequences: Any, num_sequences: int, N: int) -> None:
        """bias: as `hstu_compile.ops.relative_bias` has it, or None."""
        self.given = bias
        self.sequences, self.num_sequences, self.N = sequences, num_sequences, N
        self.position = NO_POSITION
        if bias is not None and bias.position_bias is not None:
            table = F.pad(bias.position_bias.float(), (PAD.value, PAD.value))
            self.position = Position(table, step(table))
        self.num_boundaries = 0
        self.times: list[Any] = []  # the fields of Time, up to the boundaries
        if bias is not None and bias.time_bias is not None:
            tensors = [bias.time_bias.float().contiguous(), *map(rows_together, (bias.row_times, bias.col_times))]
            self.times = [x for t in tensors for x in (t, step(t))]
            self.times.append(bias.time_boundaries.contiguous())
            self.num_boundaries = bias.time_boundaries.shape[0]
        self.made: dict[tuple[int, int], Relative] = {}

    def tiles(self, rows: int, cols: int) -> Relative:
        """For tiles of so many queries and keys."""
        if (rows, cols) not in self.made:
            self.made[rows, cols] = Relative(self.position, self._time(rows, cols) if self.times else NO_TIME)
        return self.made[rows, cols]

    def _time(self, rows: int, cols: int) -> Time:
        row_tiles = triton.cdiv(self.N, rows)
        size = self.num_sequences, row_tiles, triton.cdiv(self.N, cols), 2
        ranges = torch.empty(size, dtype=torch.int32, device=self.times[0].device)
        constants = (self.given.time_symmetric, self.num_boundaries.bit_length(), rows, cols)
        time = Time(*self.times, ranges, *map(tl.constexpr, constants))
        if ranges.numel():
            with torch.cuda.device_of(ranges):
                time_ranges_kernel[(self.num_sequences * row_tiles,)](
                    ranges, time, self.sequences, self.N, self.num_boundaries, WIDTH=WIDTH
                )
        return time


def rows_together(t: Tensor) -> Tensor:
    """With each row in one piece."""
    return t if t.stride(-1) == 1 else t.contiguous()


def step(t: Tensor) -> int:
    """From one line of [n|1, ...] to the next."""
    return t.stride(0) if t.shape[0] > 1 else 0
