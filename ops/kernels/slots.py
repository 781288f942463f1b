"""Slots: programs and tickets for the tiles of every sequence's own, and few more, however long the longest is.

Sequence z owns the slots from `first_slot(z)` on. In the jagged layout these starts need no prefix sum, since

    ceil(length / ROWS) <= floor(end / ROWS) - floor(start / ROWS) + 1

so that at most one slot a sequence stays empty.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.launch import Extent


def slots_of(jagged: bool, rows: int, extent: Extent) -> tuple[int, int]:
    """Tiles of so many rows of the longest sequence, and slots for the tiles of all."""
    total_rows, sequences, max_seq_len = extent
    tiles_per_seq = -(-max_seq_len // rows)
    if not jagged:
        return tiles_per_seq, tiles_per_seq * sequences
    return tiles_per_seq, total_rows // rows + sequences if sequences and max_seq_len else 0


@triton.jit
def first_slot(z, seq_offsets, tiles_per_seq, ROWS):
    """Of sequence z (or several); one behind the last, the end. seq_offsets: None if dense."""
    if seq_offsets is not None:
        return (tl.load(seq_offsets + z) // ROWS).to(tl.int32) + z
    else:
        return z * tiles_per_seq


@triton.jit
def owner_of(slot, count, size, seq_offsets, tiles_per_seq, lanes, ROWS):
    """Which of `count` groups of `size` sequences owns the slot, by 32 probes at a time; lanes: 0, 1, ... 31."""
    low = 0
    high = count
    while high - low > 1:
        step = (high - low + 31) // 32
        probe = low + lanes * step
        starts = first_slot(tl.minimum(probe, high - 1) * size, seq_offsets, tiles_per_seq, ROWS)
        low += (tl.sum(((probe < high) & (starts <= slot)).to(tl.int32), axis=0) - 1) * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def tile_of_program(num_heads, num_sequences, seq_offsets, tiles_per_seq, lanes, ROWS):
    """Sequence, head and tile of a program, one head after the other; and the head's slots.

    The tile may be beyond the sequence: there are as many programs a head as slots. So it is behind the last head.
    """
    pid = tl.program_id(0)
    slot = pid // num_heads
    if seq_offsets is not None:
        z = owner_of(slot, num_sequences, 1, seq_offsets, tiles_per_seq, lanes, ROWS)
    else:
        z = slot // tiles_per_seq
    first = first_slot(z, seq_offsets, tiles_per_seq, ROWS)
    slots = first_slot(z + 1, seq_offsets, tiles_per_seq, ROWS) - first
    within = pid - first * num_heads
    head = within // slots
    return z, tl.minimum(head, num_heads - 1), tl.where(head < num_heads, within % slots, slots), slots
