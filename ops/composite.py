"""Ops that a graph sees by what they are made of: composite without autograd, and a Function with it.

A compiled graph has nothing left to differentiate: it calls the op of the forward, and no autograd in Python before it
(20 us a call).
"""

from collections.abc import Callable

import torch

_library = torch.library.Library("hstu_compile", "FRAGMENT")


def register_composite(name: str, forward: Callable, with_autograd: Callable) -> None:
    """Define `hstu_compile::name` as `forward`, and where autograd listens as `with_autograd`."""
    _library.impl(name, forward, "CompositeImplicitAutograd")
    for key in ("AutogradCPU", "AutogradCUDA", "AutogradMeta"):  # the alias "Autograd" ranks below a composite
        _library.impl(name, with_autograd, key)
