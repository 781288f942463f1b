"""One product of HSTU attention on Hopper: forward or gradient, query rows or key rows resident.

Without a softmax, every product of the backward is the forward with other operands:

    out = f(q kT) v              dq = (f'(q kT) * (do vT)) k        resident queries, streamed keys
    dv  = f(k qT) do             dk = (f'(k qT) * (v doT)) q        resident keys, streamed queries

Each program owns its output rows, so there are no atomics. The scores of the next tile and their pointwise work hide
under the product of this one; P stays in registers as the A operand of the second product.
"""

from hstu_compile.ops.kernels.attention_sm90_tiles import (
    RUNTIME,
    Batch,
    live_tile,
    load_tile,
    mask_of,
    matrix,
    pinned,
    sequence_of,
    store_rows,
)
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from hstu_compile.ops.kernels.mask_intervals import whole_columns
from hstu_compile.ops.kernels.mask_tiles import key_spans, nth_tile, num_tiles, query_spans
from hstu_compile.ops.kernels.silu import silu, silu_and_grad


@gluon.jit
def pointwise(s, half_alpha, GRAD: gl.constexpr):
    """silu(alpha * s), or its derivative."""
    if GRAD:
        return silu_and_grad(s * half_alpha, True)[1]
    else:
        return silu(s * half_alpha, True)


@gluon.jit
def streamed_row(t, tiles, spans, BLOCK: gl.constexpr, KEYS_RESIDENT: gl.constexpr):
    """First row of the t-th streamed tile, from the masked diagonal outwards."""
    if KEYS_RESIDENT:
        return nth_tile(t, spans) * BLOCK
    else:
        return nth_tile(tiles - 1 - t, spans) * BLOCK


@gluon.jit
def masked_pointwise(
    s, half_alpha, row0, col0, whole, z, batch, FAMILY: gl.constexpr, GRAD: gl.constexpr, KEYS: gl.constexpr
):
    if (whole[0] <= col0) & (col0 + s.shape[1] <= whole[1]):
        x = pointwise(s, half_alpha, GRAD)
    else:  # not a mask over x: in a branch of their own the two share their registers
        live = live_tile(s, row0, col0, z, batch, FAMILY, KEYS)
        x = gl.where(live, pointwise(s, half_alpha, GRAD), 0.0)
    return x


