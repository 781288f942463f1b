"""Portable HSTU attention in Triton: the kernels. `attention_triton.py` launches them.

There is no softmax, so a tile of scores needs nothing but itself and the backward is the forward with the roles
exchanged: every program keeps one side's tile, streams the other side past it and writes its own result once. No
atomics, so the same bits on every run. Constant factors meet the fp32 sums, not the 16-bit operands, which keeps small
fp16 values out of the subnormal range.

Which tile comes next is read one step ahead: an address that waits for a load would keep Triton from fetching the tile
itself ahead of its use.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.attention_tiles import (
    add_product,
    half_argument,
    load_rows,
    locate,
    mask_of,
    occupied,
    store_rows,
    takes_no_weights,
    tile_line,
    visit,
    weighted,
    weights,
)
from hstu_compile.ops.kernels.mask_tiles import key_spans, num_tiles, query_spans
from hstu_compile.ops.kernels.silu import silu, silu_and_grad
from hstu_compile.ops.kernels.slots import tile_of_program

# What changes from call to call is never a reason to compile again.
RUNTIME = [
    "slots_per_seq",
    "num_sequences",
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


@triton.jit
def program(
    slots_per_seq, sequences, num_sequences, N, num_heads, contextual_seq_len, target_group_size, max_attn_len,
    min_full_attn_seq_len, TILE, LAST,
):  # fmt: skip
    """The tile of this program, its (sequence, first row, head), and their mask; it may be beyond the sequence."""
    batch, head, tile, _ = tile_of_program(
        num_heads, num_sequences, sequences.offsets, slots_per_seq, tl.arange(0, 32), TILE
    )
    start, length = locate(sequences, batch, N)
    if LAST:  # the last tile first
        used_tiles = tl.cdiv(length, TILE)
        tile = tl.where(tile < used_tiles, used_tiles - 1 - tile, tile)
    m = mask_of(
        sequences, batch, length, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
    )  # fmt: skip
    return tile, (batch, start, head), m


@triton.jit(do_not_specialize=RUNTIME)
def product_kernel(
    x_rows,
    y_rows,
    dx_rows,
    dy_rows,
    z_rows,
    out_rows,
    slots_per_seq,
    sequences,
    num_sequences,
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
    BY_KEYS: tl.constexpr,
    KEPT: tl.constexpr,
    STREAMED: tl.constexpr,
    FAST: tl.constexpr,
):
    """out = (silu(alpha x yT + bias) mask) z * scale, or out = (silu'(alpha x yT + bias) mask (dx dyT)) y * scale.

    Keeps x and dx, streams y, dy and z. By queries: the output (of q, k, v) and dq (of q, k, dout, v). By keys: dv (of
    k, q, dout) and dk (of k, q, v, dout); scores are transposed then, [keys, queries], and so are the mask and the
    lists of its occupied tiles.
    """
    ROWS: tl.constexpr = STREAMED if BY_KEYS else KEPT
    COLS: tl.constexpr = KEPT if BY_KEYS else STREAMED
    # The last queries see the most keys, the first keys are seen by the most queries: longest first, so that the grid
    # does not end on one long tile.
    tile, at, m = program(
        slots_per_seq, sequences, num_sequences, N, num_heads, contextual_seq_len, target_group_size, max_attn_len,
        min_full_attn_seq_len, KEPT, not BY_KEYS,
    )  # fmt: skip
    kept0 = tile * KEPT
    if sequences.offsets is not None:
        if kept0 >= m.length:
            return
    line = tile_line(at, tile, tl.cdiv(N, KEPT), mask_batches, mask_heads)
    if BY_KEYS:
        spans = query_spans(kept0, ROWS, COLS, m, family)
    else:
        spans = key_spans(kept0, ROWS, COLS, m, family)
    spans = occupied(spans, ranks, line, tl.cdiv(N, STREAMED))
    kept = kept0 + tl.arange(0, KEPT)
    x = load_rows(x_rows, at, kept, m.length)
    if dx_rows is not None:
        dx = load_rows(dx_rows, at, kept, m.length)
    out = tl.zeros((KEPT, out_rows.BLOCK), tl.float32)
    lost = tl.zeros((KEPT, out_rows.BLOCK), tl.float32)
    count = num_tiles(spans)
    streamed_tile, ones = visit(0, count, spans, visits, line, tl.cdiv(N, STREAMED))
    for i in range(count):
        streamed0 = streamed_tile * STREAMED
        streamed = streamed0 + tl.arange(0, STREAMED)
        if BY_KEYS:
            row0, col0, rows, cols = streamed0, kept0, streamed[None, :], kept[:, None]
        else:
            row0, col0, rows, cols = kept0, streamed0, kept[:, None], streamed[None, :]
        y = load_rows(y_rows, at, streamed, m.length)
        if dx_rows is not None:
            dy = load_rows(dy_rows, at, streamed, m.length)
        scores = tl.dot(x, tl.trans(y), input_precision="ieee")
        if dx_rows is not None:
            dp = tl.dot(dx, tl.trans(dy), input_precision="ieee")
            _, grad = silu_and_grad(half_argument(scores, 0.5 * alpha, bias, at, rows, cols, m), FAST)
            p = grad * dp
        else:
            p = silu(half_argument(scores, 0.5 * alpha, bias, at, rows, cols, m), FAST)
        if not takes_no_weights(row0, col0, ROWS, COLS, ones, bias, m, family):
            p = weighted(p, weights(mask, at, rows, cols, m, family))
        if dx_rows is not None:
            z = y
        else:
            z = load_rows(z_rows, at, streamed, m.length)
        out, lost = add_product(out, lost, p.to(z.dtype), z)
        streamed_tile, ones = visit(i + 1, count, spans, visits, line, tl.cdiv(N, STREAMED))
    store_rows(out_rows, at, kept, out * scale, m.length, N, sequences.offsets is not None)


@triton.jit(do_not_specialize=RUNTIME)
def dk_dv_kernel(
    q_rows,
    k_rows,
    v_rows,
    dout_rows,
    dk_rows,
    dv_rows,
    slots_per_seq,
    sequences,
    num_sequences,
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
    """dv = pT dout * scale and dk = dsT q * alpha * scale: `product_kernel` by keys, both products in one."""
    tile, at, m = program(
        slots_per_seq, sequences, num_sequences, N, num_heads, contextual_seq_len, target_group_size, max_attn_len,
        min_full_attn_seq_len, COLS, False,
    )  # fmt: skip
    col0 = tile * COLS
    if sequences.offsets is not None:
        if col0 >= m.length:
            return
    line = tile_line(at, tile, tl.cdiv(N, COLS), mask_batches, mask_heads)
    spans = occupied(query_spans(col0, ROWS, COLS, m, family), ranks, line, tl.cdiv(N, ROWS))
    cols = col0 + tl.arange(0, COLS)
    k = load_rows(k_rows, at, cols, m.length)
    v = load_rows(v_rows, at, cols, m.length)
    dk = tl.zeros((COLS, k_rows.BLOCK), tl.float32)
    dv = tl.zeros((COLS, v_rows.BLOCK), tl.float32)
    dk_lost = tl.zeros((COLS, k_rows.BLOCK), tl.float32)
    dv_lost = tl.zeros((COLS, v_rows.BLOCK), tl.float32)
    count = num_tiles(spans)
    row_tile, ones = visit(0, count, spans, visits, line, tl.cdiv(N, ROWS))
    for i in range(count):
        row0 = row_tile * ROWS
        rows = row0 + tl.arange(0, ROWS)
        q = load_rows(q_rows, at, rows, m.length)
        dout = load_rows(dout_rows, at, rows, m.length)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        p, grad = silu_and_grad(half_argument(scores, 0.5 * alpha, bias, at, rows[None, :], cols[:, None], m), FAST)
        ds = grad * dp
        if not takes_no_weights(row0, col0, ROWS, COLS, ones, bias, m, family):
            weight = weights(mask, at, rows[None, :], cols[:, None], m, family)
            p = weighted(p, weight)
            ds = weighted(ds, weight)
        dv, dv_lost = add_product(dv, dv_lost, p.to(dout.dtype), dout)
        dk, dk_lost = add_product(dk, dk_lost, ds.to(q.dtype), q)
        row_tile, ones = visit(i + 1, count, spans, visits, line, tl.cdiv(N, ROWS))
    store_rows(dk_rows, at, cols, dk * (alpha * scale), m.length, N, sequences.offsets is not None)
    store_rows(dv_rows, at, cols, dv * scale, m.length, N, sequences.offsets is not None)
