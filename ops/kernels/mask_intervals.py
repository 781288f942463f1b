"""The mask family of `ops/attention_mask.py` as intervals: what one row (or key) meets is up to three runs of columns.

The same as `live_cells` of mask_tiles.py, for kernels short of registers: bounds are held for the rows of a tile alone,
of which a thread has two, and nothing per column. Written in Triton, which Gluon kernels can call.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.mask_tiles import (
    end_position,
    in_spans,
    is_exempt,
    key_spans,
    no_history,
    position,
    query_spans,
    shift,
    window_bounds,
    window_position,
)

BEYOND = tl.constexpr(1 << 30)  # any column


@triton.jit
def live_in(first, second, mask, FAMILY: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Whether the cells of `first` x `second` live: queries x keys, or with KEYS_FIRST keys x queries."""
    if KEYS_FIRST:
        live = in_spans(second, query_spans(first, 1, 1, mask, FAMILY))
    else:
        live = in_spans(second, key_spans(first, 1, 1, mask, FAMILY))
    if FAMILY.TARGETS and FAMILY.WINDOW and not FAMILY.SHARED:  # spans let a window end within a group of targets
        first_at = position(first, mask, FAMILY)
        second_at = position(second, mask, FAMILY)
        apart = tl.maximum(first_at - second_at, second_at - first_at)
        history = tl.minimum(first_at, second_at) < end_position(mask, FAMILY)
        live = live & (history | (apart <= mask.max_attn_len) | (mask.min_full_attn_seq_len > 0))
    return live


@triton.jit
def whole_columns(row0, ROWS: tl.constexpr, mask, FAMILY: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Columns [low, high) that every used row from row0 to row0 + ROWS meets: no tile within them needs masking.

    Columns beyond the end of the sequence count as met: kernels make them zeros.
    """
    last = tl.minimum(row0 + ROWS, mask.length) - 1
    low = 0
    high = BEYOND
    if FAMILY.CAUSAL:
        if KEYS_FIRST:
            low = last
        else:
            high = row0 + 1
    if FAMILY.WINDOW:
        window_low, _ = window_bounds(last, last, mask, FAMILY)
        _, window_high = window_bounds(row0, row0, mask, FAMILY)
        window_high = tl.where(window_high < mask.length, window_high, BEYOND)
        if KEYS_FIRST:
            exempt_position = end_position(mask, FAMILY) - mask.min_full_attn_seq_len
            exempt_low = tl.where(exempt_position <= 0, 0, exempt_position + shift(mask, FAMILY))
            all_exempt = (mask.min_full_attn_seq_len > 0) & (exempt_low <= window_high)
            low = tl.maximum(low, window_low)
            high = tl.where(all_exempt, high, tl.minimum(high, window_high))
        else:
            exempt = is_exempt(window_position(row0, mask, FAMILY), mask, FAMILY)
            low = tl.where(exempt, low, window_low)
            high = tl.where(exempt, high, tl.minimum(high, window_high))
    if FAMILY.CONTEXT and not KEYS_FIRST:
        contextual = last < mask.contextual
        low = tl.where(contextual, 0, low)
        high = tl.where(contextual, mask.history_end, high)
    if FAMILY.TARGETS:
        high = tl.where(last >= mask.history_end, tl.minimum(high, mask.history_end), high)
    if FAMILY.CONTEXT:
        high = tl.where(no_history(mask, FAMILY), 0, high)
    return low, high
