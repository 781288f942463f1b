"""The gradient of the attention bias in Triton: what shares a tile of the bias, and the sum over it.

One program a tile of dbias, which streams the sequences and heads that share it past a tile of sums. No atomics.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.attention_tiles import (
    load_cells,
    load_chunk,
    locate,
    mask_of,
    store_cells,
    takes_no_weights,
    tile_line,
    weighted,
    weights,
)
from hstu_compile.ops.kernels.attention_triton_kernels import RUNTIME
from hstu_compile.ops.kernels.mask_tiles import in_spans, key_spans
from hstu_compile.ops.kernels.silu import silu_and_grad

SHARING = ["bias_batches", "bias_heads"]


@triton.jit
def bias_tile(tile, N, num_sequences, num_heads, bias_batches, bias_heads, ROWS: tl.constexpr, COLS: tl.constexpr):
    """A tile of the bias, its matrix (batch, 0, head), and how many sequences and heads share that."""
    col_tiles = tl.cdiv(N, COLS)
    col_tile = tile % col_tiles
    row_tile = tile // col_tiles % tl.cdiv(N, ROWS)
    matrix = tile // col_tiles // tl.cdiv(N, ROWS)
    batches = tl.where(bias_batches == 1, num_sequences, 1)
    heads = tl.where(bias_heads == 1, num_heads, 1)
    return row_tile, col_tile, (matrix // bias_heads, 0, matrix % bias_heads), batches, heads


@triton.jit(do_not_specialize=[*RUNTIME, *SHARING])
def sharers_kernel(
    sharers_ptr,
    counts_ptr,
    counter_ptr,
    num_sequences,
    bias_batches,
    bias_heads,
    sequences,
    visits,
    ranks,
    mask_batches,
    mask_heads,
    family,
    N,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """For each tile of the bias, in order, the sequences and heads in which a cell of it may live, and their number.

    sharers[tile, i] = (batch * num_heads + head) * 2 + w, w = 1 if the mask tensor (if any) is all ones there.
    counter: None, or what the next kernel draws its tiles from, which becomes 0.
    """
    if counter_ptr is not None:
        tl.store(counter_ptr, 0, mask=tl.program_id(0) == 0)
    row_tile, col_tile, matrix, batches, heads = bias_tile(
        tl.program_id(0), N, num_sequences, num_heads, bias_batches, bias_heads, ROWS, COLS
    )
    sharers_ptr += tl.program_id(0).to(tl.int64) * batches * heads
    count = tl.zeros((), tl.int32)
    for batch in range(matrix[0], matrix[0] + batches):
        _, length = locate(sequences, batch, N)
        m = mask_of(
            sequences, batch, length, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
        )  # fmt: skip
        live = (col_tile * COLS < length) & in_spans(col_tile, key_spans(row_tile * ROWS, ROWS, COLS, m, family))
        for head in range(matrix[2], tl.where(live, matrix[2] + heads, matrix[2])):
            entry = (batch * num_heads + head) * 2
            if ranks is not None:
                line = tile_line((batch, 0, head), row_tile, tl.cdiv(N, ROWS), mask_batches, mask_heads)
                rank_ptr = ranks + line * (tl.cdiv(N, COLS) + 1) + col_tile
                rank = tl.load(rank_ptr)
                held = tl.load(rank_ptr + 1) - rank
                entry += tl.load(visits + line * tl.cdiv(N, COLS) + rank, mask=held != 0, other=0) % 2
            else:
                held = 1
                entry += 1
            tl.store(sharers_ptr + count, entry, mask=held != 0)
            count += held
    tl.store(counts_ptr + tl.program_id(0), count)


@triton.jit
def sharer(i, count, sharers_ptr, sequences, N, num_heads):
    """The i-th sharer of `count`: (sequence, first row, head), length, and whether the mask tensor is all ones."""
    entry = tl.load(sharers_ptr + i, mask=i < count, other=0)
    batch = entry // 2 // num_heads
    start, length = locate(sequences, batch, N)
    return (batch, start, entry // 2 % num_heads), length, entry % 2 == 1


@triton.jit(do_not_specialize=[*RUNTIME, *SHARING])
def dbias_kernel(
    q_rows,
    k_rows,
    v_rows,
    dout_rows,
    dbias_cells,
    sharers_ptr,
    counts_ptr,
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
    CHUNK: tl.constexpr,
    FAST: tl.constexpr,
):
    """dbias = silu'(alpha q kT + bias) mask (dout vT) * scale, summed in order over what the bias broadcasts.

    The products take CHUNK columns of q, k, dout and v a step, so that steps ahead fit into shared memory.
    """
    CHUNKS: tl.constexpr = triton.cdiv(max(q_rows.BLOCK, v_rows.BLOCK), CHUNK)
    row_tile, col_tile, matrix, batches, heads = bias_tile(
        tl.program_id(0), N, num_sequences, num_heads, bias_batches, bias_heads, ROWS, COLS
    )
    sharers_ptr += tl.program_id(0).to(tl.int64) * batches * heads
    count = tl.load(counts_ptr + tl.program_id(0))
    row0 = row_tile * ROWS
    col0 = col_tile * COLS
    rows = row0 + tl.arange(0, ROWS)
    cols = col0 + tl.arange(0, COLS)
    dbias = tl.zeros((ROWS, COLS), tl.float32)
    if count == 0:
        store_cells(dbias_cells, matrix, rows[:, None], cols[None, :], N, dbias)
        return
    half_bias = 0.5 * load_cells(bias, matrix, rows[:, None], cols[None, :], N)
    scores = tl.zeros((ROWS, COLS), tl.float32)
    dp = tl.zeros((ROWS, COLS), tl.float32)
    at, length, ones = sharer(0, count, sharers_ptr, sequences, N, num_heads)
    for i in range(count * CHUNKS):
        q = load_chunk(q_rows, at, rows, length, i % CHUNKS, CHUNK)
        k = load_chunk(k_rows, at, cols, length, i % CHUNKS, CHUNK)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        dout = load_chunk(dout_rows, at, rows, length, i % CHUNKS, CHUNK)
        v = load_chunk(v_rows, at, cols, length, i % CHUNKS, CHUNK)
        dp = tl.dot(dout, tl.trans(v), dp, input_precision="ieee")
        if i % CHUNKS == CHUNKS - 1:
            _, grad = silu_and_grad(scores * (0.5 * alpha) + half_bias, FAST)
            ds = grad * dp
            m = mask_of(
                sequences, at[0], length, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
            )  # fmt: skip
            if not takes_no_weights(row0, col0, ROWS, COLS, ones, bias, m, family):
                ds = weighted(ds, weights(mask, at, rows[:, None], cols[None, :], m, family))
            dbias += ds
            scores = tl.zeros((ROWS, COLS), tl.float32)
            dp = tl.zeros((ROWS, COLS), tl.float32)
        at, length, ones = sharer((i + 1) // CHUNKS, count, sharers_ptr, sequences, N, num_heads)
    store_cells(dbias_cells, matrix, rows[:, None], cols[None, :], N, dbias * scale)
