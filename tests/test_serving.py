"""hstu_compile.serve: cached equals uncached, whatever comes in whatever order; one graph; no old row is computed."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hstu_compile
from hstu_compile.kv_cache import CapacityError, HostKVStorageManager, MemoryStorage, PageLayout
from hstu_compile.kv_cache.storage import StorageError
from hstu_compile.passes.batch_sizes import expression
from hstu_compile.passes.graph import is_floating, shape
from hstu_compile.serving import Engine
from hstu_compile.serving import engine as engine_module
from tests.models.ranking import WIDTH, Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic
from tests.without_codegen import Compiled, inductor_without_codegen

MAX_BATCH = 3
USERS = 5


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    yield from inductor_without_codegen(monkeypatch)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph as it is. Inductor without its code generation would copy the pools at each write."""
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)


def serve(model: nn.Module, **options: Any) -> Engine:
    options = {"max_batch": MAX_BATCH, "max_seq_len": MAX_SEQ_LEN, "page_size": 16} | options
    return hstu_compile.serve(model.eval(), **options)


MODELS = {
    "all tokens": lambda: Ranking(),
    "candidates": lambda: Ranking(candidates=3),
    "times": lambda: Ranking(times=True, layers=2),
}

# (what, user, tokens more, candidates): a few users grow, are asked about, are forgotten; weights are loaded anew.
EVENTS = st.lists(
    st.one_of(
        st.lists(
            st.tuples(st.integers(0, USERS - 1), st.integers(0, 9), st.integers(0, 3)),
            min_size=1,
            max_size=MAX_BATCH,
            unique_by=lambda asked: asked[0],
        ),
        st.sampled_from(["reload", "forget"]),
    ),
    max_size=12,
)


@pytest.mark.parametrize("name", MODELS)
def test_any_order_of_requests(name: str, eager: None) -> None:
    """Pages for fewer users than there are: some are evicted, to the host or for good."""
    model = MODELS[name]()
    traffic, rounds = Traffic(model), itertools.count()
    engine = serve(model, num_pages=MAX_BATCH * 3, host=1 << 16)

    @settings(max_examples=12)
    @given(EVENTS)
    def run(events: list[Any]) -> None:
        first, lengths, epochs = next(rounds), [0] * USERS, [0] * USERS
        for event in events:
            if event == "reload":
                state = {key: torch.randn_like(x) * 0.3 for key, x in model.state_dict().items() if "weight" in key}
                engine.reload(model.state_dict() | state)
            elif event == "forget":
                engine.forget(f"{first}:0")
                lengths[0], epochs[0] = 0, epochs[0] + 1
            else:
                asked = [(u, min(lengths[u] + more, MAX_SEQ_LEN - 3), targets) for u, more, targets in event]
                asked = [(u, history, targets or not history) for u, history, targets in asked]  # no empty sequence
                for u, history, _ in asked:
                    lengths[u] = history
                users, histories, targets = zip(*((f"{first}:{u}", h, int(t)) for u, h, t in asked), strict=True)
                args = traffic.request([(u, epochs[int(u[-1])]) for u in users], histories, targets)
                traffic.check(engine(list(users), *args), args)

    run()
    engine.close()


def test_batches_of_any_size_are_one_graph(inductor: Compiled) -> None:
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model)
    for users, histories, targets in (([0], [2], [0]), ([1, 2, 0], [9, 5, 5], [0, 3, 1]), ([2, 1], [5, 10], [1, 0])):
        args = traffic.request(users, histories, targets)
        traffic.check(engine(users, *args), args)
    assert len(inductor.graphs) == 1


@pytest.mark.parametrize("page_size", [16, 32, 64])
def test_page_sizes(page_size: int, eager: None) -> None:
    model = Ranking(layers=1, candidates=2)
    traffic, engine = Traffic(model), serve(model, page_size=page_size)
    for history in (0, 15, 16, 16, 17, 32, 33, 46):
        args = traffic.request(["a"], [history], [2])
        traffic.check(engine(["a"], *args), args)


