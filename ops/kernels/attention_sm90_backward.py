"""The backward of HSTU attention on Hopper as five matrix products in one kernel, deterministic. (Head dims up to 64.)

A program owns 2 * ROWS keys and streams q and do. Two partitions of four warps own ROWS keys each: their scores are
transposed, [keys, queries], so that p and ds come out of the tensor cores in the layout in which dv += pT do and
dk += dsT q want their A operand. ds also goes to shared memory, where a third partition makes dq = ds k of it; the same
one loads the tiles. The partitions run independently, so that what one waits for hides under the others' products.

The programs add to a tile of dq one after another, from the last key tile that visits it to the first: a counter per
tile says how many have. Programs start in that order, hence wait only for programs that run, and as the diagonal comes
first, the one above is always ahead. The first stores, the last rounds and writes dq: nothing to zero, nothing to
convert.
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.attention_sm90_pipeline import ROWS
from hstu_compile.ops.kernels.attention_sm90_tiles import (
    NOWHERE,
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
from hstu_compile.ops.kernels.gluon_compat import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    thread_barrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hstu_compile.ops.kernels.mask_intervals import whole_columns
from hstu_compile.ops.kernels.mask_tiles import nth_tile, num_tiles, query_spans
from hstu_compile.ops.kernels.mask_visits import BELOW, is_plain, plain_visits, visits
from hstu_compile.ops.kernels.silu import silu_and_grad_packed, times_packed
from hstu_compile.ops.kernels.slots import tile_of_program


class Buffers(NamedTuple):
    """In shared memory."""

    k: Any  # [2], one a partition of keys
    v: Any
    q: Any  # [STAGES]
    do: Any
    ds: Any  # [2 * 2]: of two tiles, of each partition


class Bars(NamedTuple):
    """What the partitions wait for."""

    resident: Any  # k and v
    full: Any  # [STAGES] q and do
    empty: Any
    ds_full: Any  # [2 * 2]
    ds_empty: Any  # [2]


class Sums(NamedTuple):
    """What the programs that add to a tile of dq share."""

    tiles: Any  # fp32
    added: Any  # how many have added


@gluon.jit
def key_tile_of(num_sequences, slots_per_seq, batch):
    """Number of the head and of its key tile that this program owns; they descend."""
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    z, head, tile, tiles = tile_of_program(
        batch.num_heads, num_sequences, batch.each.seq_offsets, slots_per_seq, lanes, 2 * ROWS
    )
    return z * batch.num_heads + head, gl.where(tile < tiles, tiles - 1 - tile, tiles)


@gluon.jit
def scores(buffers, slot, zero, W: gl.constexpr):
    """k qT, under way."""
    k = matrix(buffers.k.index(pinned(W)))
    q = matrix(buffers.q.index(slot))
    return warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def value_products(buffers, slot, p, dv, zero, W: gl.constexpr):
    """dv + pT do and v doT, under way; the second is the first to come."""
    v = matrix(buffers.v.index(pinned(W)))
    do = matrix(buffers.do.index(slot))
    dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
    return warpgroup_mma(p, do, dv, is_async=True), dp


@gluon.jit
def masked_silu(s, half_alpha, key0, query0, whole, z, batch, FAMILY: gl.constexpr, dtype: gl.constexpr):
    """silu and its derivative of the live cells, 0 elsewhere."""
    h = s * half_alpha
    if (query0 < whole[0]) | (query0 + s.shape[1] > whole[1]):
        h = gl.where(live_tile(s, pinned(key0), query0, z, batch, FAMILY, True), h, NOWHERE)
    return silu_and_grad_packed(h, dtype)


@gluon.jit
def hand_over(ds, buffers, bars, t, W: gl.constexpr):
    """ds to the partition that makes dq of it."""
    mbarrier.wait(bars.ds_empty.index(t % 2), ((t // 2) & 1) ^ 1)
    buffers.ds.index(t % 2 * 2 + W).store(ds)
    fence_async_shared()
    mbarrier.arrive(bars.ds_full.index(t % 2 * 2 + W), count=1)


@gluon.jit
def key_partition(
    dk_out, dv_out, half_alpha, dk_factor, dv_factor, batch, index, key_tile,
    buffers, bars, FAMILY: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, D: gl.constexpr,
    COLS: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """dk and dv of half W of the keys; ds for the third partition."""
    dtype: gl.constexpr = buffers.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    kv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=kv_layout, k_width=2)
    sequence = sequence_of(index, batch)
    key0 = key_tile * 2 * ROWS + W * ROWS
    dk = gl.zeros((ROWS, D), dtype=gl.float32, layout=kv_layout)
    dv = gl.zeros((ROWS, D), dtype=gl.float32, layout=kv_layout)
    if key_tile * 2 * ROWS < sequence.length:
        mask = mask_of(sequence.z, batch, FAMILY)
        spans = query_spans(key_tile * 2 * ROWS, COLS, 2 * ROWS, mask, FAMILY)
        whole = whole_columns(key0, ROWS, mask, FAMILY, True)
        tiles = num_tiles(spans)
        zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=s_layout)
        mbarrier.wait(bars.resident, 0)
        for t in range(0, tiles):
            slot = t % STAGES
            query0 = nth_tile(t, spans) * COLS
            mbarrier.wait(bars.full.index(slot), (t // STAGES) & 1)
            s = warpgroup_mma_wait(0, deps=(scores(buffers, slot, zero, W),))
            p, g = masked_silu(s, half_alpha, key0, query0, whole, sequence.z, batch, FAMILY, dtype)
            p = gl.convert_layout(p, p_layout)
            dv, dp = value_products(buffers, slot, p, dv, zero, W)
            dp = warpgroup_mma_wait(1, deps=(dp,))
            ds = times_packed(g, dp, dtype)
            hand_over(ds, buffers, bars, t, W)
            ds = gl.convert_layout(ds, p_layout)
            dk = warpgroup_mma(ds, matrix(buffers.q.index(slot)), dk, is_async=True)
            dv, dk, p, ds = warpgroup_mma_wait(0, deps=(dv, dk, p, ds))
            mbarrier.arrive(bars.empty.index(slot), count=1)
        sequence = sequence_of(pinned(index), batch)  # read again: nothing of it waits in registers
        store_rows(dk_out, dk * dk_factor, key0, sequence, K_DIM)
        store_rows(dv_out, dv * dv_factor, key0, sequence, V_DIM)
    elif key0 < sequence.stored:
        store_rows(dk_out, dk, key0, sequence, K_DIM)
        store_rows(dv_out, dv, key0, sequence, V_DIM)


@gluon.jit
def turn_of(query_tile, key_tile, mask, tiles_per_seq, ROWS: gl.constexpr, COLS: gl.constexpr, FAMILY: gl.constexpr):
    """How many programs add to the query tile before this one, and how many after it."""
    if is_plain(FAMILY):
        before, after = plain_visits(query_tile, key_tile, mask.length, ROWS, COLS, FAMILY)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        before = 0
        after = 0
        for first in range(0, tiles_per_seq, 128):
            others = first + gl.arange(0, 128, layout=layout)
            count = gl.sum(visits(others, query_tile, key_tile, mask, ROWS, COLS, FAMILY), 0)
            before += count % BELOW
            after += count // BELOW
    return before, after


@gluon.jit
def wait_until(counter, count):
    """Until so many programs have added; what they wrote is then visible."""
    address = counter.to(gl.int64, bitcast=True)
    seen = count - 1
    while seen < count:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
        )
    thread_barrier()


@gluon.jit
def query_partition(
    q_desc, k_desc, v_desc, do_desc, dq_out, dq_factor, batch, index, key_tile, tiles_per_seq,
    sums, buffers, bars, FAMILY: gl.constexpr, DIM: gl.constexpr, D: gl.constexpr,
    COLS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads; adds dq in parts of 64 queries."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    sequence = sequence_of(index, batch)
    key0 = key_tile * 2 * ROWS
    zero = gl.zeros((64, D), dtype=gl.float32, layout=layout)
    if key0 < sequence.length:
        mask = mask_of(sequence.z, batch, FAMILY)
        spans = query_spans(key0, COLS, 2 * ROWS, mask, FAMILY)
        tiles = num_tiles(spans)
        for w in gl.static_range(2):
            load_tile(k_desc, sequence, key0 + w * ROWS, bars.resident, buffers.k.index(w), True)
            load_tile(v_desc, sequence, key0 + w * ROWS, bars.resident, buffers.v.index(w), True)
        for i in gl.static_range(STAGES):
            row = nth_tile(i, spans) * COLS
            load_tile(q_desc, sequence, row, bars.full.index(i), buffers.q.index(i), i < tiles)
            load_tile(do_desc, sequence, row, bars.full.index(i), buffers.do.index(i), i < tiles)
        rows = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        cols = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
        first_sum = sequence.out_row // COLS + sequence.z
        mbarrier.wait(bars.resident, 0)
        for t in range(0, tiles):
            query_tile = nth_tile(t, spans)
            before, after = turn_of(query_tile, key_tile, mask, tiles_per_seq, COLS, 2 * ROWS, FAMILY)
            number = (first_sum + query_tile) * batch.num_heads + sequence.head
            if before > 0:
                wait_until(sums.added + number, before)
            if t > 0:
                slot = (t - 1) % STAGES
                more = t - 1 + STAGES < tiles
                mbarrier.wait(bars.empty.index(slot), ((t - 1) // STAGES) & 1)
                row = nth_tile(t - 1 + STAGES, spans) * COLS
                load_tile(q_desc, sequence, row, bars.full.index(slot), buffers.q.index(slot), more)
                load_tile(do_desc, sequence, row, bars.full.index(slot), buffers.do.index(slot), more)
            for w in gl.static_range(2):
                mbarrier.wait(bars.ds_full.index(t % 2 * 2 + w), (t // 2) & 1)
            for part in gl.static_range(COLS // 64):
                dq = zero
                for w in gl.static_range(2):
                    ds = buffers.ds.index(t % 2 * 2 + w).slice(part * 64, 64, dim=1)
                    k = matrix(buffers.k.index(w))
                    dq = warpgroup_mma(ds.permute((1, 0)), k, dq, use_acc=w > 0, is_async=True)
                dq = warpgroup_mma_wait(0, deps=(dq,))
                if part == COLS // 64 - 1:
                    mbarrier.arrive(bars.ds_empty.index(t % 2), count=1)
                where = sums.tiles + number.to(gl.int64) * (COLS * D) + part * (64 * D)
                where = where + rows[:, None] * D + cols[None, :]  # one sum of indices would take an address more a row
                if after > 0:
                    if before > 0:
                        gl.atomic_add(where, dq, sem="relaxed")
                    else:
                        gl.store(where, dq)
                else:
                    if before > 0:
                        dq += gl.load(where, cache_modifier=".cg")
                    store_rows(dq_out, dq * dq_factor, query_tile * COLS + part * 64, sequence, DIM)
            thread_barrier()
            if after > 0:
                gl.atomic_add(sums.added + pinned(number), 1, sem="release")  # else the address waits meanwhile
    key0 = pinned(key_tile) * 2 * ROWS
    first_unused = gl.cdiv(sequence.length, COLS) * COLS
    for w in gl.static_range(2):  # zeros in the query tiles that nobody visits
        row0 = key0 + w * ROWS
        if (first_unused <= row0) & (row0 < sequence.stored):
            store_rows(dq_out, zero, row0, sequence, DIM)


@gluon.jit(do_not_specialize=RUNTIME)
def dqdkdv_kernel(
    q_desc, k_desc, v_desc, do_desc, dq_out, sums, added, dk_out, dv_out,
    half_alpha, factor, dv_factor,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    num_sequences, tiles_per_seq, slots_per_seq, FAMILY: gl.constexpr,
    K_DIM: gl.constexpr, V_DIM: gl.constexpr, D: gl.constexpr,
    COLS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program a tile of 2 * ROWS keys of a head."""
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len, 1
    )
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLS], dtype)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    buffers = Buffers(
        k=gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, 1, D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, 1, D], v_desc.layout),
        q=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, COLS, 1, D], q_desc.layout),
        do=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, COLS, 1, D], do_desc.layout),
        ds=gl.allocate_shared_memory(dtype, [4, ROWS, COLS], ds_layout),
    )
    bars = Bars(
        resident=gl.allocate_shared_memory(gl.int64, [1, 1], barrier).index(0),
        full=gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        empty=gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        ds_full=gl.allocate_shared_memory(gl.int64, [4, 1], barrier),
        ds_empty=gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
    )
    mbarrier.init(bars.resident, count=4)
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.full.index(i), count=2)  # q and do
        mbarrier.init(bars.empty.index(i), count=2)  # both partitions of keys
    for i in gl.static_range(4):
        mbarrier.init(bars.ds_full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(bars.ds_empty.index(i), count=1)
    index, key_tile = key_tile_of(num_sequences, slots_per_seq, batch)
    # Twelve warps of 168 registers: 208 for each thread of the keys, 88 for those of the queries.
    gl.warp_specialize(
        [
            (key_partition, (dk_out, dv_out, half_alpha, factor, dv_factor, batch, index,
                             key_tile, buffers, bars, FAMILY, K_DIM, V_DIM, D, COLS, STAGES, 0)),
            (key_partition, (dk_out, dv_out, half_alpha, factor, dv_factor, batch, index,
                             key_tile, buffers, bars, FAMILY, K_DIM, V_DIM, D, COLS, STAGES, 1)),
            (query_partition, (q_desc, k_desc, v_desc, do_desc, dq_out, factor, batch, index, key_tile,
                               tiles_per_seq, Sums(sums, added), buffers, bars, FAMILY, K_DIM, D, COLS, STAGES)),
        ],
        [4, 4],
        [208, 88],
    )  # fmt: skip
