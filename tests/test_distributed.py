"""Compiled layers under DDP and FSDP2, over two processes: outputs and gradients of one process on the whole batch.

In float32, as attention is not fused in float64: one process in float64 is the reference, one as it is the budget.
Inductor's code is not generated: two processes would compile C++ for a minute.
"""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import hstu_compile
from bench.native_layer import HSTUStack
from hstu_compile import compiler, verify
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.without_codegen import inductor_without_codegen

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

PROCESSES = 2
LAYERS, WIDTH, HEADS, HEAD_DIM = 2, 128, 8, 64  # a layer fills a DDP bucket of 1 MiB
STEPS = 2  # DDP lays its buckets out anew after the first
SEQ_LEN, LENGTHS = 12, torch.tensor([12, 7, 3, 9])
BACKEND: dict[str, Any] = {
    "backend": hstu_compile.backend,
    "options": {"strict": True, "expect": 1, "verify": "first"},
}


class Model(HSTUStack):
    def __init__(self, autocast: bool) -> None:
        super().__init__(LAYERS, WIDTH, HEADS, HEAD_DIM, dropout_ratio=0.0)
        self.autocast = autocast

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return super().forward(x, lengths)


def compiled_ddp(model: Model) -> Callable:
    """Dynamo's DDPOptimizer splits the graph before each layer's projection."""
    return torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), **BACKEND)


def ddp_of_compiled(model: Model) -> Callable:
    torch._dynamo.config.optimize_ddp = False
    return DistributedDataParallel(torch.compile(model, **BACKEND))


def sharded_then_compiled(model: Model) -> Callable:
    for layer in model.layers:
        fully_shard(layer)
        layer.compile(fullgraph=True, **BACKEND)
    return fully_shard(model)


def compiled_then_sharded(model: Model) -> Callable:
    for layer in model.layers:
        layer.compile(fullgraph=True, **BACKEND)
        fully_shard(layer)
    return fully_shard(model)


CASES: dict[str, tuple[Callable[[Model], Callable], bool, list[int]]] = {
    # how, whether under autocast, the attention regions of each graph
    "torch.compile(DDP)": (compiled_ddp, False, [0, 1, 1]),
    "torch.compile(DDP), autocast": (compiled_ddp, True, [0, 1, 1]),
    "DDP(torch.compile)": (ddp_of_compiled, False, [2]),
    "fully_shard, compile": (sharded_then_compiled, False, [1, 1]),
    "compile, fully_shard": (compiled_then_sharded, False, [1, 1]),
}


def train(model: nn.Module, run: Callable, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Outputs and gradients of each step, on some rows of the batch."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    dtype = next(model.parameters()).dtype
    found = {}
    for step in range(STEPS):
        x = torch.randn(len(LENGTHS), SEQ_LEN, WIDTH, generator=draw)[rows].to(dtype)
        out = run(x, LENGTHS[rows])
        out.square().sum(-1).mean().backward()
        found[f"output {step}"] = out.detach()
        for name, parameter in model.named_parameters():
            found[f"gradient {step} of {name}"] = getattr(parameter.grad, "full_tensor", lambda p=parameter: p.grad)()
        optimizer.step()
        optimizer.zero_grad()
    return found


def new_model(autocast: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(autocast)


def process(rank: int, folder: Path) -> None:
    """Trains every case on every second row of the batch; what it found goes into the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=PROCESSES)
    rewrite, compare = compiler.rewrite, verify._compare
    found = {}
    for name, (how, autocast, _) in CASES.items():
        torch._dynamo.reset()
        regions, verified = [], []

        def counted(*args: Any) -> Any:
            result = rewrite(*args)
            regions.append(len(result.report.fused("attention")))  # noqa: B023
            return result

        def noted(*args: Any) -> None:
            compare(*args)
            verified.append(True)  # noqa: B023

        with pytest.MonkeyPatch.context() as monkeypatch, torch._dynamo.config.patch(optimize_ddp=True):
            monkeypatch.setattr(compiler, "rewrite", counted)
            monkeypatch.setattr(verify, "_compare", noted)
            with contextlib.contextmanager(inductor_without_codegen)(monkeypatch):
                model = new_model(autocast)
                values = train(model, how(model), slice(rank, None, PROCESSES))
        found[name] = values, regions, len(verified)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[dict[str, Tensor], list[int], int]]]:
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as monkeypatch:
        # fully_shard would take a GPU that is there, which gloo does not serve.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.multiprocessing.spawn(process, (folder,), PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@functools.cache
def one_process(dtype: torch.dtype, autocast: bool) -> dict[str, Tensor]:
    model = new_model(autocast).to(dtype)
    return train(model, model)


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name: str, found: list[dict[str, tuple[dict[str, Tensor], list[int], int]]]) -> None:
    _, autocast, expected = CASES[name]
    eager, exact = one_process(torch.float32, autocast), one_process(torch.float64, False)
    for _, regions, verified in (process[name] for process in found):
        assert regions == expected and verified == sum(n > 0 for n in expected)
    ours = [process[name][0] for process in found]
    for key, reference in exact.items():
        if key.startswith("output"):
            for rank in range(PROCESSES):
                rows = slice(rank, None, PROCESSES)
                assert_within_budget(ours[rank][key], eager[key][rows], reference[rows], FORWARD, key)
        else:
            assert torch.equal(ours[0][key], ours[1][key])
            assert_within_budget(ours[0][key], eager[key], reference, BACKWARD, key)
