"""HSTU attention forward on Hopper, warp-specialised and persistent (head dims up to 128).

One producer warp streams k and v by TMA; two consumers of four warps own BLOCK_R query rows each and run independently,
so that one's silu and epilogue hide under the other's tensor-core work. (One consumer of eight warps gains nothing: its
halves move in step.)
"""

from hstu_compile.ops.kernels.attention_sm90_schedule import tile_of_ticket
from hstu_compile.ops.kernels.attention_sm90_tiles import (
    RUNTIME,
    Batch,
    live_tile,
    load_tile,
    mask_of,
    matrix,
    sequence_of,
    store_rows,
)
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait
from hstu_compile.ops.kernels.mask_intervals import whole_columns
from hstu_compile.ops.kernels.mask_tiles import key_spans, last_tile, nth_tile, num_tiles, tiles_upto
from hstu_compile.ops.kernels.silu import silu_packed


@gluon.jit
def output_tile(tile, tiles_per_seq, batch, FAMILY: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Sequence, mask, first row and column tiles of an output tile."""
    sequence = sequence_of(tile // tiles_per_seq, batch)
    mask = mask_of(sequence.z, batch)
    row0 = tile % tiles_per_seq * ROWS
    return sequence, mask, row0, key_spans(row0, ROWS, COLS, mask, FAMILY)


@gluon.jit
def hand_over(tile, number, items, item_full, item_empty):
    """The producer says which output tile is next (-1: none)."""
    slot = number % 2
    mbarrier.wait(item_empty.index(slot), ((number // 2) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    items.index(slot).store(gl.full((1,), tile, gl.int32, layout))
    mbarrier.arrive(item_full.index(slot), count=1)


@gluon.jit
def take_over(number, items, item_full, item_empty):
    slot = number % 2
    mbarrier.wait(item_full.index(slot), (number // 2) & 1)
    tile = gl.max(items.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)
    mbarrier.arrive(item_empty.index(slot), count=1)
    return tile


@gluon.jit
def producer(
    q_desc, k_desc, v_desc, batch, q, k, v, bars, items, counter, num_sequences, group, tiles_per_seq, tickets,
    FAMILY: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty = bars
    filled = 0  # k, v tiles so far
    visited = 0  # output tiles so far that load anything
    number = 0  # output tiles so far
    programs = gl.num_programs(0)
    if counter is not None:
        ticket = gl.atomic_add(counter, 1)
    else:
        ticket = gl.program_id(0)
    rounds = 0
    while ticket < tickets:
        tile = tile_of_ticket(ticket, batch, num_sequences, group, tiles_per_seq, 2 * BLOCK_R)
        if tile >= 0:
            hand_over(tile, number, items, item_full, item_empty)
            number += 1
            sequence, mask, row0, spans = output_tile(tile, tiles_per_seq, batch, FAMILY, 2 * BLOCK_R, BLOCK_C)
            if row0 < sequence.length:
                for w in gl.static_range(2):
                    mbarrier.wait(q_empty.index(w), (visited & 1) ^ 1)
                    load_tile(q_desc, sequence, row0 + w * BLOCK_R, q_full.index(w), q.index(w), True)
                visited += 1
                tiles = num_tiles(spans)
                for t in range(0, tiles):
                    slot = filled % STAGES
                    phase = ((filled // STAGES) & 1) ^ 1
                    col0 = nth_tile(tiles - 1 - t, spans) * BLOCK_C
                    mbarrier.wait(k_empty.index(slot), phase)
                    load_tile(k_desc, sequence, col0, k_full.index(slot), k.index(slot), True)
                    mbarrier.wait(v_empty.index(slot), phase)
                    load_tile(v_desc, sequence, col0, v_full.index(slot), v.index(slot), True)
                    filled += 1
        if counter is not None:
            ticket = gl.atomic_add(counter, 1)
        else:  # there and back, so that no program always gets the longest of a round
            rounds += 1
            place = gl.where(rounds % 2 == 0, gl.program_id(0), programs - 1 - gl.program_id(0))
            ticket = rounds * programs + place
    hand_over(-1, number, items, item_full, item_empty)


@gluon.jit
def consumer(
    out, row_stride, half_alpha, factor, batch, q, k, v, bars, items, tiles_per_seq,
    FAMILY: gl.constexpr, DIM: gl.constexpr, D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr, PACKED: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Rows W * BLOCK_R ... of each output tile."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty = bars
    dtype: gl.constexpr = q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_C, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=o_layout, k_width=2)
    q = matrix(q.index(W))
    done = 0  # k, v tiles so far
    visited = 0
    number = 0
    tile = take_over(number, items, item_full, item_empty)
    while tile >= 0:
        number += 1
        sequence, mask, tile_row0, spans = output_tile(tile, tiles_per_seq, batch, FAMILY, 2 * BLOCK_R, BLOCK_C)
        row0 = tile_row0 + W * BLOCK_R
        acc = gl.zeros((BLOCK_R, D), dtype=gl.float32, layout=o_layout)
        if tile_row0 < sequence.length:
            mbarrier.wait(q_full.index(W), visited & 1)
            visited += 1
            tiles = num_tiles(spans)
            skipped = tiles - tiles_upto(last_tile(key_spans(row0, BLOCK_R, BLOCK_C, mask, FAMILY)), spans)
            for _ in range(0, skipped):  # tiles of the other consumer alone
                slot = done % STAGES
                phase = (done // STAGES) & 1
                mbarrier.wait(k_full.index(slot), phase)
                mbarrier.arrive(k_empty.index(slot), count=1)
                mbarrier.wait(v_full.index(slot), phase)
                mbarrier.arrive(v_empty.index(slot), count=1)
                done += 1
            if skipped < tiles:
                whole = whole_columns(row0, BLOCK_R, mask, FAMILY, False)
                zero = gl.zeros((BLOCK_R, BLOCK_C), dtype=gl.float32, layout=s_layout)
                mbarrier.wait(k_full.index(done % STAGES), (done // STAGES) & 1)
                k_tile = matrix(k.index(done % STAGES))
                s = warpgroup_mma(q, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
                mbarrier.arrive(k_empty.index(done % STAGES), count=1)
                col0 = nth_tile(tiles - 1 - skipped, spans) * BLOCK_C
                p = silu_packed(s * half_alpha, PACKED)
                if (col0 < whole[0]) | (col0 + BLOCK_C > whole[1]):
                    p = gl.where(live_tile(p, row0, col0, sequence.z, batch, FAMILY, False), p, 0.0)
                p = gl.convert_layout(p.to(dtype), p_layout)
                for t in range(skipped + 1, tiles):
                    col0 = nth_tile(tiles - 1 - t, spans) * BLOCK_C
                    this = done % STAGES
                    nxt = (done + 1) % STAGES
                    mbarrier.wait(k_full.index(nxt), ((done + 1) // STAGES) & 1)
                    k_tile = matrix(k.index(nxt))
                    s = warpgroup_mma(q, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
                    mbarrier.wait(v_full.index(this), (done // STAGES) & 1)
                    acc = warpgroup_mma(p, matrix(v.index(this)), acc, is_async=True)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    mbarrier.arrive(k_empty.index(nxt), count=1)
                    r = silu_packed(s * half_alpha, PACKED)
                    if (col0 < whole[0]) | (col0 + BLOCK_C > whole[1]):
                        r = gl.where(live_tile(r, row0, col0, sequence.z, batch, FAMILY, False), r, 0.0)
                    r = gl.convert_layout(r.to(dtype), p_layout)
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    mbarrier.arrive(v_empty.index(this), count=1)
                    p = r
                    done += 1
                mbarrier.arrive(q_empty.index(W), count=1)  # the next q loads under the last product and the store
                mbarrier.wait(v_full.index(done % STAGES), (done // STAGES) & 1)
                acc = warpgroup_mma(p, matrix(v.index(done % STAGES)), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(v_empty.index(done % STAGES), count=1)
                done += 1
            else:
                mbarrier.arrive(q_empty.index(W), count=1)
        if row0 < sequence.stored:
            store_rows(out, row_stride, acc * factor, row0, sequence, DIM)
        tile = take_over(number, items, item_full, item_empty)


@gluon.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    q_desc, k_desc, v_desc, out, row_stride, half_alpha, factor,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    counter, num_sequences, group, tiles_per_seq, tickets, FAMILY: gl.constexpr,
    DIM: gl.constexpr, D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """out = factor * silu(q kT) v over the live cells; programs share the output tiles of 2 * BLOCK_R rows."""
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
    )
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_R, 1, D], q_desc.layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_C, 1, D], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_C, 1, D], v_desc.layout)
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for w in gl.static_range(2):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_empty.index(w), count=1)
        mbarrier.init(item_full.index(w), count=1)
        mbarrier.init(item_empty.index(w), count=2)  # both consumers take it
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)  # both consumers release a tile
        mbarrier.init(v_empty.index(i), count=2)
    bars = (q_full, q_empty, k_full, k_empty, v_full, v_empty, item_full, item_empty)
    # Twelve warps of 168 registers: 240 for each thread of the consumers, 24 for the producer's.
    gl.warp_specialize(
        [
            (consumer, (out, row_stride, half_alpha, factor, batch, q, k, v, bars, items, tiles_per_seq,
                        FAMILY, DIM, D, BLOCK_R, BLOCK_C, STAGES, PACKED, 0)),
            (consumer, (out, row_stride, half_alpha, factor, batch, q, k, v, bars, items, tiles_per_seq,
                        FAMILY, DIM, D, BLOCK_R, BLOCK_C, STAGES, PACKED, 1)),
            (producer, (q_desc, k_desc, v_desc, batch, q, k, v, bars, items, counter, num_sequences, group,
                        tiles_per_seq, tickets, FAMILY, BLOCK_R, BLOCK_C, STAGES)),
        ],
        [4, 1],
        REGISTERS,
    )  # fmt: skip
