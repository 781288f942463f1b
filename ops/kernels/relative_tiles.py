"""The relative bias in Triton (ops/relative_bias.py says what it means), computed tile by tile where scores are.

A tile asks first which buckets its differences fall into, from the least to the greatest (relative_bias.py has found
that). The search of each cell then takes as few steps as that leaves, often none: log2 of the boundaries within, not of
all. In Triton, which Gluon kernels can call.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

PAD = tl.constexpr(256)  # entries around the position table: a tile at the end reads beyond it, whatever it finds


class Position(NamedTuple):
    """The bias by position; if there is none, None for every field."""

    table: Any  # fp32 [H|1, 2N - 1 + 2 PAD]
    step: Any  # from head to head, 0 if they share it


class Time(NamedTuple):
    """The bias by time, for tiles of ROWS queries x COLS keys; if there is none, None for every field."""

    table: Any  # fp32 [H|1, K + 1]
    step: Any
    row_times: Any  # [B|1, N]
    row_step: Any  # from sequence to sequence
    col_times: Any
    col_step: Any
    boundaries: Any  # [K]
    ranges: Any  # int32 [B, row tiles, column tiles, 2]: a tile's least bucket, and its greatest
    SYMMETRIC: tl.constexpr
    STEPS: tl.constexpr  # that the search for one of all buckets takes
    ROWS: tl.constexpr
    COLS: tl.constexpr


class Relative(NamedTuple):
    """Both. Kernels ask for the tables: Triton cannot tell whether a tuple that holds a None is one itself."""

    position: Position
    time: Time


NO_POSITION = Position(*[None] * len(Position._fields))
NO_TIME = Time(*[None] * len(Time._fields))


@triton.jit
def apart(row_time, col_time, SYMMETRIC: tl.constexpr):
    """The difference that has a bucket."""
    difference = row_time - col_time
    if SYMMETRIC:
        return tl.abs(difference)
    else:
        return difference


@triton.jit
def narrowed(low, half, boundaries, difference):
    """The bucket is at least `low`; whether it is at least `half` more."""
    boundary = tl.load(boundaries + (half - 1) + low)  # one address for all cells, and an offset of each
    return tl.where(boundary <= difference, low + half, low)


@triton.jit
def position_cells(position, head, rows, cols, N):
    """The bias by position of rows x cols, which broadcast."""
    table = position.table + head * position.step + (N - 1 + PAD)
    return tl.load(table + (rows - cols))


@triton.jit
def bucket_range(time, batch, row0, col0, N):
    """The least bucket of the tile at (row0, col0), and how far above it the greatest is."""
    tile = (batch * tl.cdiv(N, time.ROWS) + row0 // time.ROWS) * tl.cdiv(N, time.COLS) + col0 // time.COLS
    place = time.ranges + tile.to(tl.int64) * 2
    least = tl.load(place)
    return least, tl.load(place + 1) - least


@triton.jit
def bucket_cells(time, batch, least, width, rows, cols, length, UNROLL: tl.constexpr):
    """The buckets of rows x cols, of a tile with that range; any of the range beyond the sequence.

    UNROLL: for a loop whose rows Triton fetches ahead, which it does in no loop that has another one within.
    """
    row_ptr = time.row_times + tl.cast(batch, tl.int64) * time.row_step
    col_ptr = time.col_times + tl.cast(batch, tl.int64) * time.col_step
    row_time = tl.load(row_ptr + rows, mask=rows < length, other=0)
    col_time = tl.load(col_ptr + cols, mask=cols < length, other=0)
    low = (rows - rows) + (cols - cols) + least
    if UNROLL:
        for _ in tl.static_range(time.STEPS):
            if width > 0:
                half = (width + 1) // 2
                low = narrowed(low, half, time.boundaries, apart(row_time, col_time, time.SYMMETRIC))
                width -= half
    else:
        while width > 0:
            half = (width + 1) // 2
            low = narrowed(low, half, time.boundaries, apart(row_time, col_time, time.SYMMETRIC))
            width -= half
    return low


@triton.jit
def time_cells(time, head, buckets):
    """The bias by time."""
    return tl.load(time.table + head * time.step + buckets)


@triton.jit
def relative_cells(relative, batch, head, row0, col0, rows, cols, length, N, UNROLL: tl.constexpr):
    """The relative bias of rows x cols, of the tile at (row0, col0), in fp32; beyond the sequence whatever there is."""
    if relative.time.table is not None:
        least, width = bucket_range(relative.time, batch, row0, col0, N)
        buckets = bucket_cells(relative.time, batch, least, width, rows, cols, length, UNROLL)
        cells = time_cells(relative.time, head, buckets)
        if relative.position.table is not None:
            cells += position_cells(relative.position, head, rows, cols, N)
        return cells
    else:
        return position_cells(relative.position, head, rows, cols, N)
