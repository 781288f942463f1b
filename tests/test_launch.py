"""Launches done again hand the same to Triton's launcher in C as the public way does, whatever changes between calls.

Without a GPU, that launcher and the encoding of descriptors are stand-ins that record; on a Hopper GPU, the results.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import compile_only
import pytest
import torch
import triton
from test_sm90_compiles import NOTHING, on_hopper

from hstu_compile.ops import hstu_attention
from hstu_compile.ops.kernels import attention_sm90, launch

H = 2
passed: list[tuple] = []  # to C


class Utilities:
    """Of Triton's driver."""

    def fill_tma_descriptor(self, pointer: int, *shape: Any) -> tuple:
        return ("descriptor", pointer, *map(str, shape))

    fill_tma_descriptor_tiled = fill_tma_descriptor


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    monkeypatch.setattr(attention_sm90, "processors", lambda device: 132)
    with compile_only.target(90):
        triton.runtime.driver.active.utils = Utilities()
        yield


def resolved(x: Any) -> Any:
    """As C sees it; hooks, of which there are none, aside."""
    if isinstance(x, (list, tuple)):
        return tuple(map(resolved, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def without_hooks(arguments: tuple) -> tuple:
    return tuple(x for x in resolved(arguments) if not isinstance(x, (launch.triton.knobs.HookChain, type(None), dict)))


def inputs(lengths: list[int], dim: int, shift: int = 0, **call: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v, dout and the keywords of a call; `shift` elements from an aligned address."""
    T = sum(lengths) + 3
    packed = torch.empty(T * 4 * H * dim + shift, dtype=torch.bfloat16)[shift:].view(T, 4 * H * dim)
    tensors = [x.view(T, H, dim) for x in packed.chunk(4, 1)[1:]]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    call = {**NOTHING, "seq_offsets": offsets, "max_seq_len": max(lengths), "alpha": 0.5, "scale": 0.1} | call
    return [*tensors, torch.empty(T, H, dim, dtype=torch.bfloat16)], call


def both(tensors: list[torch.Tensor], call: dict[str, Any], memory: dict | None) -> list[tuple]:
    """What C gets for a forward and a backward."""
    q, k, v, dout = tensors
    passed.clear()
    attention_sm90.forward(q, k, v, memory=memory, **call)
    attention_sm90.backward(dout, q, k, v, memory=memory, needs_bias_grad=False, **call)
    return list(passed)


@pytest.fixture
def same_addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Allocations come in the same order at the same addresses after each call of it."""
    empty, pool, taken = torch.empty, [], [0]

    def from_pool(*size: Any, **keywords: Any) -> torch.Tensor:
        if taken[0] == len(pool):
            pool.append(empty(1 << 20, dtype=torch.int64))
        buffer = pool[taken[0]].view(keywords["dtype"])
        taken[0] += 1
        size = size[0] if not isinstance(size[0], int) else size
        return buffer[: torch.Size(size).numel()].view(*size)

    def restart() -> None:
        taken[0] = 0
        monkeypatch.setattr(attention_sm90.torch, "empty", from_pool)

    return restart


STEPS = [[100, 37], [100, 37], [5, 260], [1, 1, 1], [129, 64, 7], [16] * 16]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_c_gets_the_same(recorded, same_addresses, dim: int) -> None:
    memory: dict = {}
    for number, lengths in enumerate(STEPS):
        tensors, call = inputs(lengths, dim)
        same_addresses()
        again = both(tensors, call, memory)
        same_addresses()
        public = both(tensors, call, None)
        assert len(again) == len(public) == (4 if dim == 64 else 5)
        assert list(map(without_hooks, again)) == list(map(without_hooks, public)), number
        assert [len(relaunches) for relaunches in memory.values()] == [2, 2 if dim == 64 else 3]