@gluon.jit
def stream(
    a_desc, da_desc, b_desc, c_desc, sequence, spans, whole, row0, batch, half_alpha,
    FAMILY: gl.constexpr, D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr,
    B_STAGES: gl.constexpr, C_STAGES: gl.constexpr,
    GRAD: gl.constexpr, KEYS_RESIDENT: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Sum over the streamed tiles of  GRAD ? (f'(a bT) * (da cT)) b : f(a bT) c  for the rows from row0."""
    dtype: gl.constexpr = a_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_C, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    a = gl.allocate_shared_memory(dtype, a_desc.block_type.shape, a_desc.layout)
    if GRAD:
        da = gl.allocate_shared_memory(dtype, a_desc.block_type.shape, da_desc.layout)
    b = gl.allocate_shared_memory(dtype, [B_STAGES, 1, 1, BLOCK_C, 1, D], b_desc.layout)
    c = gl.allocate_shared_memory(dtype, [C_STAGES, 1, 1, BLOCK_C, 1, D], c_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    b_ready = gl.allocate_shared_memory(gl.int64, [B_STAGES, 1], mbarrier.MBarrierLayout())
    c_ready = gl.allocate_shared_memory(gl.int64, [C_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=2 if GRAD else 1)
    for i in gl.static_range(B_STAGES):
        mbarrier.init(b_ready.index(i), count=1)
    for i in gl.static_range(C_STAGES):
        mbarrier.init(c_ready.index(i), count=1)

    tiles = num_tiles(spans)
    load_tile(a_desc, sequence, row0, ready, a, True)
    if GRAD:
        load_tile(da_desc, sequence, row0, ready, da, True)
    for i in gl.static_range(B_STAGES):
        col = streamed_row(i, tiles, spans, BLOCK_C, KEYS_RESIDENT)
        load_tile(b_desc, sequence, col, b_ready.index(i), b.index(i), i < tiles)
    for i in gl.static_range(C_STAGES):
        col = streamed_row(i, tiles, spans, BLOCK_C, KEYS_RESIDENT)
        load_tile(c_desc, sequence, col, c_ready.index(i), c.index(i), i < tiles)
    acc = gl.zeros((BLOCK_R, D), dtype=gl.float32, layout=o_layout)
    zero = gl.zeros((BLOCK_R, BLOCK_C), dtype=gl.float32, layout=s_layout)

    # First tile: nothing to overlap with yet.
    col0 = streamed_row(0, tiles, spans, BLOCK_C, KEYS_RESIDENT)
    mbarrier.wait(ready, 0)
    mbarrier.wait(b_ready.index(0), 0)
    s = warpgroup_mma(matrix(a), matrix(b.index(0)).permute((1, 0)), zero, use_acc=False, is_async=True)
    if GRAD:
        mbarrier.wait(c_ready.index(0), 0)
        dp = warpgroup_mma(matrix(da), matrix(c.index(0)).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        g = masked_pointwise(s, half_alpha, row0, col0, whole, sequence.z, batch, FAMILY, GRAD, KEYS_RESIDENT)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        col = streamed_row(C_STAGES, tiles, spans, BLOCK_C, KEYS_RESIDENT)
        load_tile(c_desc, sequence, col, c_ready.index(0), c.index(0), C_STAGES < tiles)
        p = gl.convert_layout((g * dp).to(dtype), p_layout)
    else:
        s = warpgroup_mma_wait(0, deps=(s,))
        col = streamed_row(B_STAGES, tiles, spans, BLOCK_C, KEYS_RESIDENT)
        load_tile(b_desc, sequence, col, b_ready.index(0), b.index(0), B_STAGES < tiles)
        p = masked_pointwise(s, half_alpha, row0, col0, whole, sequence.z, batch, FAMILY, GRAD, KEYS_RESIDENT)
        p = gl.convert_layout(p.to(dtype), p_layout)

    # Steady state: tile t's product under the scores of tile t + 1.
    for t in range(0, tiles - 1):
        nxt = t + 1
        col0 = streamed_row(nxt, tiles, spans, BLOCK_C, KEYS_RESIDENT)
        bn = nxt % B_STAGES
        mbarrier.wait(b_ready.index(bn), (nxt // B_STAGES) & 1)
        if GRAD:
            bt = t % B_STAGES
            cn = nxt % C_STAGES
            s = warpgroup_mma(matrix(a), matrix(b.index(bn)).permute((1, 0)), zero, use_acc=False, is_async=True)
            acc = warpgroup_mma(p, matrix(b.index(bt)), acc, is_async=True)
            mbarrier.wait(c_ready.index(cn), (nxt // C_STAGES) & 1)
            dp = warpgroup_mma(matrix(da), matrix(c.index(cn)).permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(2, deps=(s,))
            g = masked_pointwise(s, half_alpha, row0, col0, whole, sequence.z, batch, FAMILY, GRAD, KEYS_RESIDENT)
            acc, p, dp = warpgroup_mma_wait(0, deps=(acc, p, dp))
            col = streamed_row(t + B_STAGES, tiles, spans, BLOCK_C, KEYS_RESIDENT)
            load_tile(b_desc, sequence, col, b_ready.index(bt), b.index(bt), t + B_STAGES < tiles)
            col = streamed_row(nxt + C_STAGES, tiles, spans, BLOCK_C, KEYS_RESIDENT)
            load_tile(c_desc, sequence, col, c_ready.index(cn), c.index(cn), nxt + C_STAGES < tiles)
            p = gl.convert_layout((g * dp).to(dtype), p_layout)
        else:
            ct = t % C_STAGES
            s = warpgroup_mma(matrix(a), matrix(b.index(bn)).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(c_ready.index(ct), (t // C_STAGES) & 1)
            acc = warpgroup_mma(p, matrix(c.index(ct)), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            col = streamed_row(nxt + B_STAGES, tiles, spans, BLOCK_C, KEYS_RESIDENT)
            load_tile(b_desc, sequence, col, b_ready.index(bn), b.index(bn), nxt + B_STAGES < tiles)
            r = masked_pointwise(s, half_alpha, row0, col0, whole, sequence.z, batch, FAMILY, GRAD, KEYS_RESIDENT)
            r = gl.convert_layout(r.to(dtype), p_layout)
            acc, p = warpgroup_mma_wait(0, deps=(acc, p))
            col = streamed_row(t + C_STAGES, tiles, spans, BLOCK_C, KEYS_RESIDENT)
            load_tile(c_desc, sequence, col, c_ready.index(ct), c.index(ct), t + C_STAGES < tiles)
            p = r

    last = tiles - 1
    if GRAD:
        acc = warpgroup_mma(p, matrix(b.index(last % B_STAGES)), acc, is_async=True)
    else:
        mbarrier.wait(c_ready.index(last % C_STAGES), (last // C_STAGES) & 1)
        acc = warpgroup_mma(p, matrix(c.index(last % C_STAGES)), acc, is_async=True)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit(do_not_specialize=RUNTIME)
def product_kernel(
    a_desc, da_desc, b_desc, c_desc, out, row_stride, half_alpha, factor,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    tiles_per_seq, FAMILY: gl.constexpr,
    DIM: gl.constexpr, D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr,
    B_STAGES: gl.constexpr, C_STAGES: gl.constexpr, GRAD: gl.constexpr, KEYS_RESIDENT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """out[rows] = factor * sum over the streamed tiles; one program a tile of BLOCK_R rows of a head."""
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
    )
    pid = gl.program_id(0)
    index = pid // tiles_per_seq
    sequence = sequence_of(index, batch)
    mask = mask_of(sequence.z, batch)
    # Longest tiles first, so that the last wave is short work.
    if KEYS_RESIDENT:
        row0 = pid % tiles_per_seq * BLOCK_R
        spans = query_spans(row0, BLOCK_C, BLOCK_R, mask, FAMILY)
    else:
        row0 = (tiles_per_seq - 1 - pid % tiles_per_seq) * BLOCK_R
        spans = key_spans(row0, BLOCK_R, BLOCK_C, mask, FAMILY)
    if row0 < sequence.length:
        whole = whole_columns(row0, BLOCK_R, mask, FAMILY, KEYS_RESIDENT)
        acc = stream(
            a_desc, da_desc, b_desc, c_desc, sequence, spans, whole, row0, batch, half_alpha,
            FAMILY, D, BLOCK_R, BLOCK_C, B_STAGES, C_STAGES, GRAD, KEYS_RESIDENT, num_warps,
        )  # fmt: skip
        sequence = sequence_of(pinned(index), batch)  # read again: nothing of it waits in registers
        store_rows(out, row_stride, acc * factor, row0, sequence, DIM)
    elif row0 < sequence.stored:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
        store_rows(out, row_stride, gl.zeros((BLOCK_R, D), gl.float32, layout), row0, sequence, DIM)
