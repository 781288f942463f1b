"""How the rows and heads of [T, H, D] and [B, N, H, D] lie in memory."""

import torch
from torch import Tensor


def in_one_piece(t: Tensor) -> bool:
    """Whether the heads of a row stand side by side."""
    return t.shape[-2] == 1 or t.stride(-2) == t.shape[-1]


def evenly_apart(t: Tensor) -> Tensor:
    """t, [..., H, D], or a copy whose rows are all as far apart as two of them."""
    even = t.stride(-1) == 1 and (t.dim() == 3 or t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    return t if even else t.clone(memory_format=torch.contiguous_format)
