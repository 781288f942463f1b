"""`hstu_compile::mask_tile_states`: which tiles of an attention mask tensor are empty or all ones.

The attention kernels skip tiles by it. An op of its own, so that the layers of a model that share a mask share it too:
the mask is read once, not by every kernel of every layer.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds

GRAIN = 32  # rows and columns of a tile: the smallest that a 16-bit kernel has; coarser ones are unions of these

torch.library.define("hstu_compile::mask_tile_states", "(Tensor attn_mask) -> Tensor")


def mask_tile_states(attn_mask: Tensor) -> Tensor:
    """The state of each tile of GRAIN x GRAIN cells: 0 if all are 0, 2 if all are 1, else 1.

    Args:
        attn_mask: [B, H, N, N], bool or a number, any strides. NaN is neither 0 nor 1.

    Returns:
        [B, H, tiles, tiles] uint8, contiguous, tiles = ceil(N / GRAIN). Tiles at the end have the cells that there are.

    Raises:
        ValueError: attn_mask has another shape.
    """
    return torch.ops.hstu_compile.mask_tile_states(attn_mask)


def tile_states_shape(attn_mask: Tensor) -> tuple:
    """Of the result."""
    *lead, N = attn_mask.shape[:3]
    tiles = (N + GRAIN - 1) // GRAIN
    return *lead, tiles, tiles


def mask_tile_states_reference(attn_mask: Tensor) -> Tensor:
    """`mask_tile_states` in plain PyTorch."""
    *_, tiles = tile_states_shape(attn_mask)
    missing = tiles * GRAIN - attn_mask.shape[-1]

    def tiled(cells: Tensor, beyond: bool) -> Tensor:
        padded = F.pad(cells, (0, missing, 0, missing), value=beyond)
        return padded.unflatten(3, (tiles, GRAIN)).unflatten(2, (tiles, GRAIN))

    held = tiled(attn_mask != 0, False).any(5).any(3)
    ones = tiled(attn_mask == 1, True).all(5).all(3)
    return held.to(torch.uint8) + ones


def _check(attn_mask: Tensor) -> None:
    shape = tuple(attn_mask.shape)
    if len(shape) != 4:
        raise ValueError(f"mask_tile_states: the shape of attn_mask is {shape}, expected [B|1, H|1, N, N]")
    torch._check_value(
        shape[2] == shape[3], lambda: f"mask_tile_states: the shape of attn_mask is {shape}, expected [B|1, H|1, N, N]"
    )


@torch.library.register_fake("hstu_compile::mask_tile_states")
def _fake(attn_mask):
    _check(attn_mask)
    return attn_mask.new_empty(tile_states_shape(attn_mask), dtype=torch.uint8)


def _checked_kernel(attn_mask: Tensor) -> ModuleType | None:
    _check(attn_mask)
    has_kernel = attn_mask.is_cuda and importlib.util.find_spec("triton") is not None
    return importlib.import_module("hstu_compile.ops.kernels.mask_occupancy") if has_kernel else None


_kinds = Kinds(_checked_kernel)


@torch.library.impl("hstu_compile::mask_tile_states", ("CPU", "CUDA"))
def _mask_tile_states(attn_mask):
    features = (attn_mask.dtype, attn_mask.get_device(), attn_mask.shape, attn_mask.stride())
    kind = _kinds.kind(features, attn_mask)
    if kind.kernel is None:
        return mask_tile_states_reference(attn_mask)
    return kind.kernel.tile_states(attn_mask, GRAIN, kind.memory)
