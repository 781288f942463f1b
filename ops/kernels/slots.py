"""Slots: programs and tickets for the tiles of every sequence's own, and few more, however long the longest is.

Sequence z owns the slots from `first_slot(z)` on. Where lengths differ little, as many as the longest has tiles; else,
in the jagged layout, they go by the rows, whose sums are the offsets that are there already:

    ceil(length / ROWS) <= floor(end / ROWS) - floor(start / ROWS) + 1

so that at most one slot a sequence stays empty.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from hstu_compile.ops.kernels.launch import Extent


class Slots(NamedTuple):
    tiles_per_seq: int  # of the longest
    slots_per_seq: int  # the same for all; 0: they go by the rows
    number: int  # for one head of all sequences


def slots_of(jagged: bool, rows: int, extent: Extent) -> Slots:
    """For tiles of so many rows: whichever are fewer."""
    total_rows, sequences, max_seq_len = extent
    tiles_per_seq = -(-max_seq_len // rows)
    by_longest, by_rows = tiles_per_seq * sequences, total_rows // rows + sequences
    if jagged and by_rows < by_longest:
        return Slots(tiles_per_seq, 0, by_rows)
    return Slots(tiles_per_seq, tiles_per_seq, by_longest)


@triton.jit
def first_slot(z, seq_offsets, slots_per_seq, ROWS):
    """Of sequence z (or several); one behind the last, the end. seq_offsets: None if dense."""
    first = z * slots_per_seq
    if seq_offsets is not None:
        if slots_per_seq == 0:
            first = (tl.load(seq_offsets + z) // ROWS).to(tl.int32) + z
    return first


@triton.jit
def owner_of(slot, count, size, seq_offsets, slots_per_seq, lanes, ROWS):
    """Which of `count` groups of `size` sequences owns the slot; lanes: 0, 1, ... 31."""
    low = 0
    high = count
    if slots_per_seq > 0:
        low = slot // (slots_per_seq * size)
        high = low + 1
    while high - low > 1:  # 32 probes at a time
        step = (high - low + 31) // 32
        probe = low + lanes * step
        starts = first_slot(tl.minimum(probe, high - 1) * size, seq_offsets, slots_per_seq, ROWS)
        low += (tl.sum(((probe < high) & (starts <= slot)).to(tl.int32), axis=0) - 1) * step
        high = tl.minimum(low + step, high)
    return low


@triton.jit
def tile_of_program(num_heads, num_sequences, seq_offsets, slots_per_seq, lanes, ROWS):
    """Sequence, head and tile of a program, one head after the other; and the head's slots.

    The tile may be beyond the sequence: there are as many programs a head as slots. So it is behind the last head.
    """
    pid = tl.program_id(0)
    z = owner_of(pid // num_heads, num_sequences, 1, seq_offsets, slots_per_seq, lanes, ROWS)
    first = first_slot(z, seq_offsets, slots_per_seq, ROWS)
    slots = first_slot(z + 1, seq_offsets, slots_per_seq, ROWS) - first
    within = pid - first * num_heads
    head = within // slots
    return z, tl.minimum(head, num_heads - 1), tl.where(head < num_heads, within % slots, slots), slots
