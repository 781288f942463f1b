"""What Triton hands to its launcher in C, without a GPU: that launcher and the encoding of descriptors only record."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import compile_only
import pytest
import torch
import triton

from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels import norm_gate_dropout as gate
from hstu_compile.ops.kernels.launch import PIECE

EMPTY = torch.empty
passed: list[tuple] = []  # to C


@dataclass(frozen=True)
class Descriptor:
    pointer: int
    shape: str


class Utilities:
    """Of Triton's driver."""

    def fill_tma_descriptor(self, pointer: int, *shape: Any) -> Descriptor:
        return Descriptor(pointer, str(shape))

    fill_tma_descriptor_tiled = fill_tma_descriptor


def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything up to the launcher in C is Triton's own."""
    from triton.backends.nvidia import driver

    def init_handles(self) -> None:
        self.function = id(self)
        self._run = run = object.__new__(driver.CudaLauncher)
        descriptors = self.metadata.tensordesc_meta
        run.launch = driver.wrap_handle_tensordesc(lambda *a: passed.append(a), self.src.signature, descriptors)
        run.num_ctas, run.launch_cooperative_grid, run.launch_pdl, run.gsan_enabled = 1, False, False, False
        run.global_scratch_size = run.profile_scratch_size = run.global_scratch_align = run.profile_scratch_align = 0
        if not triton.__version__.startswith("3.6."):
            run.arg_annotations, run.kernel_signature = [], b""

    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", init_handles)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # that of CPU tensors
    for module in (attention_sm90, gate):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    with compile_only.target(90):
        triton.runtime.driver.active.utils = Utilities()
        yield


def resolved(x: Any) -> Any:
    """As C sees it; hooks, of which there are none, aside."""
    if isinstance(x, (list, tuple)):
        return tuple(map(resolved, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def without_hooks(arguments: tuple) -> tuple:
    for_hooks = (triton.knobs.HookChain, triton.compiler.compiler.LazyDict, type(None))
    return tuple(x for x in resolved(arguments) if not isinstance(x, for_hooks))


def same_addresses_again(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Allocations come at the same addresses after each call of it; one of several pieces where the pieces would."""
    pool, taken = EMPTY(1 << 26, dtype=torch.uint8), [0]

    def from_pool(*size: Any, **keywords: Any) -> torch.Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        start, count = taken[0], shape.numel() * keywords["dtype"].itemsize
        taken[0] += -(-count // PIECE) * PIECE
        return pool[start : start + count].view(keywords["dtype"]).view(shape)

    def restart() -> None:
        taken[0] = 0
        monkeypatch.setattr(torch, "empty", from_pool)
        monkeypatch.setattr(torch, "empty_like", lambda t, memory_format=None: from_pool(t.shape, dtype=t.dtype))

    return restart


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched the public way from now on."""
    names, run = [], triton.runtime.JITFunction.run

    def count(self, *args: Any, **keywords: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **keywords)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", count)
    return names
