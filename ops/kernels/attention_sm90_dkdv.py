"""dk and dv of HSTU attention on Hopper in one kernel. (Head dims up to 128: at 256 they fill the registers.)

A consumer owns ROWS keys and streams q and do. The scores are computed transposed, [keys, queries], so that p and ds
come out of the tensor cores in the layout in which dv += pT do and dk += dsT q want their A operand, without a trip
through shared memory. Tiles come as attention_sm90_pipeline says: a, da, b, c are k, v, q, do.
"""

from hstu_compile.ops.kernels.attention_sm90_pairs import (
    half_argument,
    lists_of,
    load_bias,
    load_weight_if,
    masked,
    weighted,
)
from hstu_compile.ops.kernels.attention_sm90_pipeline import (
    ROWS,
    at_border,
    meets_any,
    output_tile,
    own_tiles,
    producer,
    release,
    resident,
    ring,
    skip,
    streamed_row,
    wait_full,
    whole_tiles,
)
from hstu_compile.ops.kernels.attention_sm90_schedule import Tickets, scheduler, take_over, tile_queue
from hstu_compile.ops.kernels.attention_sm90_tiles import RUNTIME, Batch, store_rows
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from hstu_compile.ops.kernels.mask_tiles import num_tiles
from hstu_compile.ops.kernels.silu import silu_and_grad


@gluon.jit
def both_weighted(x, g, weight):
    if weight is None:
        return x, g
    else:
        return weighted(x.to(gl.float32), weight).to(x.dtype), weighted(g, weight)


@gluon.jit
def pointwise(
    s, half_alpha, bias, key0, query0, border, sequence, batch, pairs, FAMILY: gl.constexpr, DTYPE: gl.constexpr
):  # fmt: skip
    """silu(alpha * s + bias), rounded, and its derivative; at a border, times the mask tensor and 0 in dead cells."""
    h = half_argument(s, half_alpha, bias)
    if border:
        h = masked(h, key0, query0, sequence, batch, pairs, FAMILY, True)
    x, g = silu_and_grad(h, True)
    x = x.to(DTYPE)
    if border:
        x, g = both_weighted(x, g, load_weight_if(False, pairs, g, key0, query0, sequence, batch, True))
    return x, g


@gluon.jit
def consumer(
    dk_out, dv_out, half_alpha, dk_factor, dv_factor, batch, pairs, k, v, q, do, queue,
    tiles_per_seq, FAMILY: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr,
    STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Keys W * ROWS ... of each output tile."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    dtype: gl.constexpr = q.tiles.dtype
    # Whether dp is asked for before silu: with a bias or a mask tensor it would spill.
    EARLY: gl.constexpr = pairs.bias.ptr is None and pairs.mask.ptr is None
    done = 0  # q, do tiles so far
    number = 0  # output tiles so far
    tile = take_over(number, queue)
    while tile >= 0:
        sequence, mask, tile_key0, spans = output_tile(tile, tiles_per_seq, batch, pairs, FAMILY, 2 * ROWS, COLS, True)
        lists = lists_of(pairs, tile, tiles_per_seq, batch, COLS)
        key0 = tile_key0 + W * ROWS
        dk = gl.zeros((ROWS, D), dtype=gl.float32, layout=kv_layout)
        dv = gl.zeros((ROWS, D), dtype=gl.float32, layout=kv_layout)
        first = 0
        tiles = 0
        if meets_any(tile_key0, sequence, spans, lists):
            tiles = num_tiles(spans)
            first = own_tiles(key0, mask, tiles, spans, lists, None, FAMILY, COLS, True)
            done = skip(q, do, done, first, STAGES, STAGES)
        whole = whole_tiles(key0, mask, pairs, FAMILY, True)
        zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=s_layout)
        mbarrier.wait(k.full.index(W), number & 1)
        for t in range(first, tiles):
            query0, ones = streamed_row(t, tiles, spans, lists, None, COLS, True)
            q_tile = wait_full(q, done, STAGES)
            s = warpgroup_mma(resident(k.tiles, W), q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            do_tile = wait_full(do, done, STAGES)
            if EARLY:
                dp = warpgroup_mma(resident(v, W), do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            bias = load_bias(pairs, zero, key0, query0, sequence, batch, True)
            s = warpgroup_mma_wait(1 if EARLY else 0, deps=(s,))
            border = at_border(query0, COLS, ones, whole)
            x, g = pointwise(s, half_alpha, bias, key0, query0, border, sequence, batch, pairs, FAMILY, dtype)
            p = gl.convert_layout(x, p_layout)
            if not EARLY:
                dp = warpgroup_mma(resident(v, W), do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
            dv = warpgroup_mma(p, do_tile, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = gl.convert_layout((g * dp).to(dtype), p_layout)
            dk = warpgroup_mma(ds, q_tile, dk, is_async=True)
            dv, p = warpgroup_mma_wait(1, deps=(dv, p))
            release(do, done, STAGES)
            dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
            release(q, done, STAGES)
            done += 1
        mbarrier.arrive(k.empty.index(W), count=1)
        if key0 < sequence.stored:
            store_rows(dk_out, dk * dk_factor, key0, sequence, K_DIM)
            store_rows(dv_out, dv * dv_factor, key0, sequence, V_DIM)
        number += 1
        tile = take_over(number, queue)


@gluon.jit(do_not_specialize=RUNTIME)
def dkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, dk_out, dv_out, half_alpha, dk_factor, dv_factor,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    pairs, counter, num_sequences, group, tiles_per_seq, slots_per_seq, num_tickets, heads_a_ticket,
    FAMILY: gl.constexpr,
    K_DIM: gl.constexpr, V_DIM: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len, 1
    )
    tickets = Tickets(counter, num_sequences, group, tiles_per_seq, slots_per_seq, num_tickets, heads_a_ticket)
    k = ring(k_desc, 2, 2, 1)  # a stage a consumer
    v = gl.allocate_shared_memory(k_desc.dtype, k.tiles.shape, v_desc.layout)
    q = ring(q_desc, STAGES, 1, 2)  # both consumers release a tile
    do = ring(do_desc, STAGES, 1, 2)
    queue = tile_queue(3)  # two consumers, the producer
    # Twelve warps of 168 registers: 240 for each thread of the consumers, 24 of the others.
    gl.warp_specialize(
        [
            (consumer, (dk_out, dv_out, half_alpha, dk_factor, dv_factor, batch, pairs, k, v, q,
                        do, queue, tiles_per_seq, FAMILY, K_DIM, V_DIM, D, COLS, STAGES, 0)),
            (consumer, (dk_out, dv_out, half_alpha, dk_factor, dv_factor, batch, pairs, k, v, q,
                        do, queue, tiles_per_seq, FAMILY, K_DIM, V_DIM, D, COLS, STAGES, 1)),
            (producer, (k_desc, v_desc, q_desc, do_desc, None, None, batch, pairs, k, v, q, do, queue, tiles_per_seq,
                        FAMILY, COLS, STAGES, STAGES, 2, True, True)),
            (scheduler, (batch, queue, tickets, 2 * ROWS, True)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
