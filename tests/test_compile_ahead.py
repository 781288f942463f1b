"""What is compiled ahead is what the step then launches: no kernel less, and none more."""

import importlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from test_launch import passed, recorded  # noqa: F401
from test_sm90_compiles import NOTHING
from torch import fx, nn

import hstu_compile
from bench.native_layer import HSTULayer, HSTUStack
from hstu_compile.ops import (
    kernel_table,
)
from hstu_compile.ops.compile_ahead import OpCall, TensorLike
from hstu_compile.ops.compile_ahead import compile_ahead as ops_compile_ahead
from hstu_compile.ops.hstu_attention import PARAMETERS
from hstu_compile.ops.implementation import IMPLEMENTATIONS
from hstu_compile.ops.kernels import ahead, attention_triton
from hstu_compile.ops.norm_gate_dropout import TRITON
from hstu_compile.passes import compile_ahead
from tests.models.cases import Stack
from tests.models.dense_padded import RelativeBias
from tests.models.nvidia_native import NvidiaNative
from tests.without_codegen import Compiled, inductor_without_codegen

ROOT = Path(__file__).resolve().parent.parent
H = 2


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    yield from inductor_without_codegen(monkeypatch)


@pytest.fixture
def kernels(recorded: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Tensors on the CPU take them, as far as to the launcher in C."""
    take(monkeypatch, "attention_sm90")
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


def take(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(kernel_table, "choose_attention", lambda *args, **call: kernel_table.Choice(name))


class Runs(NamedTuple):
    """Compiled kernels: one for each key of Triton's caches."""

    ahead: set[Any]
    launched: set[Any]

    def check(self, least: int) -> None:
        assert self.launched == self.ahead and len(self.ahead) >= least


@pytest.fixture
def runs(kernels: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Runs:
    caplog.set_level(logging.DEBUG, "hstu_compile")  # says what failed ahead
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


def bias_table(dim: int) -> tuple[nn.Module, tuple]:
    arguments = (torch.randn(3, 130, H * dim), torch.rand(3, 130, 130) > 0.5, torch.tensor([130, 7, 33]))
    return RelativeBias(H * dim, H, max_len=130), arguments


def step(model: nn.Module, args: tuple, train: bool = True, **how: Any) -> None:
    model, (x, *others) = model.bfloat16(), args
    run = torch.compile(model, backend=hstu_compile.backend, options={"strict": True}, **how)
    if train:
        run(x.bfloat16().requires_grad_(), *others).sum().backward()
    else:
        with torch.no_grad():
            run.eval()(x.bfloat16(), *others)
    for thread in [thread for threads in ahead._pending.values() for thread in threads]:
        thread.join()


@pytest.mark.parametrize("train", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("model", [dense, jagged])
def test_exactly_what_is_launched(inductor: Compiled, runs: Runs, model: Callable, dim: int, train: bool) -> None:
    step(*model(dim), train)
    runs.check(7 if train else 3)


@pytest.mark.parametrize("model", [mask_tensor, bias_table])
def test_of_every_other_op(inductor: Compiled, runs: Runs, model: Callable) -> None:
    step(*model(64))
    names = {compiled.name for compiled in runs.ahead}
    assert runs.launched == runs.ahead
    assert names > {"tile_states_kernel", "list_tiles_kernel", "dkdv_kernel"}
    assert (names > {"accumulate", "dbias_kernel", "sharers_kernel"}) == (model is bias_table)


def test_of_the_portable_kernels(inductor: Compiled, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, "attention_triton")
    monkeypatch.setattr(attention_triton, "capability_and_memory", lambda device: ((9, 0), 227 << 10))
    step(*jagged(64))
    runs.check(7)


def test_symbolic_sizes_are_those_of_the_first_step(inductor: Compiled, runs: Runs) -> None:
    step(*jagged(64), dynamic=True)
    assert any(isinstance(size, torch.SymInt) for gm in inductor.aot_graphs for size in sizes(gm))
    runs.check(7)


def sizes(gm: fx.GraphModule) -> Iterator[Any]:
    for node in gm.graph.find_nodes(op="placeholder"):
        yield from getattr(node.meta["val"], "shape", ())


def test_what_fails_ahead_fails_no_step(inductor: Compiled, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **keywords: Any) -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(triton.runtime.driver.active, "launcher_cls", fail)
    step(*dense(64), train=False)
    runs.check(3)
    runs.ahead.clear()
    monkeypatch.setitem(IMPLEMENTATIONS, torch.ops.hstu_compile.norm_gate_dropout_forward.default, fail)
    torch._dynamo.reset()
    step(*dense(64), train=False)
    assert len(runs.ahead) == 2


def test_without_a_gpu_nothing_is_compiled(inductor: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(compile_ahead, "compile_ahead", lambda *args: seen.append(args))
    step(*dense(8))
    assert not seen


class Slow:
    """Stands for a kernel whose compilation takes until it is told to end."""

    device_caches: dict[int, None] = {90: None}
    cache_key = "slow"

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.go, self.events = fails, threading.Event(), []

    def warmup(self, *args: Any, **keywords: Any) -> Any:
        self.go.wait()
        self.events.append("compiled")
        if self.fails:
            raise RuntimeError("not today")
        return mock.Mock()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        return lambda *args: self.events.append("launched")


@pytest.mark.parametrize("fails", [False, True])
def test_a_launch_waits(kernels: None, fails: bool) -> None:
    slow, other = Slow(fails), Slow()
    ahead.compile_in_background([ahead.Rehearsed(slow, (), {}, -1)], 1)
    ahead.launch_kernel(other, (1,))
    assert other.events == ["launched"] and not slow.events
    threading.Timer(0.2, slow.go.set).start()
    ahead.launch_kernel(slow, (1,))
    assert slow.events == ["compiled", "launched"] and not ahead._pending


def test_a_rehearsal_launches_and_allocates_nothing(kernels: None) -> None:
    like = TensorLike((1 << 40, H, 64), (4 * H * 64, 64, 1), 64, torch.bfloat16, torch.device("cpu"))
    offsets = TensorLike((9,), (1,), 0, torch.int64, torch.device("cpu"))
    call = {**NOTHING, "seq_offsets": offsets, "mask_tile_states": None, "max_seq_len": 1 << 20, "alpha": 1.0}
    arguments = [(call | {"scaling_seq_len": 8})[name] for name in PARAMETERS]
    passed.clear()
    with mock.patch.object(ahead, "compile_in_background") as compiling:
        ops_compile_ahead(
            [OpCall(torch.ops.hstu_compile.hstu_attention_forward.default, (like, like, like, *arguments))] * 2, None
        )
    (launches, _), _ = compiling.call_args
    assert [launch.kernel.__name__ for launch in launches] == ["zero_tail_kernel", "product_kernel"] and not passed


def test_an_exit_waits_for_what_is_being_compiled_alone() -> None:
    code = """
import time
import compile_only
from hstu_compile.ops.kernels import ahead

class Kernel:
    device_caches, cache_key = {90: None}, ""
    def warmup(self, grid):
        print("began", flush=True)
        time.sleep(1)

with compile_only.target(90):
    ahead.compile_in_background([ahead.Rehearsed(Kernel(), (), {}, -1)] * 20, 1)
    time.sleep(0.3)
"""
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | paths, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["began"] and not done.stderr
