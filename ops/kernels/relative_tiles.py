"""The relative bias in Triton (ops/relative_bias.py says what it means), computed tile by tile where scores are.

A tile asks first which buckets its differences fall into, from the least to the greatest (relative_bias.py has found
that). The search of each cell then takes as few steps as that leaves, often none: log2 of the boundaries within, not of
all. In Triton, which Gluon kernels can call.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

PAD = tl.constexpr(256)  # entries around the position table: a tile at the end reads beyond it, whatever it finds


class Relative(NamedTuple):
    """A relative bias as a kernel takes it whose tiles are ROWS queries x COLS keys; what is absent is None.

    Without any it is NO_RELATIVE: Triton cannot tell whether a tuple that holds a None is one itself.
    """

    position: Any  # fp32 [H|1, 2N - 1 + 2 PAD]
    position_step: Any  # from head to head, 0 if they share it
    time: Any  # fp32 [H|1, K + 1]
    time_step: Any
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


NO_RELATIVE = Relative(*[None] * len(Relative._fields))


@triton.jit
def apart(row_time, col_time, SYMMETRIC: tl.constexpr):
    """The difference that has a bucket."""
    difference = row_time - col_time
    if SYMMETRIC:
        return tl.abs(difference)
    else:
        return difference


@triton.jit
def bucket_of(row_time, col_time, boundaries, low, width, SYMMETRIC: tl.constexpr, STEPS: tl.constexpr):
    """The bucket, at least `low` [cells] and at most `width` [one number] more."""
    for _ in tl.static_range(STEPS):  # of a loop the bounds of which are not known, Triton fetches nothing ahead
        if width > 0:
            half = (width + 1) // 2
            boundary = tl.load(boundaries + (low + (half - 1)))
            low = tl.where(boundary <= apart(row_time, col_time, SYMMETRIC), low + half, low)
            width -= half
    return low


@triton.jit
def position_cells(relative, head, rows, cols, N):
    """The bias by position of rows x cols, which broadcast."""
    table = relative.position + head * relative.position_step + (N - 1 + PAD)
    return tl.load(table + (rows - cols))


@triton.jit
def bucket_range(relative, batch, row0, col0, N):
    """The least bucket of the tile at (row0, col0), and how far above it the greatest is."""
    tile = (batch * tl.cdiv(N, relative.ROWS) + row0 // relative.ROWS) * tl.cdiv(N, relative.COLS)
    place = relative.ranges + (tile + col0 // relative.COLS).to(tl.int64) * 2
    least = tl.load(place)
    return least, tl.load(place + 1) - least


@triton.jit
def bucket_cells(relative, batch, least, width, rows, cols, length):
    """The buckets of rows x cols, of a tile with that range; any of the range beyond the sequence."""
    batch = tl.cast(batch, tl.int64)
    row_time = tl.load(relative.row_times + batch * relative.row_step + rows, mask=rows < length, other=0)
    col_time = tl.load(relative.col_times + batch * relative.col_step + cols, mask=cols < length, other=0)
    low = (rows - rows) + (cols - cols) + least
    return bucket_of(row_time, col_time, relative.boundaries, low, width, relative.SYMMETRIC, relative.STEPS)


@triton.jit
def time_cells(relative, head, buckets):
    """The bias by time."""
    return tl.load(relative.time + head * relative.time_step + buckets)


@triton.jit
def relative_cells(relative, batch, head, row0, col0, rows, cols, length, N):
    """The relative bias of rows x cols, of the tile at (row0, col0), in fp32; beyond the sequence whatever there is."""
    if relative.time is not None:
        least, width = bucket_range(relative, batch, row0, col0, N)
        cells = time_cells(relative, head, bucket_cells(relative, batch, least, width, rows, cols, length))
        if relative.position is not None:
            cells += position_cells(relative, head, rows, cols, N)
        return cells
    else:
        return position_cells(relative, head, rows, cols, N)