def test_rows_are_the_new_ones(eager: None) -> None:
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model)
    assert engine(["a"], *traffic.request(["a"], [5], [0])).rows.tolist() == [0, 1, 2, 3, 4]
    answer = engine(["b", "a"], *traffic.request(["b", "a"], [2, 7], [1, 1]))
    assert answer.rows.tolist() == [0, 1, 2, 3 + 5, 3 + 6, 3 + 7] and answer.output.shape == (6,)
    assert engine(["a"], *traffic.request(["a"], [7], [0])).rows.tolist() == []
    engine.reload()
    assert len(engine(["a"], *traffic.request(["a"], [7], [0])).rows) == 7
    engine.reload(version="first")
    assert len(engine(["a"], *traffic.request(["a"], [7], [0])).rows) == 7
    with pytest.raises(ValueError, match="version is None, expected another name than 'first'"):
        engine.reload()
    assert len(engine(["a"], *traffic.request(["a"], [7], [0])).rows) == 0


def test_rows_that_are_read_are_computed_again(eager: None) -> None:
    """The model reads the last token where there are no candidates. Full pages stay as they are."""
    model = Ranking(layers=1, candidates=1)
    traffic, engine = Traffic(model), serve(model)
    pools = []
    for _ in range(2):
        args = traffic.request(["a", "b"], [16, 4], [0, 1])
        answer = engine(["a", "b"], *args)
        traffic.check(answer, args)
        assert engine._cache is not None
        pools.append(engine._cache.gpu.pools[0].view(torch.int32).clone())  # some is NaN
    assert answer.rows.tolist() == [15, 16 + 4]
    assert torch.equal(*pools)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_computed_for_old_rows(name: str, eager: None) -> None:
    """No floating-point value of the graph has a row for each token of the request."""
    model = MODELS[name]()
    engine = serve(model)
    engine(["a", "b"], *Traffic(model).request(["a", "b"], [7, 3], [1, 2]))
    step = engine._step
    assert step is not None and not step.computed_whole
    tokens = expression(step._tokens)
    sizes = {size for n in step.graph.graph.nodes if is_floating(n) for size in map(expression, shape(n))}
    assert tokens.is_Symbol and not any(tokens in size.free_symbols for size in sizes)
    embeddings = [n for n in step.graph.graph.nodes if n.target is torch.ops.aten.embedding.default]
    assert {expression(shape(n.args[1])[0]) for n in embeddings} == {expression(shape(step.rows)[0])}


class Broken(MemoryStorage):
    """Of whatever is read nothing is right."""

    def read_all(self, *args: Any, **kwargs: Any) -> Any:
        raise StorageError("broken")


def test_a_failed_load_is_computed(eager: None) -> None:
    def host(layout: PageLayout) -> HostKVStorageManager:
        return HostKVStorageManager(Broken(layout, 64), 64)

    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model, num_pages=3 * MAX_BATCH, host=host)
    for _ in range(3):
        for user in "abcde":
            args = traffic.request([user], [40], [2])
            traffic.check(engine([user], *args), args)
    assert engine._cache is not None and engine._cache.counters["host"].failures
    engine.close()


def test_users_come_back_from_the_host() -> None:
    """Through Inductor: what is loaded while the graph runs is there when its layer comes."""
    model = Ranking(layers=2)
    traffic, engine = Traffic(model), serve(model, num_pages=3 * MAX_BATCH, host=1 << 24)
    rows = []
    for _ in range(2):
        for user in "abcde":
            args = traffic.request([user], [40], [2])
            answer = engine([user], *args)
            traffic.check(answer, args)
            rows.append(len(answer.rows))
        assert engine._cache is not None and engine._cache.host is not None
        engine._cache.host.drain()
    assert rows == [42] * 5 + [40 - 32 + 2] * 5  # whole pages are kept
    engine.close()


def test_pages_may_hold_anything_else(eager: None) -> None:
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model, num_pages=3 * MAX_BATCH)
    args = traffic.request(["a"], [3], [1])
    engine(["a"], *args)
    assert engine._cache is not None
    for pool in engine._cache.gpu.pools:
        pool.fill_(torch.nan)
    engine.reload()
    for users, histories in ((["a"], [3]), (["b", "c"], [20, 17]), (["a", "b"], [18, 21])):
        args = traffic.request(users, histories, [1] * len(users))
        traffic.check(engine(users, *args), args)


