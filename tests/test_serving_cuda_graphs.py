"""Requests that replay CUDA graphs: the same answers, and pad slots that write nowhere."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hstu_compile
from hstu_compile.serving import Engine, cuda_graphs
from hstu_compile.serving import engine as engine_module
from tests.models.ranking import Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZES = [(2, 16), (4, 64)]


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On the CPU a graph is a call with the very tensors of its recording, and nothing is compiled."""
    if request.param == "cuda":
        yield "cuda"
        return

    def record(launch: Callable[[], Sequence[Any]], pool: Any) -> tuple[Callable[[], None], Sequence[Any], int]:
        outputs = [x.clone() if isinstance(x, Tensor) else x for x in launch()]

        def replay() -> None:
            for static, x in zip(outputs, launch(), strict=True):
                static.copy_(x)

        return replay, outputs, 0

    monkeypatch.setattr(cuda_graphs, "supported", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)
    yield "cpu"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def engine_of(model: Ranking, **options: Any) -> Engine:
    options = {"max_batch": 4, "max_seq_len": MAX_SEQ_LEN, "page_size": 16, "cuda_graphs": SIZES} | options
    return hstu_compile.serve(model.eval(), **options)


@pytest.mark.parametrize("candidates", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers(candidates: int, dtype: torch.dtype, device: str) -> None:
    """Sizes inside and outside of the grid, in one order and another; arguments on the GPU and on the CPU."""
    model = Ranking(layers=2, times=True, candidates=candidates).to(device, dtype)
    traffic = Traffic(model, device)
    engine = engine_of(model)
    for users, histories, targets in (
        (["a"], [5], [2]),
        (["a", "b"], [9, 3], [0, 3]),
        (["c", "b", "a"], [20, 4, 9], [3, 0, 1]),
        (["d", "e", "f", "a"], [40, 30, 20, 12], [3, 3, 3, 3]),  # more new tokens than the grid has
        (["a"], [12], [1]),
    ):
        args = traffic.request(users, histories, targets)
        given = args if len(users) % 2 else tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
        traffic.check(engine(users, *given), args)
    assert engine._graphs is not None and (engine._graphs.replays, engine._graphs.launches) == (4, 1)
    assert "not recorded" not in engine.report() and "MiB more reserved" in engine.report()
    engine.close()


def test_pad_slots_write_nowhere(device: str) -> None:
    """Pages that no request owns stay as they are, and are not read: they hold NaN."""
    model = Ranking(layers=2).to(device, torch.bfloat16)
    traffic, engine = Traffic(model, device), engine_of(model)
    args = traffic.request(["a", "b"], [3, 2], [1, 0])
    engine(["a", "b"], *args)
    engine(["a", "b", "c", "d"], *traffic.request(["a", "b", "c", "d"], [3, 2, 1, 1], [1, 0, 0, 0]))
    assert engine._cache is not None
    gpu = engine._cache.gpu
    synchronize(device)
    for pool in gpu.pools:
        pool.fill_(torch.nan)
    engine.reload()
    for users, histories in ((["x"], [7]), (["y", "x", "z"], [20, 9, 2])):
        args = traffic.request(users, histories, [1] * len(users))
        traffic.check(engine(users, *args), args)
    synchronize(device)
    written = 9 + 20 + 2  # history tokens, and no candidate
    for pool in gpu.pools:
        values = pool[:, 0].isfinite().flatten(2).all(-1)
        assert int(values.sum()) == written
    engine.close()


def test_users_come_back_from_the_host(device: str) -> None:
    """A replay computes with what has been loaded in all layers."""
    model = Ranking(layers=3, candidates=2).to(device, torch.bfloat16)
    traffic = Traffic(model, device)
    engine = engine_of(model, num_pages=12, host=1 << 24)
    for _ in range(3):
        for user in "abcde":
            args = traffic.request([user], [40], [2])
            traffic.check(engine([user], *args), args)
        assert engine._cache is not None and engine._cache.host is not None
        engine._cache.host.drain()
    assert engine._cache.counters["host"].hits >= 5
    assert engine._graphs is not None and engine._graphs.launches == 0
    engine.close()


def test_weights_in_place(device: str) -> None:
    model = Ranking(layers=2).to(device, torch.bfloat16)
    traffic, engine = Traffic(model, device), engine_of(model)
    for _ in range(3):
        args = traffic.request(["a"], [9], [1])
        traffic.check(engine(["a"], *args), args)
        engine.reload({key: x * 1.2 for key, x in model.state_dict().items()})
    engine.close()
