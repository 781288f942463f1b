"""Requests that replay CUDA graphs: the same answers, and pad slots that write nowhere."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hstu_compile
from hstu_compile.ops import waiting
from hstu_compile.serving import Engine, cuda_graphs
from hstu_compile.serving import engine as engine_module
from tests.models.native_ranking import NativeRanking
from tests.models.ranking import WIDTH, Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SIZES = [(2, 16), (4, 64)]


class Called:
    """What stands for a recording on the CPU."""

    bytes = 0

    def __init__(self, launch: Callable[[], Sequence[Any]], pool: Any, by_layers: bool = False) -> None:
        self._launch, self._by_layers = launch, by_layers
        self.outputs = [x.clone() if isinstance(x, Tensor) else x for x in launch()]

    def replay(self, wait: Callable[[int], None] | None = None) -> None:
        assert self._by_layers == (wait is not None)
        with waiting(wait) if wait is not None else contextlib.nullcontext():
            for static, x in zip(self.outputs, self._launch(), strict=True):
                static.copy_(x)


@pytest.fixture(autouse=True, params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On the CPU a graph is a call with the very tensors of its recording, and nothing is compiled."""
    if request.param == "cuda":
        yield "cuda"
        return

    monkeypatch.setattr(cuda_graphs, "record", Called)
    monkeypatch.setattr(cuda_graphs, "supported", lambda device: True)
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)
    yield "cpu"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def engine_of(model: nn.Module, **options: Any) -> Engine:
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


def test_numbers_that_no_graph_reads(device: str) -> None:
    """The longest length is another in every request: the same graph answers."""
    model = NativeRanking(MAX_SEQ_LEN).to(device, torch.bfloat16)
    traffic, engine = Traffic(model, device), engine_of(model)
    for history in (9, 12, 15):
        ids, offsets, targets, _, times = traffic.request(["a"], [history], [2])
        args = ids, offsets, targets, history + 2, times
        traffic.check(engine(["a"], *args), args)
    assert engine._graphs is not None and (engine._graphs.replays, engine._graphs.launches) == (3, 0)
    engine.close()


def test_inference_mode(device: str) -> None:
    """Inside of it and outside, in any order."""
    model = Ranking(layers=2).to(device, torch.bfloat16)
    traffic, engine = Traffic(model, device), engine_of(model)
    for inside, history in ((True, 5), (False, 9), (True, 30), (False, 45)):
        args = traffic.request(["a"], [history], [1])
        with torch.inference_mode(inside):
            answer = engine(["a"], *(x.clone() if isinstance(x, Tensor) else x for x in args))
        traffic.check(answer, args)
    engine.close()


class TimeSinceTheFirst(Ranking):
    """Reads times at new rows, and where sequences begin."""

    def embed(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, timestamps: Tensor) -> Tensor:
        row = torch.arange(ids.shape[0], device=ids.device)
        sequence = torch.bucketize(row, offsets[1:], right=True)
        begins = timestamps[offsets[:-1].clamp(max=ids.shape[0] - 1)]
        gap = (timestamps - begins[sequence]).float().log1p().to(self.head.weight.dtype)
        return super().embed(ids, offsets, num_targets, None) + gap.unsqueeze(-1)


def picked(engine: Engine) -> dict[str, bool]:
    """Of which inputs the graph has new rows only."""
    assert engine._step is not None
    return dict(zip((n.name for n in engine._step.inputs), engine._step.padding._is_picked, strict=True))


@pytest.mark.parametrize("kind", [Ranking, TimeSinceTheFirst])
def test_inputs_on_the_host(kind: type[Ranking], device: str) -> None:
    """Only new rows are copied of those that are read there alone; all of the others."""
    model = kind(layers=2, times=True).to(device, torch.bfloat16)
    traffic, engine = Traffic(model, device), engine_of(model)
    for number, (user, history) in enumerate((("a", 5), ("b", 9), ("b", 12), ("a", 8), ("a", 9), ("b", 13))):
        args = list(traffic.request([user], [history], [2]))
        args[4] = args[4] + 1000 * (user == "b")
        answer = engine([user], *(x.cpu() if isinstance(x, Tensor) else x for x in args))
        traffic.check(answer, args)
        assert number < 2 or len(answer.rows) == 5 - 2 * (number > 3)
    assert engine._step is not None and engine._graphs is not None and engine._graphs.replays == 6
    names = picked(engine)
    assert (names["l_args_0_"], names["l_args_1_"], names["l_args_4_"]) == (True, False, kind is Ranking)
    engine.close()


