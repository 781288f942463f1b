"""Tile sizes of the portable attention kernels: by the GPU's shared memory and the head dimensions, without tuning."""

import functools
from typing import NamedTuple

import torch
import triton

# In 3.9.0 Triton's pipeliner fails an assertion on the rows of dbias_kernel, whose places are loaded a step ahead; in
# 3.6.0 and 3.7.1 it takes them.
DBIAS_IN_ONE_STAGE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


class Tile(NamedTuple):
    """Queries and keys of one tile of scores, and how Triton compiles a kernel that walks such tiles."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    forward: Tile  # or dv by itself: keys for queries
    dq: Tile  # or dk by itself
    dk_dv: Tile | None  # both in one kernel; None: each by itself
    dbias: Tile


# The largest that fit without spilling registers, by compiling for each target (tests/compile_only.py). Triton fetches
# the next rows at the end of a step, so that two stages hide little of the fetch and three all of it.
# Shared memory a program may use, bytes -> largest head dimension -> tiles.
HALF = {
    227 << 10: {  # sm_90
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3), Tile(128, 64, 8, 3)),
        256: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 3), None, Tile(128, 64, 8, 3)),
    },
    163 << 10: {  # sm_80
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
    },
    0: {  # sm_86, sm_89, sm_120: 99 KB
        64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 8, 2)),
        128: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 64, 8, 2)),
    },
}
# The same for sm_90 with a mask tensor or a bias, whose tiles take room too.
CELLS = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3), Tile(128, 64, 8, 3)),
    256: Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), None, Tile(128, 64, 8, 3)),
}
# sm_100 has the shared memory of sm_90, but its tensor cores read more operands from there.
SM100 = {
    64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)),
}
# fp32 products run outside the tensor cores, from registers, on every GPU.
FLOAT = {
    128: Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    256: Tiles(Tile(16, 16, 4, 2), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


@functools.cache
def tiles_for(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], shared_memory: int, *, has_cells: bool
) -> Tiles:
    """head_dim: the larger of attn_dim and hidden_dim, at most 256; shared_memory: bytes a program may use; has_cells:
    whether there is a mask tensor or a bias.
    """
    if dtype == torch.float32:
        by_dim = FLOAT
    elif capability[0] == 10:
        by_dim = SM100
    elif capability[0] == 9 and has_cells:
        by_dim = CELLS
    else:
        by_dim = HALF[max(memory for memory in HALF if memory <= shared_memory)]
    tiles = by_dim[min(dim for dim in by_dim if dim >= head_dim)]
    return tiles._replace(dbias=tiles.dbias._replace(num_stages=1)) if DBIAS_IN_ONE_STAGE else tiles
