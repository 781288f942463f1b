"""Tile sizes of the portable attention kernels: by the GPU's shared memory and the head dimensions, without tuning."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys of one tile of scores, and how Triton compiles a kernel that walks such tiles."""

    rows: int
    cols: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    forward: Tile
    dq: Tile
    dk_dv: Tile
    dbias: Tile


# The largest that fit without spilling registers, from compiling for each target (tests/compile_only.py).
# Shared memory a program may use, bytes -> largest head dimension -> tiles.
HALF = {
    227 << 10: {  # sm_90
        64: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2), Tile(64, 64, 8, 1)),
        256: Tiles(Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)),
    },
    163 << 10: {  # sm_80
        64: Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2), Tile(32, 64, 8, 2)),
        128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 2)),
    },
    0: {  # sm_86, sm_89, sm_120: 99 KB
        64: Tiles(Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 8, 2)),
        128: Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        256: Tiles(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
}
# sm_100 has the shared memory of sm_90, but its tensor cores read more operands from there.
SM100 = {**HALF[227 << 10], 256: HALF[227 << 10][256]._replace(dk_dv=Tile(32, 64, 8, 2))}
# fp32 products run outside the tensor cores, from registers, on every GPU.
FLOAT = {
    128: Tiles(Tile(32, 32, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
    256: Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
}


def tiles_for(dtype: torch.dtype, head_dim: int, capability: tuple[int, int], shared_memory: int) -> Tiles:
    """head_dim: the larger of attn_dim and hidden_dim, at most 256; shared_memory: bytes a program may use."""
    if dtype == torch.float32:
        by_dim = FLOAT
    elif capability[0] == 10:
        by_dim = SM100
    else:
        by_dim = HALF[max(memory for memory in HALF if memory <= shared_memory)]
    return by_dim[min(dim for dim in by_dim if dim >= head_dim)]