class Given(Ranking):
    """Takes embeddings, and numbers of two kinds of each token, instead of ids."""

    def forward(self, x: Tensor, kinds: Tensor, offsets: Tensor, num_targets: Tensor, n: int) -> Tensor:  # type: ignore[override]
        x = x.to(self.head.weight.dtype) + self.items(kinds).sum(1)
        for layer in self.layers:
            x = layer(x, offsets, n, num_targets)
        return self.head(self.norm(x)).squeeze(-1)


class GivenTraffic(Traffic):
    """Both follow from a user's ids."""

    def request(self, *args: Any) -> tuple[Any, ...]:
        ids, offsets, num_targets, n, _ = super().request(*args)
        x = torch.stack([(ids * k).sin() for k in range(1, WIDTH + 1)], dim=-1)
        return x.to(self.model.head.weight.dtype), torch.stack([ids % 7, ids % 5], dim=-1), offsets, num_targets, n


AS_GIVEN: dict[str, Callable[[Tensor], Tensor]] = {
    "on the device": lambda x: x,
    "on the host": lambda x: x.cpu(),
    "strided": lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0],
    "strided on the host": lambda x: torch.stack([x, x.flip(0)], dim=-1)[..., 0].cpu(),
}


@pytest.mark.parametrize("staged_bytes", [cuda_graphs.STAGED_BYTES, 0])
@pytest.mark.parametrize("first", AS_GIVEN)
def test_old_rows_are_not_read(first: str, staged_bytes: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs that are read at new rows only a graph has no others, and nothing in them matters."""
    monkeypatch.setattr(cuda_graphs, "STAGED_BYTES", staged_bytes)
    model = Given(layers=2).to(device, torch.bfloat16)
    traffic, engine, cached = GivenTraffic(model, device), engine_of(model), dict[str, int]()
    as_given = [AS_GIVEN[first], *AS_GIVEN.values()] * 2
    for how, (users, histories, targets) in zip(
        as_given,
        (
            (["a"], [9], [2]),
            (["a", "b"], [11, 4], [1, 3]),
            (["b", "c", "a"], [9, 20, 11], [1, 2, 1]),
            (["d", "e", "a", "b"], [30, 40, 12, 9], [3, 3, 1, 1]),  # launched
            (["c"], [20], [1]),
            (["c"], [21], [1]),
        ),
        strict=False,
    ):
        args = traffic.request(users, histories, targets)
        x, kinds = args[0].clone(), args[1].clone()
        for user, begin in zip(users, args[2].tolist(), strict=False):
            x[begin : begin + cached.get(user, 0)], kinds[begin : begin + cached.get(user, 0)] = torch.nan, 1 << 40
        traffic.check(engine(users, how(x), how(kinds), *args[2:]), args)
        cached |= dict(zip(users, histories, strict=True))
    assert picked(engine) | {"l_args_0_": True, "l_args_1_": True} == picked(engine)
    assert engine._graphs is not None and (engine._graphs.replays, engine._graphs.launches) == (5, 1)
    for (_, tokens), recorded in engine._graphs._recorded.items():
        assert not isinstance(recorded, str)
        rooms = [x for x in recorded.inputs if isinstance(x, Tensor) and x.dim() == 2]
        assert [tuple(x.shape) for x in rooms] == [(tokens, WIDTH), (tokens, 2)]
    engine.close()


def test_without_tokens(device: str) -> None:
    model = Given(layers=2).to(device, torch.bfloat16)
    traffic, engine = GivenTraffic(model, device), engine_of(model)
    for users, history in ((["a"], 5), (["b"], 0), (["c", "d"], 0)):
        args = traffic.request(users, [history] * len(users), [0] * len(users))
        answer = engine(users, *args)
        assert answer.output.shape == answer.rows.shape == (history,)
    engine.close()


def test_fewer_tokens_than_the_offsets_say(device: str) -> None:
    model = Given(layers=2).to(device, torch.bfloat16)
    traffic, engine = GivenTraffic(model, device), engine_of(model)
    x, kinds, *others = traffic.request(["a"], [5], [1])
    engine(["a"], x, kinds, *others)
    with pytest.raises(ValueError, match="the last offset is 6, expected at most 5"):
        engine(["a"], x[:5], kinds[:5], *others)
    engine.close()
