"""dk and dv of HSTU attention on Hopper in one kernel. (Head dims up to 128: at 256 they fill the registers.)

A program owns KEYS keys and streams q and do. The scores are computed transposed, [keys, queries], so that p and ds
come out of the tensor cores in the layout in which dv += pT do and dk += dsT q want their A operand, without a trip
through shared memory.
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
from hstu_compile.ops.kernels.mask_tiles import nth_tile, num_tiles, query_spans
from hstu_compile.ops.kernels.silu import silu_and_grad


@gluon.jit
def stream(
    q_desc, k_desc, v_desc, do_desc, sequence, key0, batch, half_alpha,
    FAMILY: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """dk / (alpha * scale) and dv / scale of the keys from key0."""
    dtype: gl.constexpr = q_desc.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, QUERIES, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    k = gl.allocate_shared_memory(dtype, k_desc.block_type.shape, k_desc.layout)
    v = gl.allocate_shared_memory(dtype, v_desc.block_type.shape, v_desc.layout)
    q = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, QUERIES, 1, D], q_desc.layout)
    do = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, QUERIES, 1, D], do_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    streamed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(streamed.index(i), count=2)

    mask = mask_of(sequence.z, batch)
    spans = query_spans(key0, QUERIES, KEYS, mask, FAMILY)
    tiles = num_tiles(spans)
    whole = whole_columns(key0, KEYS, mask, FAMILY, True)
    load_tile(k_desc, sequence, key0, ready, k, True)
    load_tile(v_desc, sequence, key0, ready, v, True)
    for i in gl.static_range(STAGES):
        row = nth_tile(i, spans) * QUERIES
        load_tile(q_desc, sequence, row, streamed.index(i), q.index(i), i < tiles)
        load_tile(do_desc, sequence, row, streamed.index(i), do.index(i), i < tiles)
    dk = gl.zeros((KEYS, D), dtype=gl.float32, layout=kv_layout)
    dv = gl.zeros((KEYS, D), dtype=gl.float32, layout=kv_layout)
    zero = gl.zeros((KEYS, QUERIES), dtype=gl.float32, layout=s_layout)
    mbarrier.wait(ready, 0)
    for t in range(0, tiles):
        slot = t % STAGES
        query0 = nth_tile(t, spans) * QUERIES
        q_tile = matrix(q.index(slot))
        do_tile = matrix(do.index(slot))
        mbarrier.wait(streamed.index(slot), (t // STAGES) & 1)
        s = warpgroup_mma(matrix(k), q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(matrix(v), do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        if (whole[0] <= query0) & (query0 + QUERIES <= whole[1]):
            x, g = silu_and_grad(s * half_alpha, True)
            p = gl.convert_layout(x.to(dtype), p_layout)
        else:  # not a mask over x and g: in a branch of their own they share their registers
            live = live_tile(s, key0, query0, sequence.z, batch, FAMILY, True)
            x, g = silu_and_grad(s * half_alpha, True)
            p = gl.convert_layout(gl.where(live, x, 0.0).to(dtype), p_layout)
            g = gl.where(live, g, 0.0)
        dv = warpgroup_mma(p, do_tile, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = gl.convert_layout((g * dp).to(dtype), p_layout)
        dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
        dv, dk, p, ds = warpgroup_mma_wait(0, deps=(dv, dk, p, ds))
        row = nth_tile(t + STAGES, spans) * QUERIES
        load_tile(q_desc, sequence, row, streamed.index(slot), q.index(slot), t + STAGES < tiles)
        load_tile(do_desc, sequence, row, streamed.index(slot), do.index(slot), t + STAGES < tiles)
    return dk, dv


@gluon.jit(do_not_specialize=RUNTIME)
def dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_out, dv_out, dk_stride, dv_stride, half_alpha, dk_factor, dv_factor,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    tiles_per_seq, FAMILY: gl.constexpr,
    K_DIM: gl.constexpr, V_DIM: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program a tile of KEYS keys of a head; the first keys see the most queries: longest first."""
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
    )
    index = gl.program_id(0) // tiles_per_seq
    sequence = sequence_of(index, batch)
    key0 = gl.program_id(0) % tiles_per_seq * KEYS
    if key0 < sequence.length:
        dk, dv = stream(
            q_desc, k_desc, v_desc, do_desc, sequence, key0, batch, half_alpha,
            FAMILY, D, KEYS, QUERIES, STAGES, num_warps,
        )  # fmt: skip
        sequence = sequence_of(pinned(index), batch)  # read again: nothing of it waits in registers
        store_rows(dk_out, dk_stride, dk * dk_factor, key0, sequence, K_DIM)
        store_rows(dv_out, dv_stride, dv * dv_factor, key0, sequence, V_DIM)
    elif key0 < sequence.stored:
        layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
        zero = gl.zeros((KEYS, D), gl.float32, layout)
        store_rows(dk_out, dk_stride, zero, key0, sequence, K_DIM)
        store_rows(dv_out, dv_stride, zero, key0, sequence, V_DIM)