def test_numbers_that_keys_depend_on_stay(eager: None) -> None:
    """This model divides by max_seq_len."""
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model)
    ids, offsets, targets, n, times = traffic.request(["a"], [3], [1])
    engine(["a"], ids, offsets, targets, n, times)
    with pytest.raises(
        ValueError, match=r"args\[3\] is 49, expected 48 as before: keys and values of cached tokens depend on it"
    ):
        engine(["a"], ids, offsets, targets, n + 1, times)
    assert "must be the same in every request" in engine.report()


def test_the_default_device_is_the_callers(eager: None) -> None:
    """What the engine computes itself is where it belongs, wherever the caller makes tensors."""
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model)
    for users, histories, targets in ((["a", "b"], [4, 3], [1, 0]), (["a"], [20], [2])):
        args = traffic.request(users, histories, targets)
        with torch.device("meta"):
            answer = engine(users, *args)
        traffic.check(answer, args)
    engine.close()


def test_first_requests_of_one_token(eager: None) -> None:
    """The model answers them itself: they can't be captured."""
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model)
    for users, histories, targets in (
        (["a"], [1], [0]),
        (["b"], [0], [1]),
        (["a", "b"], [4, 3], [1, 0]),
        (["a"], [5], [0]),
    ):
        args = traffic.request(users, histories, targets)
        traffic.check(engine(users, *args), args)
    assert engine._cache is not None and engine._cache.counters["gpu"].hits == 1
    engine.close()


def test_errors(eager: None) -> None:
    """Nothing has changed after one."""
    model = Ranking(times=True, layers=1)
    traffic, engine = Traffic(model), serve(model)
    ids, offsets, targets, n, times = args = traffic.request(["a"], [3], [1])
    engine(["a"], *args)
    for users, wrong, message in (
        (["a", "b"], args, "users has 2 names, expected 1, one for each sequence"),
        (["a"], (ids, offsets.int(), *args[2:]), "expected torch.int64, 1 dims"),
        (["a"], (ids, offsets, targets, n, times[:-1]), r"a size of args\[4\] is 3, expected 4 as in the others"),
        (["a"], (ids, offsets, torch.tensor([9]), n, times), "'a' has 4 tokens and 9 candidates, expected"),
        (["a", "a"], traffic.request(["a", "a"], [4, 4], [0, 0]), "is twice in the batch"),
        (["a"], traffic.request(["a"], [2], [0]), "expected at least"),
    ):
        with pytest.raises(ValueError, match=message):
            engine(users, *wrong)
    traffic.check(engine(["a"], *args), args)


def test_errors_of_serve() -> None:
    with pytest.raises(ValueError, match=r"model.training is True, expected a model in eval mode"):
        hstu_compile.serve(Ranking(), max_batch=1, max_seq_len=8)
    with pytest.raises(ValueError, match="max_batch is 0, expected a positive number"):
        serve(Ranking(), max_batch=0)
    with pytest.raises(ValueError, match=r"cuda_graphs has \(4, 8\), expected"):
        serve(Ranking(), cuda_graphs=[(4, 8)])


def test_too_many_pages(eager: None) -> None:
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model, num_pages=2)
    with pytest.raises(CapacityError):
        engine(["a"], *traffic.request(["a"], [40], [1]))
    args = traffic.request(["a"], [20], [1])
    traffic.check(engine(["a"], *args), args)


def test_weights_written_in_place(eager: None) -> None:
    model = Ranking(layers=1)
    traffic, engine = Traffic(model), serve(model)
    engine(["a"], *traffic.request(["a"], [9], [1]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    engine.reload()
    args = traffic.request(["a"], [11], [1])
    traffic.check(engine(["a"], *args), args)
    with torch.no_grad():
        model.head = nn.Linear(WIDTH, 1)
    engine.reload()
    traffic.check(engine(["a"], *args), args)
