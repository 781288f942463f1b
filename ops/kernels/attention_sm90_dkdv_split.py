"""dk and dv of HSTU attention on Hopper in one kernel at head dim 256, where they fill the registers of two consumers.

A program owns ROWS keys. One consumer makes s = k qT, p = f(s) and dv += p do, the other dp = v doT, ds = f'(s) * dp
and dk += ds q: four matrix products, with f'(s) handed over in shared memory. As in attention_sm90_dkdv the scores are
[keys, queries], so that p and ds stay in registers. Tiles come as attention_sm90_pipeline says.
"""

from hstu_compile.ops.kernels.attention_sm90_dkdv import pointwise
from hstu_compile.ops.kernels.attention_sm90_pairs import lists_of, load_bias
from hstu_compile.ops.kernels.attention_sm90_pipeline import (
    ROWS,
    at_border,
    meets_any,
    output_tile,
    producer,
    release,
    resident,
    ring,
    streamed_row,
    wait_full,
    whole_tiles,
)
from hstu_compile.ops.kernels.attention_sm90_schedule import Tickets, scheduler, take_over, tile_queue
from hstu_compile.ops.kernels.attention_sm90_tiles import RUNTIME, Batch, barriers, store_rows
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from hstu_compile.ops.kernels.mask_tiles import num_tiles


@gluon.jit
def dv_consumer(
    dv_out, half_alpha, factor, batch, pairs, k, q, do, grads, grad_bars, queue, tiles_per_seq,
    FAMILY: gl.constexpr, DIM: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    grad_full, grad_empty = grad_bars
    done = 0  # q, do tiles so far
    number = 0  # output tiles so far
    tile = take_over(number, queue)
    while tile >= 0:
        sequence, mask, key0, spans = output_tile(tile, tiles_per_seq, batch, pairs, FAMILY, ROWS, COLS, True)
        lists = lists_of(pairs, tile, tiles_per_seq, batch, COLS)
        dv = gl.zeros((ROWS, D), dtype=gl.float32, layout=kv_layout)
        mbarrier.wait(k.full.index(0), number & 1)
        if meets_any(key0, sequence, spans, lists):
            whole = whole_tiles(key0, mask, pairs, FAMILY, True)
            tiles = num_tiles(spans)
            zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=s_layout)
            for t in range(0, tiles):
                query0, ones = streamed_row(t, tiles, spans, lists, None, COLS, True)
                q_tile = wait_full(q, done, STAGES)
                s = warpgroup_mma(resident(k.tiles, 0), q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                bias = load_bias(pairs, zero, key0, query0, sequence, batch, True)
                s = warpgroup_mma_wait(0, deps=(s,))
                release(q, done, STAGES)
                border = at_border(query0, COLS, ones, whole)
                x, g = pointwise(s, half_alpha, bias, key0, query0, border, sequence, batch, pairs, FAMILY, dtype)
                mbarrier.wait(grad_empty.index(0), (done & 1) ^ 1)
                grads.store(g)
                mbarrier.arrive(grad_full.index(0), count=1)
                p = gl.convert_layout(x, p_layout)
                dv = warpgroup_mma(p, wait_full(do, done, STAGES), dv, is_async=True)
                dv, p = warpgroup_mma_wait(0, deps=(dv, p))
                release(do, done, STAGES)
                done += 1
        mbarrier.arrive(k.empty.index(0), count=1)
        store_rows(dv_out, dv * factor, key0, sequence, DIM)
        number += 1
        tile = take_over(number, queue)


@gluon.jit
def dk_consumer(
    dk_out, factor, batch, pairs, k, v, q, do, grads, grad_bars, queue, tiles_per_seq,
    FAMILY: gl.constexpr, DIM: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    grad_full, grad_empty = grad_bars
    done = 0  # q, do tiles so far
    number = 0  # output tiles so far
    tile = take_over(number, queue)
    while tile >= 0:
        sequence, mask, key0, spans = output_tile(tile, tiles_per_seq, batch, pairs, FAMILY, ROWS, COLS, True)
        lists = lists_of(pairs, tile, tiles_per_seq, batch, COLS)
        dk = gl.zeros((ROWS, D), dtype=gl.float32, layout=kv_layout)
        mbarrier.wait(k.full.index(0), number & 1)
        if meets_any(key0, sequence, spans, lists):
            tiles = num_tiles(spans)
            zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=s_layout)
            for _ in range(0, tiles):
                do_tile = wait_full(do, done, STAGES)
                dp = warpgroup_mma(resident(v, 0), do_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                dp = warpgroup_mma_wait(0, deps=(dp,))
                release(do, done, STAGES)
                mbarrier.wait(grad_full.index(0), done & 1)
                ds = gl.convert_layout((grads.load(s_layout) * dp).to(dtype), p_layout)
                mbarrier.arrive(grad_empty.index(0), count=1)
                dk = warpgroup_mma(ds, wait_full(q, done, STAGES), dk, is_async=True)
                dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
                release(q, done, STAGES)
                done += 1
        mbarrier.arrive(k.empty.index(0), count=1)
        store_rows(dk_out, dk * factor, key0, sequence, DIM)
        number += 1
        tile = take_over(number, queue)


@gluon.jit(do_not_specialize=RUNTIME)
def dkdv_split_kernel(
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
    k = ring(k_desc, 1, 2, 2)
    v = gl.allocate_shared_memory(k_desc.dtype, k.tiles.shape, v_desc.layout)
    q = ring(q_desc, STAGES, 1, 2)
    do = ring(do_desc, STAGES, 1, 2)
    # Swizzled so that eight rows, 32 bytes of each, are all banks once.
    grads = gl.allocate_shared_memory(gl.float32, [ROWS, COLS], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    grad_bars = barriers(1, 1, 1)
    queue = tile_queue(3)  # two consumers, the producer
    # Twelve warps of 168 registers: 240 for each thread of the consumers, 24 of the others.
    gl.warp_specialize(
        [
            (dv_consumer, (dv_out, half_alpha, dv_factor, batch, pairs, k, q, do, grads, grad_bars, queue,
                           tiles_per_seq, FAMILY, V_DIM, D, COLS, STAGES)),
            (dk_consumer, (dk_out, dk_factor, batch, pairs, k, v, q, do, grads, grad_bars, queue,
                           tiles_per_seq, FAMILY, K_DIM, D, COLS, STAGES)),
            (producer, (k_desc, v_desc, q_desc, do_desc, None, None, batch, pairs, k, v, q, do, queue, tiles_per_seq,
                        FAMILY, COLS, STAGES, STAGES, 1, True, True)),
            (scheduler, (batch, queue, tickets, ROWS, True)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
