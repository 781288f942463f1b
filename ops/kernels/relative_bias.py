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
from hstu_compile.ops.kernels.relative_tiles import PAD, Relative, bucket_of

WIDTH = 16  # tiles whose ranges are found at a time


@triton.jit
def differs_safely(one, other):
    """Whether one - other is a number that does not wrap around."""
    difference = one - other
    if one.dtype.is_floating():
        return difference - difference == 0
    else:
        return ((one ^ other) & (one ^ difference)) >= 0


@triton.jit(do_not_specialize=["N"])
def time_ranges_kernel(ranges, relative, sequences, N, num_boundaries, WIDTH: tl.constexpr):
    """The range of buckets of each tile in a row of tiles: 0 to all where a difference may wrap around or be NaN.

    Nothing for tiles that begin beyond the sequence.
    """
    row_tiles = tl.cdiv(N, relative.ROWS)
    col_tiles = tl.cdiv(N, relative.COLS)
    batch = (tl.program_id(0) // row_tiles).to(tl.int64)
    row0 = tl.program_id(0) % row_tiles * relative.ROWS
    _, length = locate(sequences, batch, N)
    if row0 < length:
        rows = tl.minimum(row0 + tl.arange(0, relative.ROWS), length - 1)
        row_time = tl.load(relative.row_times + batch * relative.row_step + rows)
        row_low, row_high = tl.min(row_time), tl.max(row_time)
        row_numbers = tl.min((row_time - row_time == 0).to(tl.int32))  # min and max do not see a NaN
        for first in range(0, tl.cdiv(length, relative.COLS), WIDTH):
            tiles = first + tl.arange(0, WIDTH)
            cols = tl.minimum(tiles[:, None] * relative.COLS + tl.arange(0, relative.COLS)[None, :], length - 1)
            col_time = tl.load(relative.col_times + batch * relative.col_step + cols)
            col_low, col_high = tl.min(col_time, axis=1), tl.max(col_time, axis=1)
            numbers = row_numbers & tl.min((col_time - col_time == 0).to(tl.int32), axis=1)
            least, greatest = row_low - col_high, row_high - col_low
            safe = (numbers == 1) & differs_safely(row_low, col_high) & differs_safely(row_high, col_low)
            zero = least - least
            if relative.SYMMETRIC:
                safe = safe & differs_safely(zero, least)  # |least| wraps around too
                largest = tl.maximum(tl.abs(least), tl.abs(greatest))
                least, greatest = tl.maximum(tl.maximum(least, -greatest), zero), largest
            none = tl.zeros((WIDTH,), tl.int32)
            low = bucket_of(least, zero, relative.boundaries, none, num_boundaries, False, relative.STEPS)
            high = bucket_of(greatest, zero, relative.boundaries, none, num_boundaries, False, relative.STEPS)
            where = ranges + ((batch * row_tiles + row0 // relative.ROWS) * col_tiles + tiles) * 2
            inside = tiles < col_tiles
            tl.store(where, tl.where(safe, low, 0), mask=inside)
            tl.store(where + 1, tl.where(safe, high, num_boundaries), mask=inside)


class RelativeBias:
    """The relative bias of one call."""

    def __init__(self, bias: Any, sequences: Any, num_sequences: int, N: int) -> None:
        """bias: as `hstu_compile.ops.relative_bias` has it."""
        self.given = bias
        self.sequences, self.num_sequences, self.N = sequences, num_sequences, N
        self.position = None if bias.position_bias is None else F.pad(bias.position_bias.float(), (PAD.value,) * 2)
        self.values = None if bias.time_bias is None else bias.time_bias.float().contiguous()
        times = (bias.row_times, bias.col_times)
        self.times = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in times]
        self.boundaries = None if bias.time_boundaries is None else bias.time_boundaries.contiguous()
        self.symmetric = bias.time_symmetric
        self.made: dict[tuple[int, int], Relative] = {}

    @property
    def num_boundaries(self) -> int:
        return 0 if self.boundaries is None else self.boundaries.numel()

    def tiles(self, rows: int, cols: int) -> Relative:
        """For tiles of so many queries and keys."""
        if (rows, cols) not in self.made:
            self.made[rows, cols] = self._tiles(rows, cols)
        return self.made[rows, cols]

    def _tiles(self, rows: int, cols: int) -> Relative:
        constants = (self.symmetric, self.num_boundaries.bit_length(), rows, cols)
        relative = Relative(
            self.position,
            head_step(self.position),
            self.values,
            head_step(self.values),
            *(x for t in self.times for x in (t, head_step(t))),
            self.boundaries,
            None,
            *map(tl.constexpr, constants),
        )
        if self.values is None:
            return relative
        row_tiles = triton.cdiv(self.N, rows)
        size = self.num_sequences, row_tiles, triton.cdiv(self.N, cols), 2
        ranges = torch.empty(size, dtype=torch.int32, device=self.values.device)
        if ranges.numel():
            with torch.cuda.device_of(ranges):
                time_ranges_kernel[(self.num_sequences * row_tiles,)](
                    ranges, relative, self.sequences, self.N, self.num_boundaries, WIDTH=WIDTH
                )
        return relative._replace(ranges=ranges)


def head_step(t: Tensor | None) -> int | None:
    """From one line of [n|1, ...] to the next."""
    return None if t is None else t.stride(0) if t.shape[0] > 1 else 0
