"""The gradient of the attention bias on Hopper: warp-specialised and persistent. Deterministic, no atomics on results.

A program draws tiles of dbias and streams the sequences and heads that share one (attention_triton_dbias.py lists them)
past its sums. Both products of such a step, s = q kT and dp = do vT, take CHUNK columns of the head dim a stage: one
ring serves both. They follow each other, since silu' in between needs the registers of dp; one consumer's silu'
hides under the other's products. The bias stays in shared memory for all steps of its tile.
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.attention_sm90_pairs import half_argument, load_weight, weighted
from hstu_compile.ops.kernels.attention_sm90_pipeline import ROWS, release, ring, wait_empty
from hstu_compile.ops.kernels.attention_sm90_schedule import hand_over, take_over, tile_queue, wait_for_room
from hstu_compile.ops.kernels.attention_sm90_tiles import (
    RUNTIME,
    Batch,
    anew,
    live_tile,
    load_tile,
    mask_of,
    matrix,
    pinned,
    row_layout,
    sequence_of,
)
from hstu_compile.ops.kernels.attention_tiles import Cells, store_cells
from hstu_compile.ops.kernels.attention_triton_dbias import SHARING, bias_tile
from hstu_compile.ops.kernels.gluon_compat import (
    async_load,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from hstu_compile.ops.kernels.mask_tiles import all_cells_live
from hstu_compile.ops.kernels.silu import silu_and_grad


class Sharing(NamedTuple):
    """The tiles of the bias, and for each the sequences and heads that share it."""

    sharers: Any  # sequence and head * 2 + whether the mask tensor is all ones there, a line a tile
    counts: Any  # of a line
    most: Any  # entries in a line
    num_tiles: Any
    num_sequences: Any
    batches: Any
    heads: Any


class Operands(NamedTuple):
    """CHUNK columns of q and k, or of do and v: two buffers behind the barriers of one."""

    left: Any  # the ring of q and do
    right: Any


@gluon.jit
def locate(tile, sharing, batch, COLS: gl.constexpr):
    """First row, first column and matrix of a tile of the bias."""
    row_tile, col_tile, at, _, _ = bias_tile(
        tile, pinned(batch.N), sharing.num_sequences, batch.num_heads, sharing.batches, sharing.heads, 2 * ROWS, COLS
    )
    return row_tile * (2 * ROWS), col_tile * COLS, at


@gluon.jit
def line_of(tile, sharing):
    """The tile's line of sharers, their number, and the first of them."""
    line = sharing.sharers + tile.to(gl.int64) * pinned(sharing.most)
    return line, gl.load(sharing.counts + tile), gl.load(line)


@gluon.jit
def load_chunks(
    left_desc, right_desc, sequence, row0, col0, operands, first,
    CHUNKS: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for c in gl.static_range(CHUNKS):
        wait_empty(operands.left, first + c, STAGES)
        slot = (first + c) % STAGES
        full = operands.left.full.index(slot)
        load_tile(left_desc, sequence, row0, full, operands.left.tiles.index(slot), True, c * CHUNK)
        load_tile(right_desc, sequence, col0, full, operands.right.index(slot), True, c * CHUNK)


@gluon.jit
def scheduler(queue, counter, sharing):
    number = 0  # of tiles handed over
    tile = 0
    while tile != -1:
        wait_for_room(number, queue)
        tile = gl.atomic_add(counter, 1)
        tile = gl.where(tile < sharing.num_tiles, tile, -1)
        hand_over(tile, number, queue)
        number += 1


@gluon.jit
def producer(
    q_desc, k_desc, do_desc, v_desc, bias_desc, batch, sharing, operands, bias, queue,
    K_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr, CHUNK: gl.constexpr, COLS: gl.constexpr,
    STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr,
):  # fmt: skip
    filled = 0  # stages so far
    biases = 0
    number = 0  # tiles so far
    tile = take_over(number, queue)
    while tile >= 0:
        number += 1
        line, count, entry = line_of(tile, sharing)
        row0, col0, at = locate(tile, sharing, batch, COLS)
        for i in range(0, count):
            sequence = sequence_of(entry // 2, batch)
            entry = gl.load(line + gl.minimum(i + 1, count - 1))
            load_chunks(q_desc, k_desc, sequence, row0, col0, operands, filled, K_CHUNKS, CHUNK, STAGES)
            filled += K_CHUNKS
            if i == 0:
                wait_empty(bias, biases, BIAS_STAGES)
                full = bias.full.index(biases % BIAS_STAGES)
                mbarrier.expect(full, bias_desc.block_type.nbytes)
                async_load(bias_desc, [at[0], at[2], row0, col0], full, bias.tiles.index(biases % BIAS_STAGES))
                biases += 1
            load_chunks(do_desc, v_desc, sequence, row0, col0, operands, filled, V_CHUNKS, CHUNK, STAGES)
            filled += V_CHUNKS
        tile = take_over(number, queue)


@gluon.jit
def multiply(operands, n, acc, use_acc: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr):
    """acc + left rightT of the n-th stage, for the rows of consumer W."""
    mbarrier.wait(operands.left.full.index(n % STAGES), (n // STAGES) & 1)
    left = matrix(operands.left.tiles.index(n % STAGES)).slice(W * ROWS, ROWS, dim=0)
    right = matrix(operands.right.index(n % STAGES)).permute((1, 0))
    return warpgroup_mma(left, right, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def start(operands, first, zero, CHUNKS: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr):
    """left rightT of CHUNKS stages, the last of which is still on its way."""
    acc = multiply(operands, first, zero, False, STAGES, W)
    for c in gl.static_range(1, CHUNKS):
        acc = multiply(operands, first + c, acc, True, STAGES, W)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        release(operands.left, first + c - 1, STAGES)
    return acc


@gluon.jit
def finish(operands, end, acc, STAGES: gl.constexpr):
    acc = warpgroup_mma_wait(0, deps=(acc,))
    release(operands.left, end - 1, STAGES)
    return acc


@gluon.jit
def consumer(
    dbias, half_alpha, scale, batch, pairs, sharing, operands, bias, queue, FAMILY: gl.constexpr,
    K_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr, COLS: gl.constexpr,
    STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Rows W * ROWS ... of each tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    out_layout: gl.constexpr = row_layout(ROWS, COLS, gl.num_warps())
    zero = gl.zeros((ROWS, COLS), dtype=gl.float32, layout=layout)
    done = 0  # stages so far
    biases = 0
    number = 0  # tiles so far
    tile = take_over(number, queue)
    line, count, entry = line_of(gl.maximum(tile, 0), sharing)
    while tile >= 0:
        number += 1
        row0, col0, at = locate(tile, sharing, batch, COLS)
        row0 += W * ROWS
        sums = zero
        for i in range(0, count):
            s = start(operands, done, zero, K_CHUNKS, STAGES, W)
            sequence = sequence_of(entry // 2, batch)
            m = mask_of(sequence.z, batch, FAMILY)
            whole = (entry % 2 == 1) & all_cells_live(row0, col0, ROWS, COLS, m, FAMILY)
            whole = whole & (row0 + ROWS <= m.length) & (col0 + COLS <= m.length)  # beyond, the bias may be NaN
            entry = gl.load(line + gl.minimum(i + 1, count - 1))
            done += K_CHUNKS
            s = finish(operands, done, s, STAGES)
            slot = biases % BIAS_STAGES
            mbarrier.wait(bias.full.index(slot), (biases // BIAS_STAGES) & 1)
            cells = bias.tiles.index(slot).reshape([2 * ROWS, COLS]).slice(W * ROWS, ROWS, dim=0)
            grad = silu_and_grad(half_argument(s, half_alpha, cells.load(layout)), True)[1]
            if i == count - 1:
                mbarrier.arrive(bias.empty.index(slot), count=1)
            dp = start(operands, done, zero, V_CHUNKS, STAGES, W)
            done += V_CHUNKS
            dp = finish(operands, done, dp, STAGES)
            if whole:
                sums += grad * dp
            else:
                ds = grad * dp
                ds = weighted(ds, load_weight(pairs, ds, row0, col0, sequence, batch, False))
                sums += gl.where(live_tile(ds, pinned(row0), pinned(col0), sequence.z, batch, FAMILY, False), ds, 0.0)
        if count > 0:
            biases += 1
        tile = take_over(number, queue)
        line, count, entry = line_of(gl.maximum(tile, 0), sharing)
        rows = row0 + gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))
        cols = col0 + gl.arange(0, COLS, layout=gl.SliceLayout(0, out_layout))
        sums = gl.convert_layout((sums * scale).to(dbias.ptr.dtype.element_ty), out_layout)
        # Nothing that is computed from sizes and strides alone waits in registers for the store, once a tile.
        batch_stride, head_stride = anew(dbias.batch_stride), anew(dbias.head_stride)
        out = Cells(dbias.ptr, batch_stride, head_stride, anew(dbias.row_stride), dbias.col_stride, dbias.GRAIN)
        store_cells(out, at, rows[:, None], cols[None, :], pinned(batch.N), sums)


@gluon.jit(do_not_specialize=[*RUNTIME, *SHARING, "most", "num_tiles"])
def dbias_kernel(
    q_desc, k_desc, do_desc, v_desc, bias_desc, dbias, pairs, half_alpha, scale,
    sharers, counts, most, counter, num_tiles, num_sequences, bias_batches, bias_heads,
    each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len,
    FAMILY: gl.constexpr, K_CHUNKS: gl.constexpr, V_CHUNKS: gl.constexpr, CHUNK: gl.constexpr, COLS: gl.constexpr,
    STAGES: gl.constexpr, BIAS_STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dbias = silu'(alpha q kT + bias) mask (do vT) * scale, summed in order over what the bias broadcasts."""
    batch = Batch(
        each, N, batch_rows, num_heads, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len, 1
    )
    sharing = Sharing(sharers, counts, most, num_tiles, num_sequences, bias_batches, bias_heads)
    left = ring(q_desc, STAGES, 2, 2)
    right = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    operands = Operands(left, right)
    bias = ring(bias_desc, BIAS_STAGES, 1, 2)
    queue = tile_queue(3)  # two consumers, the producer
    # Twelve warps of 168 registers: 240 for each thread of the consumers, 24 of the others.
    gl.warp_specialize(
        [
            (consumer, (dbias, half_alpha, scale, batch, pairs, sharing, operands, bias, queue,
                        FAMILY, K_CHUNKS, V_CHUNKS, COLS, STAGES, BIAS_STAGES, 0)),
            (consumer, (dbias, half_alpha, scale, batch, pairs, sharing, operands, bias, queue,
                        FAMILY, K_CHUNKS, V_CHUNKS, COLS, STAGES, BIAS_STAGES, 1)),
            (producer, (q_desc, k_desc, do_desc, v_desc, bias_desc, batch, sharing, operands, bias, queue,
                        K_CHUNKS, V_CHUNKS, CHUNK, COLS, STAGES, BIAS_STAGES)),
            (scheduler, (queue, counter, sharing)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
