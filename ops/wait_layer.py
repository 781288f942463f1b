"""`hstu_compile::wait_layer`: where a compiled graph is about to read the cached keys and values of a layer."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_wait: Callable[[int], None] | None = None


@contextlib.contextmanager
def waiting(wait: Callable[[int], None]) -> Iterator[None]:
    """Inside, every `wait_layer` calls `wait(layer)`."""
    global _wait
    before, _wait = _wait, wait
    try:
        yield
    finally:
        _wait = before


# The pool counts as written: what reads it comes after. `before` counts as read: a compiler that moves calls to where
# their results are needed still has it computed before the wait.
torch.library.define("hstu_compile::wait_layer", "(Tensor(a!) pool, int layer, Tensor? before=None) -> ()")


@torch.library.register_fake("hstu_compile::wait_layer")
def _fake(pool: Tensor, layer: int, before: Tensor | None = None) -> None:
    pass


@torch.library.impl("hstu_compile::wait_layer", ("CPU", "CUDA"))
def _wait_layer(pool: Tensor, layer: int, before: Tensor | None = None) -> None:
    if _wait is not None:
        _wait(layer)
