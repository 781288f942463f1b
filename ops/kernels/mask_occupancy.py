"""Which tiles of a mask tensor hold anything, found once per launch: the attention kernels visit those only."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "num_heads"])
def occupied_tiles_kernel(
    mask_ptr, strides, visits_ptr, ranks_ptr, N, num_heads, ROWS: tl.constexpr, COLS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program a row of tiles, in order, so that `visits` comes out sorted."""
    row_tiles = tl.cdiv(N, ROWS)
    col_tiles = tl.cdiv(N, COLS)
    pid = tl.program_id(0).to(tl.int64)
    sequence_head = pid // row_tiles
    rows = pid % row_tiles * ROWS + tl.arange(0, ROWS)
    mask_ptr += sequence_head // num_heads * strides[0] + sequence_head % num_heads * strides[1]
    visits_ptr += pid * col_tiles
    ranks_ptr += pid * (col_tiles + 1)
    rank = tl.zeros((), tl.int32)
    for col_tile in range(col_tiles):
        tl.store(ranks_ptr + col_tile, rank)
        any_live = tl.zeros((), tl.int32)
        all_ones = tl.full((), 1, tl.int32)
        for chunk in range(0, COLS, CHUNK):
            cols = col_tile * COLS + chunk + tl.arange(0, CHUNK)
            inside = (rows[:, None] < N) & (cols[None, :] < N)
            cells = mask_ptr + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]
            weight = tl.load(cells, mask=inside, other=0)
            any_live = tl.maximum(any_live, tl.max((weight != 0).to(tl.int32)))
            all_ones = tl.minimum(all_ones, tl.min((weight == 1).to(tl.int32)))
        if any_live != 0:
            tl.store(visits_ptr + rank, col_tile * 2 + all_ones)
        rank += any_live
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
        with torch.cuda.device_of(mask):
            grid = (B * H * row_tiles,)
            occupied_tiles_kernel[grid](
                mask, mask.stride(), visits, ranks, N, H, ROWS=rows, COLS=cols, CHUNK=min(cols, 64)
            )
    return visits, ranks
