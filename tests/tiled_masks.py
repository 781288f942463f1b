"""Mask tensors as the kernels take them."""

from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Workspace
from hstu_compile.ops.kernels.mask_occupancy import TiledMask, list_tiles, tile_states
from hstu_compile.ops.mask_tile_states import GRAIN


def tiled(mask: Tensor | None, grain: int = GRAIN) -> TiledMask | None:
    return None if mask is None else TiledMask(mask, tile_states(mask, grain), grain)


def occupied_tiles(mask: TiledMask, rows: int, cols: int, by_keys: bool = False) -> tuple[Tensor, Tensor]:
    """Visits and ranks: see `list_tiles`."""
    workspace = Workspace(mask.states.device, Extent(0))
    launch, *lists = list_tiles(mask, rows, cols, workspace, by_keys=by_keys)
    launch()
    return tuple(lists)
