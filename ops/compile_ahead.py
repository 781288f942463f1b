"""Compiling the kernels of calls that are still to come: each op's implementation is run on tensors without memory, and
what it would launch is compiled in the background.
"""

import logging
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from hstu_compile.ops.implementation import IMPLEMENTATIONS

log = logging.getLogger("hstu_compile")


class TensorLike(NamedTuple):
    """A tensor, but for its memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        elements = self.storage_offset + (0 if 0 in self.shape else last + 1)
        memory = torch.empty(elements, dtype=self.dtype, device=self.device)
        return memory.as_strided(self.shape, self.stride, self.storage_offset)


class OpCall(NamedTuple):
    op: torch._ops.OpOverload
    arguments: tuple[Hashable, ...]  # a TensorLike for a tensor


def compile_ahead(calls: Iterable[OpCall], threads: int | None) -> None:
    """Of calls of ops in IMPLEMENTATIONS on a GPU; does not wait. threads: as for `compile_in_background`."""
    from hstu_compile.ops.kernels import ahead

    with _disable_current_modes(), FakeTensorMode(), ahead.rehearsal() as launches:
        for op, arguments in dict.fromkeys(calls):
            try:
                IMPLEMENTATIONS[op](*(x.empty() if isinstance(x, TensorLike) else x for x in arguments))
            except Exception:  # as at a launch, where it concerns somebody
                log.debug("hstu_compile: what %s launches was not found ahead", op, exc_info=True)
    ahead.compile_in_background(launches, threads)
