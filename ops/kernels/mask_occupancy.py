"""Which tiles of a mask tensor hold anything, found before a launch: the attention kernels visit those only.

The mask is read once, into the state of each of its smallest tiles. The lists of every kernel, in tiles of its own
shape, are made from these.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, run

STRIP = 128  # columns of the mask that a program reads
WIDTH = 128  # tiles that are listed at a time
STEPS = ["batch_step", "head_step", "row_step", "col_step"]
SIZES = ["num_heads", "row_tiles", "col_tiles", "grains"]


class TiledMask(NamedTuple):
    """A mask tensor and the states of its tiles of grain x grain cells."""

    cells: Tensor  # [B|1, H|1, N, N]
    states: Tensor  # uint8 [B|1, H|1, tiles, tiles]: see `tile_states`
    grain: int


@triton.jit
def state_of(lowest, highest):
    """The state of a tile whose parts have states from `lowest` to `highest`."""
    return tl.where(lowest == 2, 2, tl.minimum(highest, 1))


@triton.jit(do_not_specialize=["num_heads"])
def tile_states_kernel(mask_ptr, strides, states_ptr, N, num_heads, GRAIN: tl.constexpr, STRIP: tl.constexpr):
    """One program for the tiles of GRAIN rows and STRIP columns."""
    TILES: tl.constexpr = STRIP // GRAIN
    row_tiles = tl.cdiv(N, GRAIN)
    strips = tl.cdiv(N, STRIP)
    strip = tl.program_id(0) % strips
    row_tile = tl.program_id(0) // strips % row_tiles
    matrix = (tl.program_id(0) // strips // row_tiles).to(tl.int64)
    rows = row_tile * GRAIN + tl.arange(0, GRAIN)
    cols = strip * STRIP + tl.arange(0, STRIP)
    inside = (rows[:, None] < N) & (cols[None, :] < N)
    mask_ptr += matrix // num_heads * strides[0] + matrix % num_heads * strides[1]
    cells = mask_ptr + rows[:, None].to(tl.int64) * strides[2] + cols[None, :].to(tl.int64) * strides[3]
    weight = tl.load(cells, mask=inside, other=0)
    state = (weight != 0).to(tl.int32) + (weight == 1).to(tl.int32)
    lowest = tl.min(tl.where(inside, state, 2), axis=0)
    lowest = tl.min(tl.reshape(lowest, [TILES, GRAIN]), axis=1)
    highest = tl.max(tl.reshape(tl.max(state, axis=0), [TILES, GRAIN]), axis=1)
    tiles = strip * TILES + tl.arange(0, TILES)
    states_ptr += (matrix * row_tiles + row_tile) * row_tiles
    tl.store(states_ptr + tiles, state_of(lowest, highest), mask=tiles < row_tiles)


@triton.jit(do_not_specialize=[*STEPS, *SIZES])
def list_tiles_kernel(
    states_ptr, batch_step, head_step, row_step, col_step, visits_ptr, ranks_ptr, num_heads, row_tiles, col_tiles,
    grains, ROWS: tl.constexpr, COLS: tl.constexpr, GRAIN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a row of tiles of ROWS x COLS cells."""
    line = tl.program_id(0).to(tl.int64)
    matrix = line // row_tiles
    row = tl.program_id(0) % row_tiles * ROWS
    states_ptr += matrix // num_heads * batch_step + matrix % num_heads * head_step
    visits_ptr += line * col_tiles
    ranks_ptr += line * (col_tiles + 1)
    rank = tl.zeros((), tl.int32)
    for first in range(0, col_tiles, WIDTH):
        tile = first + tl.arange(0, WIDTH)
        lowest = tl.full((WIDTH,), 2, tl.int32)
        highest = tl.zeros((WIDTH,), tl.int32)
        for i in tl.static_range(0, ROWS, GRAIN):
            for j in tl.static_range(0, COLS, GRAIN):
                grain_row = (row + i) // GRAIN
                grain_col = (tile * COLS + j) // GRAIN
                inside = (grain_row < grains) & (grain_col < grains)
                where = grain_row.to(tl.int64) * row_step + grain_col.to(tl.int64) * col_step
                state = tl.load(states_ptr + where, mask=inside, other=0).to(tl.int32)
                lowest = tl.minimum(lowest, tl.where(inside, state, 2))
                highest = tl.maximum(highest, state)
        state = tl.where(tile < col_tiles, state_of(lowest, highest), 0)
        occupied = (state != 0).to(tl.int32)
        ranks = rank + tl.cumsum(occupied) - occupied
        tl.store(ranks_ptr + tile, ranks, mask=tile < col_tiles)
        tl.store(visits_ptr + ranks, tile * 2 + (state == 2), mask=state != 0)
        rank += tl.sum(occupied)
    tl.store(ranks_ptr + col_tiles, rank)


def tile_states(mask: Tensor, grain: int, memory: dict[Hashable, Any] | None = None) -> Tensor:
    """For every tile of grain x grain cells of `mask` [B, H, N, N]: 0 if all are 0, 2 if all are 1, else 1; uint8.

    Tiles at the end have the cells that there are. memory: the same for masks that differ at most in their address.
    """
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    B, H, N, _ = mask.shape
    tiles, strips = -(-N // grain), -(-N // STRIP)
    states = torch.empty((B, H, tiles, tiles), dtype=torch.uint8, device=mask.device)

    def launches(_: Workspace) -> list[Launch]:
        arguments = (mask, mask.stride(), states, N, H)
        constants = {"GRAIN": grain, "STRIP": STRIP, "num_warps": 4}
        return [Launch(tile_states_kernel, B * H * tiles * strips, arguments, constants)]

    run(memory, "states", [mask, states], Extent(0), launches)
    return states


def list_tiles(
    mask: TiledMask, rows: int, cols: int, workspace: Workspace, *, by_keys: bool = False
) -> tuple[Launch, Tensor, Tensor]:
    """For every row of tiles of the mask, or (by_keys) of it transposed, tiles of `rows` x `cols`: visits and ranks.

    Both are int32, in the workspace, filled by the launch.
    visits[b, h, r, i] = 2 * c + w for the i-th column tile c that holds a nonzero cell, w = 1 if all its cells are 1.
    ranks[b, h, r, c] = how many column tiles before c hold one: those in [c0, c1) are visits[ranks[c0] : ranks[c1]].
    A tile smaller than the mask's grain counts as the one that it is part of.
    """
    states, N = mask.states, mask.cells.shape[-1]
    B, H, grains, _ = states.shape
    row_tiles, col_tiles = triton.cdiv(N, rows), triton.cdiv(N, cols)
    visits = workspace.empty(torch.int32, (B, H, row_tiles, col_tiles))
    ranks = workspace.empty(torch.int32, (B, H, row_tiles, col_tiles + 1))
    *steps, row_step, col_step = states.stride()
    steps += [col_step, row_step] if by_keys else [row_step, col_step]
    arguments = (states, *steps, visits, ranks, H, row_tiles, col_tiles, grains)
    constants = {"ROWS": rows, "COLS": cols, "GRAIN": mask.grain, "WIDTH": WIDTH, "num_warps": 1}
    return Launch(list_tiles_kernel, B * H * row_tiles, arguments, constants), visits, ranks
