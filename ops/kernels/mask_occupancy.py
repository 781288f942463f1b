"""Which tiles of a mask tensor hold anything, found before a launch: the attention kernels visit those only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 128  # tiles that are listed at a time


@triton.jit(do_not_specialize=["num_heads"])
def tile_states_kernel(mask_ptr, strides, states_ptr, N, num_heads, ROWS: tl.constexpr, COLS: tl.constexpr):
    """One program a tile: 0 if all its cells are 0, 2 if all are 1, else 1."""
    row_tiles = tl.cdiv(N, ROWS)
    col_tiles = tl.cdiv(N, COLS)
    tile = tl.program_id(0)
    sequence_head = (tile // col_tiles // row_tiles).to(tl.int64)
    rows = tile // col_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    cols = tile % col_tiles * COLS + tl.arange(0, COLS)
    mask_ptr += sequence_head // num_heads * strides[0] + sequence_head % num_heads * strides[1]
    cells = mask_ptr + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]
    weight = tl.load(cells, mask=(rows[:, None] < N) & (cols[None, :] < N), other=0)
    state = (weight != 0).to(tl.int32) + (weight == 1).to(tl.int32)
    tl.store(states_ptr + tile, tl.where(tl.min(state) == 2, 2, tl.minimum(tl.max(state), 1)))


@triton.jit(do_not_specialize=["col_tiles"])
def list_tiles_kernel(states_ptr, visits_ptr, ranks_ptr, col_tiles, WIDTH: tl.constexpr):
    """One program a row of tiles."""
    line = tl.program_id(0).to(tl.int64)
    states_ptr += line * col_tiles
    visits_ptr += line * col_tiles
    ranks_ptr += line * (col_tiles + 1)
    rank = tl.zeros((), tl.int32)
    for first in range(0, col_tiles, WIDTH):
        tile = first + tl.arange(0, WIDTH)
        state = tl.load(states_ptr + tile, mask=tile < col_tiles, other=0).to(tl.int32)
        occupied = (state != 0).to(tl.int32)
        ranks = rank + tl.cumsum(occupied) - occupied
        tl.store(ranks_ptr + tile, ranks, mask=tile < col_tiles)
        tl.store(visits_ptr + ranks, tile * 2 + (state == 2), mask=state != 0)
        rank += tl.sum(occupied)
    tl.store(ranks_ptr + col_tiles, rank)


def occupied_tiles(mask: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """For every row of tiles of `mask` [B, H, N, N], tiles of `rows` x `cols`: visits and ranks, both int32.

    visits[b, h, r, i] = 2 * c + w for the i-th column tile c that holds a nonzero cell, w = 1 if all its cells are 1.
    ranks[b, h, r, c] = how many column tiles before c hold one: those in [c0, c1) are visits[ranks[c0] : ranks[c1]].
    """
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    B, H, N, _ = mask.shape
    row_tiles, col_tiles = triton.cdiv(N, rows), triton.cdiv(N, cols)
    visits = torch.empty(B, H, row_tiles, col_tiles, dtype=torch.int32, device=mask.device)
    ranks = torch.empty(B, H, row_tiles, col_tiles + 1, dtype=torch.int32, device=mask.device)
    if visits.numel():
        states = torch.empty(visits.shape, dtype=torch.int8, device=mask.device)
        with torch.cuda.device_of(mask):
            tile_states_kernel[(visits.numel(),)](mask, mask.stride(), states, N, H, ROWS=rows, COLS=cols, num_warps=8)
            list_tiles_kernel[(B * H * row_tiles,)](states, visits, ranks, col_tiles, WIDTH=WIDTH, num_warps=1)
    return visits, ranks
