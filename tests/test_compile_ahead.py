"""What is compiled ahead is what the step then launches: no kernel less, and none more."""

import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any, NamedTuple

import pytest
import torch
import triton
from test_launch import recorded  # noqa: F401
from torch import nn

import hstu_compile
from bench.native_layer import HSTULayer, HSTUStack
from hstu_compile.ops import (
    kernel_table,
)
from hstu_compile.ops.kernels import ahead
from hstu_compile.ops.norm_gate_dropout import TRITON
from hstu_compile.passes import compile_ahead
from tests.models.cases import Stack
from tests.models.nvidia_native import NvidiaNative
from tests.without_codegen import Compiled, inductor_without_codegen

H = 2


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    yield from inductor_without_codegen(monkeypatch)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Tensors on the CPU take them, as far as to the launcher in C."""
    chosen = kernel_table.Choice(getattr(request, "param", "attention_sm90"))
    monkeypatch.setattr(kernel_table, "choose_attention", lambda *args, **call: chosen)
    stand_ins = {
        "norm_gate_dropout": ("runs_on", lambda *args: TRITON),
        "mask_tile_states": ("has_kernels", lambda device: True),
        "table_lookup": ("has_kernels", lambda device: True),
        "hstu_attention": ("checks_values", lambda device: False),
        "silu_attention": ("checks_values", lambda device: False),
    }
    for name, stand_in in stand_ins.items():  # their names are those of functions too
        module = importlib.import_module(f"hstu_compile.ops.{name}")
        monkeypatch.setattr(module, *stand_in)
        if hasattr(module, "_kinds"):  # launches that are not Triton's any more
            monkeypatch.setattr(module._kinds, "known", {})
    monkeypatch.setattr(compile_ahead, "has_kernels", lambda device: True)
    triton.runtime.driver.active.launcher_cls = lambda source, metadata: None
    monkeypatch.setenv("TRITON_CACHE_DIR", triton.knobs.cache.dir)
    ahead._pending.clear()


class Runs(NamedTuple):
    """Compiled kernels: one for each key of Triton's caches."""

    ahead: set[Any]
    launched: set[Any]


@pytest.fixture
def runs(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Runs:
    seen, run = Runs(set(), set()), triton.runtime.JITFunction.run

    def watched(self: Any, *args: Any, warmup: bool, **keywords: Any) -> Any:
        assert warmup == (threading.current_thread() is not threading.main_thread())
        compiled = run(self, *args, warmup=warmup, **keywords)
        (seen.ahead if warmup else seen.launched).add(compiled)
        return compiled

    monkeypatch.setattr(triton.runtime.JITFunction, "run", watched)
    return seen


def dense(dim: int) -> tuple[nn.Module, tuple]:
    return HSTUStack(2, H * dim, H, dim), (torch.randn(3, 40, H * dim), torch.tensor([40, 7, 33]))


def jagged(dim: int) -> tuple[nn.Module, tuple]:
    layers = (NvidiaNative(H * dim, H, dim) for _ in range(2))
    ones = torch.ones(3, dtype=torch.int64)
    return Stack(*layers), (torch.randn(80, H * dim), torch.tensor([0, 40, 47, 80]), 40, 40, ones, ones)


def mask_tensor(dim: int) -> tuple[nn.Module, tuple]:
    return HSTULayer(H * dim, H, dim, 0.2), (torch.randn(3, 40, H * dim), torch.rand(3, 40, 40) > 0.5)


def step(model: nn.Module, args: tuple, train: bool) -> None:
    model, (x, *others) = model.bfloat16(), args
    run = torch.compile(model, backend=hstu_compile.backend, options={"strict": True})
    if train:
        run(x.bfloat16().requires_grad_(), *others).sum().backward()
    else:
        with torch.no_grad():
            run.eval()(x.bfloat16(), *others)
    wait([future for futures in ahead._pending.values() for future in futures])


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("model", [dense, jagged, mask_tensor])
def test_exactly_what_is_launched(inductor: Compiled, runs: Runs, model: Callable, dim: int, train: bool) -> None:
    step(*model(dim), train)
    assert runs.launched == runs.ahead and len(runs.ahead) >= (7 if train else 3)
