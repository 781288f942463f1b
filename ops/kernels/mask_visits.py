"""Which key tiles visit a query tile: what orders the programs that add to the same rows of dq.

The programs of key tiles walk `query_spans`; whatever these hold is a visit, live or not, so the counts here are those
of the walks by construction. A wrong count would be a deadlock.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.mask_tiles import in_spans, query_spans

BELOW = tl.constexpr(1 << 16)


@triton.jit
def is_plain(FAMILY: tl.constexpr):
    """Whether the mask is at most a causal edge."""
    return not (FAMILY.CONTEXT or FAMILY.TARGETS or FAMILY.WINDOW)


@triton.jit
def plain_visits(query_tile, key_tile, length, ROWS: tl.constexpr, COLS: tl.constexpr, FAMILY: tl.constexpr):
    """How many key tiles above and below this one visit the query tile, if the mask is at most a causal edge."""
    if FAMILY.CAUSAL:
        top = query_tile * ROWS // COLS
    else:
        top = tl.cdiv(length, COLS) - 1
    return top - key_tile, key_tile


@triton.jit
def visits(others, query_tile, key_tile, mask, ROWS: tl.constexpr, COLS: tl.constexpr, FAMILY: tl.constexpr):
    """For each of the key tiles `others` that visits the query tile: 1 if above this one, BELOW if below, else 0."""
    visited = in_spans(query_tile, query_spans(others * COLS, ROWS, COLS, mask, FAMILY))
    side = tl.where(others > key_tile, 1, tl.where(others < key_tile, BELOW, 0))
    return tl.where(visited, side, 0)
