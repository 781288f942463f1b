"""Portable HSTU attention in Triton: the kernels. `attention_triton.py` launches them.

There is no softmax, so a tile of scores needs nothing but itself and the backward is the forward with the roles
exchanged: every kernel keeps one side's tile, streams the other side past it and writes its own result once. No
atomics, so the same bits on every run. Constant factors meet the fp32 sums, not the 16-bit operands, which keeps small
fp16 values out of the subnormal range.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.attention_tiles import (
    counts,
    half_argument,
    load_rows,
    locate,
    masked,
    occupied,
    store_rows,
    visit,
    weighted,
)
from hstu_compile.ops.kernels.mask_tiles import Mask, all_cells_live, in_spans, key_spans, num_tiles, query_spans
from hstu_compile.ops.kernels.silu import silu, silu_and_grad

# What changes from call to call is never a reason to compile again.
RUNTIME = [
    "mask_batches",
    "mask_heads",
    "N",
    "num_heads",
    "contextual_seq_len",
    "target_group_size",
    "max_attn_len",
    "min_full_attn_seq_len",
    "alpha",
    "scale",
]


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_rows,
    k_rows,
    v_rows,
    out_rows,
    sequences,
    mask,
    visits,
    ranks,
    mask_batches,
    mask_heads,
    bias,
    family,
    N,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    alpha,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """out = silu(alpha q kT + bias) mask v * scale: keeps q, streams k and v."""
    tiles = tl.cdiv(N, ROWS)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % num_heads
    batch = tl.program_id(0) // tiles // num_heads
    start, length = locate(sequences, batch, N)
    # The last rows see the most keys: longest first, so that the grid does not end on one long tile.
    used_tiles = tl.cdiv(length, ROWS)
    tile = tl.where(tile < used_tiles, used_tiles - 1 - tile, tile)
    row0 = tile * ROWS
    if sequences.offsets is not None:
        if row0 >= length:
            return
    at = (batch, start, head)
    history_end, contextual = counts(sequences, batch, length, contextual_seq_len)
    m = Mask(length, history_end, contextual, target_group_size, max_attn_len, min_full_attn_seq_len)
    if mask is not None:
        line = (batch % mask_batches * mask_heads + head % mask_heads).to(tl.int64) * tiles + tile
        visits += line * tl.cdiv(N, COLS)
        ranks += line * (tl.cdiv(N, COLS) + 1)
    spans = occupied(key_spans(row0, ROWS, COLS, m, family), ranks)
    rows = row0 + tl.arange(0, ROWS)
    q = load_rows(q_rows, at, rows, length)
    out = tl.zeros((ROWS, v_rows.BLOCK), tl.float32)
    for i in range(num_tiles(spans)):
        col_tile, ones = visit(i, spans, visits)
        col0 = col_tile * COLS
        cols = col0 + tl.arange(0, COLS)
        k = load_rows(k_rows, at, cols, length)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        half = half_argument(scores, 0.5 * alpha, bias, at, rows[:, None], cols[None, :], m)
        p = silu(half, FAST)
        p = masked(p, all_cells_live(row0, col0, ROWS, COLS, m, family), rows[:, None], cols[None, :], m, family)
        p = weighted(p, ones, mask, at, rows[:, None], cols[None, :], m)
        v = load_rows(v_rows, at, cols, length)
        out = tl.dot(p.to(v.dtype), v, out, input_precision="ieee")
    store_rows(out_rows, at, rows, out * scale, length, N, sequences.offsets is not None)


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q_rows,
    k_rows,
    v_rows,
    dout_rows,
    dq_rows,
    sequences,
    mask,
    visits,
    ranks,
    mask_batches,
    mask_heads,
    bias,
    family,
    N,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    alpha,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """dq = (silu'(alpha q kT + bias) mask (dout vT)) k * alpha * scale: keeps q and dout, streams k and v."""
    tiles = tl.cdiv(N, ROWS)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % num_heads
    batch = tl.program_id(0) // tiles // num_heads
    start, length = locate(sequences, batch, N)
    # The last rows see the most keys: longest first, so that the grid does not end on one long tile.
    used_tiles = tl.cdiv(length, ROWS)
    tile = tl.where(tile < used_tiles, used_tiles - 1 - tile, tile)
    row0 = tile * ROWS
    if sequences.offsets is not None:
        if row0 >= length:
            return
    at = (batch, start, head)
    history_end, contextual = counts(sequences, batch, length, contextual_seq_len)
    m = Mask(length, history_end, contextual, target_group_size, max_attn_len, min_full_attn_seq_len)
    if mask is not None:
        line = (batch % mask_batches * mask_heads + head % mask_heads).to(tl.int64) * tiles + tile
        visits += line * tl.cdiv(N, COLS)
        ranks += line * (tl.cdiv(N, COLS) + 1)
    spans = occupied(key_spans(row0, ROWS, COLS, m, family), ranks)
    rows = row0 + tl.arange(0, ROWS)
    q = load_rows(q_rows, at, rows, length)
    dout = load_rows(dout_rows, at, rows, length)
    dq = tl.zeros((ROWS, q_rows.BLOCK), tl.float32)
    for i in range(num_tiles(spans)):
        col_tile, ones = visit(i, spans, visits)
        col0 = col_tile * COLS
        cols = col0 + tl.arange(0, COLS)
        k = load_rows(k_rows, at, cols, length)
        v = load_rows(v_rows, at, cols, length)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        half = half_argument(scores, 0.5 * alpha, bias, at, rows[:, None], cols[None, :], m)
        _, grad = silu_and_grad(half, FAST)
        ds = grad * dp
        ds = masked(ds, all_cells_live(row0, col0, ROWS, COLS, m, family), rows[:, None], cols[None, :], m, family)
        ds = weighted(ds, ones, mask, at, rows[:, None], cols[None, :], m)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    store_rows(dq_rows, at, rows, dq * (alpha * scale), length, N, sequences.offsets is not None)


@triton.jit(do_not_specialize=RUNTIME)
def dk_dv_kernel(
    q_rows,
    k_rows,
    v_rows,
    dout_rows,
    dk_rows,
    dv_rows,
    sequences,
    mask,
    visits,
    ranks,
    mask_batches,
    mask_heads,
    bias,
    family,
    N,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    alpha,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """dv = pT dout * scale and dk = dsT q * alpha * scale: keeps k and v, streams q and dout.

    Scores are computed transposed, [keys, queries], so that p and ds are the left operands that dv and dk want; the
    lists of occupied tiles are those of the transposed mask.
    """
    tiles = tl.cdiv(N, COLS)
    tile = tl.program_id(0) % tiles  # the first keys are seen by the most queries: longest first
    head = tl.program_id(0) // tiles % num_heads
    batch = tl.program_id(0) // tiles // num_heads
    start, length = locate(sequences, batch, N)
    col0 = tile * COLS
    if sequences.offsets is not None:
        if col0 >= length:
            return
    at = (batch, start, head)
    history_end, contextual = counts(sequences, batch, length, contextual_seq_len)
    m = Mask(length, history_end, contextual, target_group_size, max_attn_len, min_full_attn_seq_len)
    if mask is not None:
        line = (batch % mask_batches * mask_heads + head % mask_heads).to(tl.int64) * tiles + tile
        visits += line * tl.cdiv(N, ROWS)
        ranks += line * (tl.cdiv(N, ROWS) + 1)
    spans = occupied(query_spans(col0, ROWS, COLS, m, family), ranks)
    cols = col0 + tl.arange(0, COLS)
    k = load_rows(k_rows, at, cols, length)
    v = load_rows(v_rows, at, cols, length)
    dk = tl.zeros((COLS, k_rows.BLOCK), tl.float32)
    dv = tl.zeros((COLS, v_rows.BLOCK), tl.float32)
    for i in range(num_tiles(spans)):
        row_tile, ones = visit(i, spans, visits)
        row0 = row_tile * ROWS
        rows = row0 + tl.arange(0, ROWS)
        q = load_rows(q_rows, at, rows, length)
        dout = load_rows(dout_rows, at, rows, length)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        half = half_argument(scores, 0.5 * alpha, bias, at, rows[None, :], cols[:, None], m)
        p, grad = silu_and_grad(half, FAST)
        ds = grad * dp
        whole = all_cells_live(row0, col0, ROWS, COLS, m, family)
        p = masked(p, whole, rows[None, :], cols[:, None], m, family)
        ds = masked(ds, whole, rows[None, :], cols[:, None], m, family)
        p = weighted(p, ones, mask, at, rows[None, :], cols[:, None], m)
        ds = weighted(ds, ones, mask, at, rows[None, :], cols[:, None], m)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dk_rows, at, cols, dk * (alpha * scale), length, N, sequences.offsets is not None)
    store_rows(dv_rows, at, cols, dv * scale, length, N, sequences.offsets is not None)


@triton.jit(do_not_specialize=[*RUNTIME, "num_sequences", "bias_batches", "bias_heads"])
def dbias_kernel(
    q_rows,
    k_rows,
    v_rows,
    dout_rows,
    dbias_ptr,
    num_sequences,
    bias_batches,
    bias_heads,
    sequences,
    mask,
    bias,
    family,
    N,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    alpha,
    scale,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    FAST: tl.constexpr,
):
    """dbias = silu'(alpha q kT + bias) mask (dout vT) * scale, summed in order over what the bias broadcasts.

    One program a tile of dbias [bias_batches, bias_heads, N, N] (contiguous): written once, 0 where nothing lives.
    """
    tiles = tl.cdiv(N, COLS)
    col_tile = tl.program_id(0) % tiles
    row_tile = tl.program_id(0) // tiles % tl.cdiv(N, ROWS)
    matrix = tl.program_id(0) // tiles // tl.cdiv(N, ROWS)
    # The sequences and heads that share this matrix: all of them, or one.
    batch0 = matrix // bias_heads
    head0 = matrix % bias_heads
    batches = tl.where(bias_batches == 1, num_sequences, 1)
    heads = tl.where(bias_heads == 1, num_heads, 1)
    row0 = row_tile * ROWS
    col0 = col_tile * COLS
    rows = row0 + tl.arange(0, ROWS)
    cols = col0 + tl.arange(0, COLS)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    for batch in range(batch0, batch0 + batches):
        start, length = locate(sequences, batch, N)
        history_end, contextual = counts(sequences, batch, length, contextual_seq_len)
        m = Mask(length, history_end, contextual, target_group_size, max_attn_len, min_full_attn_seq_len)
        visited = (col0 < length) & in_spans(col_tile, key_spans(row0, ROWS, COLS, m, family))
        whole = all_cells_live(row0, col0, ROWS, COLS, m, family)
        for head in range(head0, tl.where(visited, head0 + heads, head0)):
            at = (batch, start, head)
            q = load_rows(q_rows, at, rows, length)
            k = load_rows(k_rows, at, cols, length)
            v = load_rows(v_rows, at, cols, length)
            dout = load_rows(dout_rows, at, rows, length)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
            half = half_argument(scores, 0.5 * alpha, bias, at, rows[:, None], cols[None, :], m)
            _, grad = silu_and_grad(half, FAST)
            ds = masked(grad * dp, whole, rows[:, None], cols[None, :], m, family)
            dbias += weighted(ds, False, mask, at, rows[:, None], cols[None, :], m)
    pointers = dbias_ptr + matrix.to(tl.int64) * N * N + (rows[:, None].to(tl.int64) * N + cols[None, :])
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    tl.store(pointers, (dbias * scale).to(dbias_ptr.dtype.element_ty), mask=inside)
