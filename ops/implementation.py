"""What runs each op, on a CPU as on a GPU: registered with torch, and kept by the op for `compile_ahead`."""

from collections.abc import Callable

import torch

IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable] = {}


def implements(name: str) -> Callable[[Callable], Callable]:
    """Of `hstu_compile::name`, which is defined."""

    def register(function: Callable) -> Callable:
        torch.library.impl(f"hstu_compile::{name}", ("CPU", "CUDA"))(function)
        IMPLEMENTATIONS[getattr(torch.ops.hstu_compile, name).default] = function
        return function

    return register
