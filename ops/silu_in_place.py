"""`hstu_compile::silu_`: silu of a projection where it stands, whose parts ops then read as strided slices.

Inductor computes silu of each part that an op reads apart: a launch, and a copy, of each.
"""

import torch
from torch import Tensor

from hstu_compile.ops.composite import register_inference_only

torch.library.define("hstu_compile::silu_", "(Tensor(a!) x) -> ()")


def silu_(x: Tensor) -> None:
    """x = x * sigmoid(x), of any shape and dtype, rounded once; no gradient."""
    torch.ops.hstu_compile.silu_(x)


@torch.library.register_fake("hstu_compile::silu_")
def _fake(x: Tensor) -> None:
    pass


@torch.library.impl("hstu_compile::silu_", ("CPU", "CUDA"))
def _silu(x: Tensor) -> None:
    torch.nn.functional.silu(x, inplace=True)


register_inference_only("silu_")
