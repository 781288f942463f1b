"""Ops that a graph sees by what they are made of: composite without autograd, and a Function with it.

A compiled graph has nothing left to differentiate: it calls the op of the forward, and no autograd in Python before it
(20 us a call).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("hstu_compile", "FRAGMENT")


def register_composite(name: str, forward: Callable, with_autograd: Callable) -> None:
    """Define `hstu_compile::name` as `forward`, and where autograd listens as `with_autograd`."""
    _library.impl(name, forward, "CompositeImplicitAutograd")
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta"):  # the alias "Autograd" ranks below a composite
        _library.impl(name, with_autograd, key)


def save_inputs(ctx: Any, inputs: Sequence[Any]) -> None:
    """Keep a Function's inputs, tensors and others, for its backward."""
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def saved_inputs(ctx: Any) -> list[Any]:
    """What `save_inputs` kept, in its order."""
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if value is None else value[0] for value in ctx.others]


def register_inference_only(name: str) -> None:
    """`hstu_compile::name` has no gradient: an error says so where autograd would ask for one."""

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            raise RuntimeError(
                f"hstu_compile::{name} has no gradient, and an input requires one; expected torch.no_grad()"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    op = getattr(torch.ops.hstu_compile, name).default
    _library.impl(name, call, "Autograd")
