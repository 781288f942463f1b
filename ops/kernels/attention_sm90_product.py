"""One product of HSTU attention on Hopper with resident queries: the forward, or dq.

Without a softmax, the gradient is the forward with other operands:

    out = f(q kT) v              dq = (f'(q kT) * (do vT)) k

Each program owns its output rows, so there are no atomics on results. P stays in registers as the A operand of the
second product. Tiles come as attention_sm90_pipeline says.
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
    loaded,
    meets_any,
    operand,
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
from hstu_compile.ops.kernels.attention_sm90_tiles import (
    RUNTIME,
    Batch,
    cached_at,
    live_tile,
    pinned,
    sequence_of,
    store_rows,
)
from hstu_compile.ops.kernels.early_launch import wait_for_previous
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from hstu_compile.ops.kernels.mask_tiles import num_tiles
from hstu_compile.ops.kernels.silu import silu, silu_and_grad


@gluon.jit
def pointwise(
    s, half_alpha, bias, row0, col0, border, sequence, batch, pairs, FAMILY: gl.constexpr, GRAD: gl.constexpr
):  # fmt: skip
    """silu(alpha * s + bias), or its derivative; of a tile at a border, times the mask tensor and 0 in dead cells."""
    PLAIN: gl.constexpr = pairs.bias.ptr is None and pairs.mask.ptr is None
    h = half_argument(s, half_alpha, bias)
    if border & (not PLAIN):
        h = masked(h, row0, col0, sequence, batch, pairs, FAMILY, False)
    if GRAD:
        x = silu_and_grad(h, True)[1]
    else:
        x = silu(h, True)
    if border:
        if PLAIN:  # a mask before silu takes fewer registers, but 2 to 4 % of the time at head dims up to 128
            x = gl.where(live_tile(x, row0, col0, sequence.z, batch, FAMILY, False), x, 0.0)
        else:
            x = weighted(x, load_weight_if(False, pairs, x, row0, col0, sequence, batch, False))
    return x


@gluon.jit
def silu_rounds(
    acc, first, tiles, spans, lists, cached, row0, done, whole, half_alpha, sequence, batch, pairs, a, b, c,
    FAMILY: gl.constexpr, COLS: gl.constexpr, B_STAGES: gl.constexpr, C_STAGES: gl.constexpr,
    IN_REGISTERS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """acc + f(a bT) c over the streamed tiles from `first` on, each tile's product under the scores of the next."""
    dtype: gl.constexpr = a.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=s_layout)
    # First tile: nothing to overlap with yet.
    col0, ones = streamed_row(first, tiles, spans, lists, cached, COLS, False)
    b_tile = wait_full(b, done, B_STAGES)
    a_rows = loaded(a.tiles, W, s_layout, IN_REGISTERS)
    a_tile = operand(a.tiles, a_rows, W, IN_REGISTERS)
    s = warpgroup_mma(a_tile, b_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    bias = load_bias(pairs, zero, row0, col0, sequence, batch, False)
    s = warpgroup_mma_wait(0, deps=(s,))
    release(b, done, B_STAGES)
    border = at_border(col0, COLS, ones, whole)
    x = pointwise(s, half_alpha, bias, row0, col0, border, sequence, batch, pairs, FAMILY, False)
    # x goes from round to round in 32 bits: of 16 bits, ptxas would pack the registers again, one by one, between the
    # products.
    for t in range(first + 1, tiles):
        col0, ones = streamed_row(t, tiles, spans, lists, cached, COLS, False)
        p = gl.convert_layout(x.to(dtype), p_layout)
        a_tile = operand(a.tiles, a_rows, W, IN_REGISTERS)
        b_next = wait_full(b, done + 1, B_STAGES)
        s = warpgroup_mma(a_tile, b_next.permute((1, 0)), zero, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, wait_full(c, done, C_STAGES), acc, is_async=True)
        next_bias = load_bias(pairs, zero, row0, col0, sequence, batch, False)
        s = warpgroup_mma_wait(1, deps=(s,))
        release(b, done + 1, B_STAGES)
        border = at_border(col0, COLS, ones, whole)
        x = pointwise(s, half_alpha, next_bias, row0, col0, border, sequence, batch, pairs, FAMILY, False)
        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
        release(c, done, C_STAGES)
        done += 1
    mbarrier.arrive(a.empty.index(W), count=1)  # the next a loads under the last product and the store
    p = gl.convert_layout(x.to(dtype), p_layout)
    acc = warpgroup_mma(p, wait_full(c, done, C_STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    release(c, done, C_STAGES)
    return acc, done + 1


@gluon.jit
def grad_rounds(
    acc, first, tiles, spans, lists, cached, row0, done, whole, half_alpha, sequence, batch, pairs, a, da, b, c,
    FAMILY: gl.constexpr, COLS: gl.constexpr, B_STAGES: gl.constexpr, C_STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """acc + (f'(a bT) * (da cT)) b over the streamed tiles from `first` on.

    One round after the other: the other consumer's products, three a round, are enough to work under.
    """
    dtype: gl.constexpr = a.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    # Whether dp is asked for before silu': with a bias or a mask tensor it would spill.
    EARLY: gl.constexpr = pairs.bias.ptr is None and pairs.mask.ptr is None
    # Whether the mask waits for dp: while that is on its way, wide sums leave it no registers.
    LATE: gl.constexpr = EARLY and acc.shape[1] > 128
    zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=s_layout)
    for t in range(first, tiles):
        col0, ones = streamed_row(t, tiles, spans, lists, cached, COLS, False)
        b_tile = wait_full(b, done, B_STAGES)
        s = warpgroup_mma(resident(a.tiles, W), b_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        if EARLY:
            c_tile = wait_full(c, done, C_STAGES)
            dp = warpgroup_mma(resident(da, W), c_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        bias = load_bias(pairs, zero, row0, col0, sequence, batch, False)
        s = warpgroup_mma_wait(1 if EARLY else 0, deps=(s,))
        border = at_border(col0, COLS, ones, whole)
        g = pointwise(s, half_alpha, bias, row0, col0, border & (not LATE), sequence, batch, pairs, FAMILY, True)
        if not EARLY:
            c_tile = wait_full(c, done, C_STAGES)
            dp = warpgroup_mma(resident(da, W), c_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(0, deps=(dp,))
        release(c, done, C_STAGES)
        ds = g * dp
        if border & LATE:
            ds = gl.where(live_tile(ds, row0, col0, sequence.z, batch, FAMILY, False), ds, 0.0)
        ds = gl.convert_layout(ds.to(dtype), p_layout)
        acc = warpgroup_mma(ds, b_tile, acc, is_async=True)
        acc, ds = warpgroup_mma_wait(0, deps=(acc, ds))
        release(b, done, B_STAGES)
        done += 1
    mbarrier.arrive(a.empty.index(W), count=1)
    return acc, done


@gluon.jit
def consumer(
    out, half_alpha, factor, batch, pairs, a, da, b, c, queue, tiles_per_seq,
    FAMILY: gl.constexpr, DIM: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr,
    B_STAGES: gl.constexpr, C_STAGES: gl.constexpr, GRAD: gl.constexpr,
    IN_REGISTERS: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Rows W * ROWS ... of each output tile."""
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    done = 0  # b, c tiles so far
    number = 0  # output tiles so far
    tile = take_over(number, queue)
    while tile >= 0:
        sequence, mask, tile_row0, spans = output_tile(tile, tiles_per_seq, batch, pairs, FAMILY, 2 * ROWS, COLS, False)
        lists = lists_of(pairs, tile, tiles_per_seq, batch, COLS)
        cached = cached_at(sequence.z, batch)
        row0 = tile_row0 + W * ROWS
        acc = gl.zeros((ROWS, D), dtype=gl.float32, layout=o_layout)
        first = 0
        tiles = 0
        if meets_any(tile_row0, sequence, spans, lists):
            tiles = num_tiles(spans)
            first = own_tiles(row0, mask, tiles, spans, lists, cached, FAMILY, COLS, False)
            done = skip(b, c, done, first, B_STAGES, C_STAGES)
        mbarrier.wait(a.full.index(W), number & 1)
        if first < tiles:
            whole = whole_tiles(row0, mask, pairs, FAMILY, False)
            if GRAD:
                acc, done = grad_rounds(
                    acc, first, tiles, spans, lists, cached, row0, done, whole, half_alpha, sequence, batch, pairs,
                    a, da, b, c, FAMILY, COLS, B_STAGES, C_STAGES, W,
                )  # fmt: skip
            else:
                acc, done = silu_rounds(
                    acc, first, tiles, spans, lists, cached, row0, done, whole, half_alpha, sequence, batch, pairs,
                    a, b, c, FAMILY, COLS, B_STAGES, C_STAGES, IN_REGISTERS, W,
                )  # fmt: skip
        else:
            mbarrier.arrive(a.empty.index(W), count=1)
        if lists is not None:  # read again: nothing of it waits in registers
            sequence = sequence_of(pinned(sequence.z * batch.num_heads + sequence.head), batch)
        if row0 < sequence.stored:
            store_rows(out, acc * factor, row0, sequence, DIM)
        number += 1
        tile = take_over(number, queue)


@gluon.jit(do_not_specialize=RUNTIME)
def product_kernel(
    a_desc, da_desc, b_desc, c_desc, pool_desc, pages, out, half_alpha, factor,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    pairs, counter, num_sequences, group, tiles_per_seq, slots_per_seq, num_tickets, heads_a_ticket,
    parts,
    FAMILY: gl.constexpr,
    DIM: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, B_STAGES: gl.constexpr, C_STAGES: gl.constexpr,
    GRAD: gl.constexpr, IN_REGISTERS: gl.constexpr, REGISTERS: gl.constexpr, BEGINS_EARLY: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """out[rows] = factor * sum over the streamed tiles of  GRAD ? (f'(a bT) * (da cT)) b : f(a bT) c.

    pages: where streamed rows that lie before those of b and c are (paged_attention_sm90.py), or None. Each of `parts`
    programs sums over a part of the streamed tiles then, and has a result of its own. BEGINS_EARLY: early_launch.py.
    """
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
        parts,
    )  # fmt: skip
    tickets = Tickets(counter, num_sequences, group, tiles_per_seq, slots_per_seq, num_tickets, heads_a_ticket)
    a = ring(a_desc, 2, 2 if GRAD else 1, 1)  # a stage a consumer
    if GRAD:
        da = gl.allocate_shared_memory(a_desc.dtype, a.tiles.shape, da_desc.layout)
    else:
        da = a.tiles
    b = ring(b_desc, B_STAGES, 1, 2)  # both consumers release a tile
    c = ring(c_desc, C_STAGES, 1, 2)
    queue = tile_queue(3)  # two consumers, the producer
    if BEGINS_EARLY:
        wait_for_previous()
    # Twelve warps of 168 registers, for each thread of the consumers REGISTERS and of the others what is left.
    gl.warp_specialize(
        [
            (consumer, (out, half_alpha, factor, batch, pairs, a, da, b, c, queue, tiles_per_seq,
                        FAMILY, DIM, D, COLS, B_STAGES, C_STAGES, GRAD, IN_REGISTERS, 0)),
            (consumer, (out, half_alpha, factor, batch, pairs, a, da, b, c, queue, tiles_per_seq,
                        FAMILY, DIM, D, COLS, B_STAGES, C_STAGES, GRAD, IN_REGISTERS, 1)),
            (producer, (a_desc, da_desc, b_desc, c_desc, pool_desc, pages, batch, pairs, a, da, b, c, queue,
                        tiles_per_seq, FAMILY, COLS, B_STAGES, C_STAGES, 2, GRAD, False)),
            (scheduler, (batch, queue, tickets, 2 * ROWS, False)),
        ],
        [4, 1, 1],
        [REGISTERS, 504 - 2 * REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip
