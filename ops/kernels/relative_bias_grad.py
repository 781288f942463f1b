"""The gradient of the relative bias in Triton: no atomics, no plane of [N, N].

By position it is the sum of ds over each diagonal. Tiles on a diagonal of tiles have the same differences in the same
cells, so a program walks one such diagonal, through all sequences, and adds tile to tile in registers; only in the end
the cells of its one tile are added along their diagonals. By time each tile adds to the buckets of its range, few where
times are sorted. Programs write what they have to themselves, and that is added in their order.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.attention_tiles import (
    load_cells,
    load_chunk,
    locate,
    mask_of,
    takes_no_weights,
    tile_line,
    weighted,
    weights,
)
from hstu_compile.ops.kernels.attention_triton_kernels import RUNTIME
from hstu_compile.ops.kernels.attention_triton_tiles import Tile
from hstu_compile.ops.kernels.launch import processors
from hstu_compile.ops.kernels.mask_tiles import in_spans, key_spans
from hstu_compile.ops.kernels.relative_tiles import bucket_cells, bucket_range, position_cells, time_cells
from hstu_compile.ops.kernels.silu import silu_and_grad

PROGRAMS = 8  # for each multiprocessor, at most about
LEAST_VISITS = 4  # tiles of a program, if there are so many
LISTED = 1024  # tiles at a time
SHARING = ["first_diagonal", "most", "per_program", "parts", "groups"]


@triton.jit(do_not_specialize=[*RUNTIME, *SHARING])
def diagonal_kernel(
    tiles_ptr,
    counts_ptr,
    first_diagonal,
    most,
    num_sequences,
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
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
):
    """For each diagonal of tiles (and head of the mask tensor) the tiles in which a cell may live, and their number.

    tiles[diagonal, head, i] = (sequence * row tiles + row tile) * 2 + w, w = 1 if the mask tensor (if any) is all ones.
    """
    line, head = tl.program_id(0), tl.program_id(0) % mask_heads
    diagonal = line // mask_heads + first_diagonal
    row_tiles = tl.cdiv(N, TILE)
    tiles_ptr += line.to(tl.int64) * most
    count = tl.zeros((), tl.int32)
    for first in range(0, num_sequences * row_tiles, LISTED):
        tile = first + tl.arange(0, LISTED)
        batch, row_tile = tl.minimum(tile // row_tiles, num_sequences - 1), tile % row_tiles
        col_tile = row_tile - diagonal
        _, length = locate(sequences, batch, N)
        m = mask_of(
            sequences, batch, length, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
        )  # fmt: skip
        live = (tile < num_sequences * row_tiles) & (col_tile >= 0) & (col_tile * TILE < length)
        live = live & in_spans(col_tile, key_spans(row_tile * TILE, TILE, TILE, m, family))
        entry = tile * 2
        if ranks is not None:
            of_mask = tile_line((batch, 0, head), row_tile, row_tiles, mask_batches, mask_heads)
            rank_ptr = ranks + of_mask * (row_tiles + 1) + col_tile
            rank = tl.load(rank_ptr, mask=live, other=0)
            live = live & (tl.load(rank_ptr + 1, mask=live, other=0) > rank)
            entry += tl.load(visits + of_mask * row_tiles + rank, mask=live, other=0) % 2
        else:
            entry += 1
        place = count + tl.cumsum(live.to(tl.int32)) - 1
        tl.store(tiles_ptr + place, entry, mask=live)
        count += tl.sum(live.to(tl.int32))
    tl.store(counts_ptr + line, count)


@triton.jit
def products(q_rows, k_rows, v_rows, dout_rows, at, rows, cols, length, CHUNK: tl.constexpr):
    """q kT and dout vT, CHUNK columns a step."""
    CHUNKS: tl.constexpr = triton.cdiv(max(q_rows.BLOCK, v_rows.BLOCK), CHUNK)
    scores = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    dp = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
    for c in range(CHUNKS):
        q = load_chunk(q_rows, at, rows, length, c, CHUNK)
        k = load_chunk(k_rows, at, cols, length, c, CHUNK)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="ieee")
        dout = load_chunk(dout_rows, at, rows, length, c, CHUNK)
        v = load_chunk(v_rows, at, cols, length, c, CHUNK)
        dp = tl.dot(dout, tl.trans(v), dp, input_precision="ieee")
    return scores, dp


@triton.jit
def tile_buckets(relative, batch, least, width, rows, cols, length):
    """Those of rows x cols, if there is a bias by time."""
    if relative.time.table is not None:
        return bucket_cells(relative.time, batch, least, width, rows[:, None], cols[None, :], length, False)


@triton.jit
def tile_gradient(
    scores, dp, half_alpha, mask, bias, relative, buckets, at, rows, cols, whole, m, family, N, FAST: tl.constexpr
):
    """ds of rows x cols, which broadcast; whole: whether every cell counts as it is."""
    half = scores * half_alpha
    if bias is not None:
        half += 0.5 * load_cells(bias, at, rows, cols, m.length)
    if relative.time.table is not None:
        half += 0.5 * time_cells(relative.time, at[2], buckets)
    if relative.position.table is not None:
        half += 0.5 * position_cells(relative.position, at[2], rows, cols, N)
    ds = silu_and_grad(half, FAST)[1] * dp
    if not whole:
        ds = weighted(ds, weights(mask, at, rows, cols, m, family))
    return ds


@triton.jit(do_not_specialize=[*RUNTIME, *SHARING])
def relative_grad_kernel(
    q_rows,
    k_rows,
    v_rows,
    dout_rows,
    position_ptr,
    time_ptr,
    tiles_ptr,
    counts_ptr,
    first_diagonal,
    most,
    per_program,
    parts,
    groups,
    sequences,
    num_sequences,
    mask,
    mask_heads,
    bias,
    relative,
    family,
    N,
    num_heads,
    contextual_seq_len,
    target_group_size,
    max_attn_len,
    min_full_attn_seq_len,
    alpha,
    scale,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    BUCKETS: tl.constexpr,
    ALONE: tl.constexpr,
    FAST: tl.constexpr,
):
    """For one part of a diagonal of tiles and a group of heads: ds, summed over tiles and heads, by cell and by bucket.

    position [diagonals, groups, parts, TILE, TILE] and time [diagonals, groups, parts, BUCKETS], each may be None.
    Of position, parts without a tile are not written.
    """
    # At a time all diagonals of a part, and all heads: these are the same sequences, more or less, and fit the L2.
    diagonals = tl.num_programs(0) // parts // groups
    group = tl.program_id(0) % groups
    diagonal = tl.program_id(0) // groups % diagonals
    part = tl.program_id(0) // groups // diagonals
    program = ((diagonal * groups + group) * parts + part).to(tl.int64)
    head0 = group * (num_heads // groups)
    line = diagonal * mask_heads + head0 % mask_heads
    diagonal += first_diagonal
    row_tiles = tl.cdiv(N, TILE)
    tiles_ptr += line.to(tl.int64) * most
    last = tl.minimum(tl.load(counts_ptr + line), (part + 1) * per_program)
    sums = tl.zeros((TILE, TILE), tl.float32)
    time_sums = tl.zeros((BUCKETS,), tl.float32)
    for i in range(part * per_program, last):
        entry = tl.load(tiles_ptr + i)
        batch, row0 = entry // 2 // row_tiles, entry // 2 % row_tiles * TILE
        col0 = row0 - diagonal * TILE
        rows, cols = row0 + tl.arange(0, TILE), col0 + tl.arange(0, TILE)
        start, length = locate(sequences, batch, N)
        m = mask_of(
            sequences, batch, length, contextual_seq_len, target_group_size, max_attn_len, min_full_attn_seq_len
        )  # fmt: skip
        whole = takes_no_weights(row0, col0, TILE, TILE, entry % 2 == 1, bias, relative, m, family)
        if relative.time.table is not None:
            least, width = bucket_range(relative.time, batch, row0, col0, N)
        else:
            least, width = 0, 0
        if ALONE:
            at = batch, start, head0
            scores, dp = products(q_rows, k_rows, v_rows, dout_rows, at, rows, cols, length, CHUNK)
            buckets = tile_buckets(relative, batch, least, width, rows, cols, length)
            ds = tile_gradient(
                scores, dp, 0.5 * alpha, mask, bias, relative, buckets, at, rows[:, None], cols[None, :], whole, m,
                family, N, FAST,
            )  # fmt: skip
        else:
            buckets = tile_buckets(relative, batch, least, width, rows, cols, length)
            ds = tl.zeros((TILE, TILE), tl.float32)
            for head in range(head0, head0 + num_heads // groups):
                at = batch, start, head
                scores, dp = products(q_rows, k_rows, v_rows, dout_rows, at, rows, cols, length, CHUNK)
                ds += tile_gradient(
                    scores, dp, 0.5 * alpha, mask, bias, relative, buckets, at, rows[:, None], cols[None, :], whole, m,
                    family, N, FAST,
                )  # fmt: skip
        sums += ds
        if time_ptr is not None:
            for bucket in range(least, least + width + 1):
                total = tl.sum(tl.where(buckets == bucket, ds, 0.0))
                time_sums += tl.where(tl.arange(0, BUCKETS) == bucket, total, 0.0)
    if time_ptr is not None:
        tl.store(time_ptr + program * BUCKETS + tl.arange(0, BUCKETS), time_sums * scale)
    if position_ptr is not None:
        if part * per_program < last:
            cell = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
            tl.store(position_ptr + program * (TILE * TILE) + cell, sums * scale)


@triton.jit(do_not_specialize=["N", "mask_heads", "shared", *SHARING])
def position_grad_kernel(
    out, position_ptr, counts_ptr, first_diagonal, diagonals, per_program, parts, groups, shared, mask_heads, N,
    TILE: tl.constexpr,
):  # fmt: skip
    """out [heads, 2N - 1]: what `relative_grad_kernel` has summed by cell, added along the diagonals of tiles.

    Differences from d TILE to d TILE + TILE - 1 are below the main diagonal of tiles on diagonal d, or above that of
    tiles on the next one. shared: how many groups of heads share a line of out.
    """
    lines = 2 * tl.cdiv(N, TILE)
    lower = tl.program_id(0) % lines - tl.cdiv(N, TILE) - first_diagonal
    difference = tl.arange(0, TILE)[:, None]
    row = tl.arange(0, TILE)[None, :]
    diagonal = tl.where(row >= difference, lower, lower + 1)
    cell = row * TILE + (row - difference + TILE) % TILE
    inside = (diagonal >= 0) & (diagonal < diagonals)
    totals = tl.zeros((TILE, TILE), tl.float32)
    first_group = tl.program_id(0) // lines * shared
    for group in range(first_group, first_group + shared):
        # Where the mask tensor has several heads, a group is one.
        count = tl.load(counts_ptr + diagonal * mask_heads + group % mask_heads, mask=inside, other=0)
        for part in range(parts):
            tile = ((diagonal * groups + group) * parts + part).to(tl.int64)
            there = part * per_program < count
            totals += tl.load(position_ptr + tile * (TILE * TILE) + cell, mask=there, other=0.0)
    place = (lower + first_diagonal) * TILE + tl.arange(0, TILE) + N - 1
    out += (tl.program_id(0) // lines).to(tl.int64) * (2 * N - 1)
    tl.store(out + place, tl.sum(totals, axis=1), mask=(place >= 0) & (place < 2 * N - 1))


def relative_bias_grads(
    call: Any, launch: Callable, tile: Tile, operands: dict[str, Any], wanted: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of position_bias and time_bias, of those that are `wanted`, in their shapes and dtypes.

    call: an attention_triton.Call; operands: q, k, v and dout by the names that the kernel has for them.
    """
    grads = tuple(None if t is None else torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in wanted)
    N, heads, device = call.max_seq_len, call.num_heads, call.q.device
    row_tiles, shared = triton.cdiv(N, tile.rows), call.shared
    most = min(call.num_sequences * row_tiles, call.slots(tile.rows).number)
    if heads * most:
        occupied = call.occupied(tile.rows, tile.cols, by_keys=False)
        together = occupied["mask_heads"] == 1 and all(t is None or t.shape[0] == 1 for t in wanted)
        groups = 1 if together else heads
        lower_only = shared["family"].CAUSAL.value and not shared["family"].CONTEXT.value
        first_diagonal = 0 if lower_only else 1 - row_tiles
        diagonals = row_tiles - first_diagonal
        programs = PROGRAMS * processors(device)
        per_program = max(LEAST_VISITS, triton.cdiv(most * diagonals * groups, 2 * programs))
        parts = triton.cdiv(most, per_program)
        counts = torch.empty(diagonals * occupied["mask_heads"], dtype=torch.int32, device=device)
        lists = {"tiles_ptr": counts.new_empty(counts.numel(), most), "counts_ptr": counts, "most": most}
        lists |= {"first_diagonal": first_diagonal, "TILE": tile.rows}
        one_warp = tile._replace(num_warps=4)
        launch(diagonal_kernel, call.q, counts.numel(), one_warp, **call.sequences, **lists, **occupied, LISTED=LISTED)
        relative = call.relative_bias.tiles(tile.rows, tile.cols)
        buckets = triton.next_power_of_2(1 + call.relative_bias.num_boundaries)
        sizes = (diagonals, groups, parts)
        sums = [
            None if t is None else torch.empty(*sizes, *size, dtype=torch.float32, device=device)
            for t, size in zip(wanted, ((tile.rows, tile.rows), (buckets,)), strict=True)
        ]
        split = {"per_program": per_program, "parts": parts, "groups": groups}
        launch(
            relative_grad_kernel,
            call.q,
            diagonals * groups * parts,
            tile if groups == heads else tile._replace(num_warps=8),  # between heads it holds ds and buckets
            position_ptr=sums[0],
            time_ptr=sums[1],
            **lists,
            **split,
            **shared,
            **operands,
            mask_heads=occupied["mask_heads"],
            relative=relative,
            scale=call.scale,
            CHUNK=min(64, max(operands["q_rows"].BLOCK.value, operands["v_rows"].BLOCK.value)),
            BUCKETS=buckets,
            ALONE=groups == heads,
        )
        position, time = grads
        if position is not None:
            del lists["tiles_ptr"], lists["most"]
            launch(
                position_grad_kernel,
                call.q,
                position.shape[0] * 2 * row_tiles,
                one_warp,
                out=position,
                position_ptr=sums[0],
                **lists,
                **split,
                diagonals=diagonals,
                shared=groups // position.shape[0],
                mask_heads=occupied["mask_heads"],
                N=N,
            )
        if time is not None:
            totals = sums[1].sum((0, 2))[:, : time.shape[1]]
            time.copy_(totals if time.shape[0] > 1 else totals.sum(0, keepdim=True))
    return tuple(None if t is None else grad.to(t.dtype) for t, grad in zip(wanted, grads, strict=True))
