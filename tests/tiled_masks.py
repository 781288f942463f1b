"""Mask tensors as the kernels take them."""

from torch import Tensor

from hstu_compile.ops.kernels.mask_occupancy import TiledMask, tile_states
from hstu_compile.ops.mask_tile_states import GRAIN


def tiled(mask: Tensor | None, grain: int = GRAIN) -> TiledMask | None:
    return None if mask is None else TiledMask(mask, tile_states(mask, grain), grain)
