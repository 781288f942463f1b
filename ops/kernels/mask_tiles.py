"""The mask family of `ops/attention_mask.py` in Triton: cell by cell, and tile by tile.

A tile of rows (queries) by columns (keys) is skipped where no cell lives and takes no mask arithmetic where all do. The
spans that the kernels walk may hold a dead tile, never miss a live one: the cells decide.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Family(NamedTuple):
    """Which clauses of the mask a kernel is compiled with (not in Mask: assigned to a name, constants turn dynamic)."""

    CAUSAL: tl.constexpr
    CONTEXT: tl.constexpr  # contextual rows
    TARGETS: tl.constexpr
    WINDOW: tl.constexpr
    SHARED: tl.constexpr  # targets share one position


class Mask(NamedTuple):
    """The mask of one sequence."""

    length: Any
    history_end: Any  # the first target, or length
    contextual: Any
    target_group_size: Any
    max_attn_len: Any
    min_full_attn_seq_len: Any


class Spans(NamedTuple):
    """Up to three runs of tiles in ascending order: where each starts, how many tiles it has."""

    start0: Any
    count0: Any
    start1: Any
    count1: Any
    start2: Any
    count2: Any


@triton.jit
def shift(m, family):
    """The contextual rows share position 0: so far are the others moved down."""
    if family.CONTEXT:
        return tl.maximum(m.contextual - 1, 0)
    else:
        return 0


@triton.jit
def position(i, m, family):
    """Where row or column i stands in the order of the sequence."""
    if family.CONTEXT:
        return tl.maximum(i - shift(m, family), 0)
    else:
        return i


@triton.jit
def end_position(m, family):
    """Where the first target stands."""
    return m.history_end - shift(m, family)


@triton.jit
def no_history(m, family):
    """Whether targets leave no room for all contextual rows: then even these are targets."""
    return end_position(m, family) <= 0


@triton.jit
def is_target(i, m, family):
    return position(i, m, family) >= end_position(m, family)


@triton.jit
def window_position(i, m, family):
    """Where row or column i stands for the window."""
    if family.SHARED:
        return tl.minimum(position(i, m, family), end_position(m, family))
    else:
        return position(i, m, family)


@triton.jit
def is_exempt(row_at, m, family):
    """Whether a query at this window position sees beyond the window."""
    return (m.min_full_attn_seq_len > 0) & (row_at >= end_position(m, family) - m.min_full_attn_seq_len)


@triton.jit
def live_cells(rows, cols, m, family):
    """True where query `rows` attends to key `cols`; the two broadcast against each other."""
    row_position = position(rows, m, family)
    col_position = position(cols, m, family)
    if family.CAUSAL:
        live = (rows == cols) | (row_position > col_position)
    else:
        live = (rows == cols) | (row_position != col_position)
    if family.TARGETS:
        row_target = row_position - end_position(m, family)
        col_target = col_position - end_position(m, family)
        same_group = row_target // m.target_group_size == col_target // m.target_group_size
        live = live & ((row_target < 0) | (col_target < 0) | same_group)
    if family.WINDOW:
        row_at = window_position(rows, m, family)
        col_at = window_position(cols, m, family)
        live = live & ((tl.abs(row_at - col_at) <= m.max_attn_len) | is_exempt(row_at, m, family))
    if family.CONTEXT:
        live = live | ((rows < m.contextual) & (col_position < end_position(m, family)))
    return live & (rows < m.length) & (cols < m.length)


@triton.jit
def all_cells_live(row0, col0, ROWS: tl.constexpr, COLS: tl.constexpr, m, family):
    """Whether every cell of a tile lives; may say no where it does.

    Cells beyond the end of the sequence do not count: they are made of zeros, or never stored.
    """
    row1 = tl.minimum(row0 + ROWS, m.length) - 1
    col1 = tl.minimum(col0 + COLS, m.length) - 1
    whole = row0 >= 0
    if family.CAUSAL:
        whole = whole & (position(row0, m, family) > position(col1, m, family))
    elif family.CONTEXT:
        whole = whole & ((shift(m, family) == 0) | (row0 > shift(m, family)) | (col0 > shift(m, family)))
    if family.TARGETS:
        whole = whole & ~(is_target(row1, m, family) & is_target(col1, m, family))
    if family.WINDOW:
        before = window_position(row1, m, family) - window_position(col0, m, family)
        after = window_position(col1, m, family) - window_position(row0, m, family)
        exempt = is_exempt(window_position(row0, m, family), m, family)
        whole = whole & ((tl.maximum(before, after) <= m.max_attn_len) | exempt)
    return whole


@triton.jit
def groups_around(first, last, m, family):
    """The targets [start, end) in the groups of targets first .. last; rows before the first target count as it."""
    first_target = tl.maximum(position(first, m, family) - end_position(m, family), 0)
    last_target = tl.maximum(position(last, m, family) - end_position(m, family), 0)
    start = m.history_end + first_target // m.target_group_size * m.target_group_size
    end = m.history_end + (last_target // m.target_group_size + 1) * m.target_group_size
    if family.CONTEXT:
        start = tl.where(start <= shift(m, family), 0, start)
    return start, tl.minimum(end, m.length)


@triton.jit
def own_cells(first, last, low, high, m, family):
    """The first run of rows or columns first .. last: [low, high) where there is history; and where the others begin.

    Without history those at position 0 meet themselves and what follows position 0 in their group, the others a group.
    """
    alone = no_history(m, family) & (last <= shift(m, family))
    low = tl.where(alone, first, tl.where(no_history(m, family), 0, low))
    high = tl.where(alone, last + 1, tl.where(no_history(m, family), 0, high))
    return low, high, tl.where(alone, shift(m, family) + 1, 0)


@triton.jit
def window_bounds(first, last, m, family):
    """Rows or columns [low, high) within the window of at least one of first .. last, exemption aside."""
    low_position = window_position(first, m, family) - m.max_attn_len
    low = tl.where(low_position <= 0, 0, low_position + shift(m, family))
    high_position = window_position(last, m, family) + m.max_attn_len
    high = tl.minimum(high_position + shift(m, family) + 1, m.length)
    if family.SHARED:
        high = tl.where(high_position >= end_position(m, family), m.length, high)
    return low, high


@triton.jit
def spans_of(low0, high0, low1, high1, low2, high2, TILE: tl.constexpr):
    """Index ranges, ascending and possibly overlapping or empty, as runs of tiles of which no tile is in two."""
    start0 = low0 // TILE
    end0 = tl.maximum(tl.cdiv(high0, TILE), start0)
    start1 = tl.maximum(low1 // TILE, end0)
    end1 = tl.maximum(tl.cdiv(high1, TILE), start1)
    start2 = tl.maximum(low2 // TILE, end1)
    end2 = tl.maximum(tl.cdiv(high2, TILE), start2)
    return Spans(start0, end0 - start0, start1, end1 - start1, start2, end2 - start2)


@triton.jit
def key_spans(row0, ROWS: tl.constexpr, COLS: tl.constexpr, m, family):
    """Column tiles that hold every key to which rows row0 .. row0 + ROWS - 1 attend; none if row0 is unused."""
    row1 = tl.minimum(row0 + ROWS, m.length) - 1  # the last row
    low = 0
    high = m.length
    if family.CAUSAL:
        high = row1 + 1
    if family.WINDOW:
        low, window_high = window_bounds(row0, row1, m, family)
        exempt = is_exempt(window_position(row1, m, family), m, family)
        low = tl.where(exempt, 0, low)
        high = tl.where(exempt, high, tl.minimum(high, window_high))
    group_low = 0
    group_high = 0
    if family.TARGETS:
        group_low, group_high = groups_around(row0, row1, m, family)
        group_high = tl.where(is_target(row1, m, family), tl.minimum(group_high, high), 0)
        if family.CAUSAL:
            high = tl.minimum(high, m.history_end)
        else:
            high = tl.where(row0 >= m.history_end, tl.minimum(high, m.history_end), high)
    if family.CONTEXT:
        contextual = row0 < m.contextual
        low = tl.where(contextual, 0, low)
        high = tl.where(contextual, tl.maximum(high, m.history_end), high)
        low, high, others_low = own_cells(row0, row1, low, high, m, family)
        group_low = tl.maximum(group_low, others_low)
    used = row0 < m.length
    return spans_of(low, tl.where(used, high, 0), group_low, tl.where(used, group_high, 0), 0, 0, COLS)


@triton.jit
def query_spans(col0, ROWS: tl.constexpr, COLS: tl.constexpr, m, family):
    """Row tiles that hold every query which attends to keys col0 .. col0 + COLS - 1; none if col0 is unused."""
    col1 = tl.minimum(col0 + COLS, m.length) - 1  # the last column
    low = 0
    high = m.length
    if family.CAUSAL:
        low = col0
    exempt_low = 0  # rows from here on are exempt from the window
    exempt_high = 0
    if family.WINDOW:
        window_low, window_high = window_bounds(col0, col1, m, family)
        exempt_position = end_position(m, family) - m.min_full_attn_seq_len
        exempt_low = tl.where(exempt_position <= 0, 0, exempt_position + shift(m, family))
        exempt_low = tl.maximum(exempt_low, low)
        exempt_high = tl.where(m.min_full_attn_seq_len > 0, high, 0)
        low = tl.maximum(low, window_low)
        low = tl.where(exempt_high > 0, tl.minimum(low, exempt_low), low)
        high = tl.minimum(high, window_high)
    if family.TARGETS:
        # Keys that are all targets: history (if it looks ahead), then their own groups.
        group_low, group_high = groups_around(col0, col1, m, family)
        only_targets = is_target(col0, m, family)
        if family.CAUSAL:
            low = tl.where(only_targets, tl.maximum(low, group_low), low)
            high = tl.where(only_targets, tl.minimum(high, group_high), high)
            exempt_high = tl.where(only_targets, tl.minimum(exempt_high, group_high), exempt_high)
        else:
            history_high = tl.where(exempt_high > 0, m.history_end, tl.minimum(high, m.history_end))
            if family.CONTEXT:
                history_high = tl.where(no_history(m, family), 0, history_high)
            high = tl.where(only_targets, history_high, high)
            exempt_low = tl.where(only_targets, group_low, exempt_low)
            exempt_high = tl.where(only_targets, group_high, exempt_high)
    contextual_low = 0
    contextual_high = 0
    if family.CONTEXT:
        contextual_high = tl.where(col0 < m.history_end, m.contextual, 0)
        contextual_low, contextual_high, others_low = own_cells(col0, col1, 0, contextual_high, m, family)
        low = tl.maximum(low, others_low)
    used = col0 < m.length
    return spans_of(
        contextual_low,
        tl.where(used, contextual_high, 0),
        low,
        tl.where(used, high, 0),
        exempt_low,
        tl.where(used, exempt_high, 0),
        ROWS,
    )


@triton.jit
def num_tiles(spans):
    return spans.count0 + spans.count1 + spans.count2


@triton.jit
def nth_tile(i, spans):
    """The i-th tile of the runs."""
    tile = tl.where(i < spans.count0, spans.start0 + i, spans.start1 + i - spans.count0)
    return tl.where(i < spans.count0 + spans.count1, tile, spans.start2 + i - spans.count0 - spans.count1)


@triton.jit
def first_tile(spans):
    """The first tile of the runs, of which there is one."""
    first = tl.where(spans.count1 > 0, spans.start1, spans.start2)
    return tl.where(spans.count0 > 0, spans.start0, first)


@triton.jit
def last_tile(spans):
    """The last tile of the runs, of which there is one."""
    last = tl.where(spans.count0 > 0, spans.start0 + spans.count0, 0)
    last = tl.where(spans.count1 > 0, spans.start1 + spans.count1, last)
    return tl.where(spans.count2 > 0, spans.start2 + spans.count2, last) - 1


@triton.jit
def tiles_upto(tile, spans):
    """How many tiles of the runs are this one or come before it."""
    upto0 = tl.minimum(tl.maximum(tile + 1 - spans.start0, 0), spans.count0)
    upto1 = tl.minimum(tl.maximum(tile + 1 - spans.start1, 0), spans.count1)
    return upto0 + upto1 + tl.minimum(tl.maximum(tile + 1 - spans.start2, 0), spans.count2)


@triton.jit
def in_spans(tile, spans):
    """Whether the runs hold this tile."""
    in0 = (tile >= spans.start0) & (tile < spans.start0 + spans.count0)
    in1 = (tile >= spans.start1) & (tile < spans.start1 + spans.count1)
    in2 = (tile >= spans.start2) & (tile < spans.start2 + spans.count2)
    return in0 | in1 | in2
