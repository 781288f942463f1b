"""A residual's sum is part of the kernel that reads it, rounded as it is written; other addmm are left alone."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_passes import post_grad

import hstu_compile
from bench.native_jagged import HSTUBlock
from hstu_compile.ops import norm_gate_dropout
from hstu_compile.passes import residual
from hstu_compile.passes.graph import aten
from tests.models.ranking import ITEMS
from tests.serving_traffic import MAX_SEQ_LEN, Traffic
from tests.tracing import traced

W, SQUARE = torch.randn(6, 8), torch.randn(8, 8)
Function = Callable[[Tensor, Tensor, Tensor], Any]


def chain(x: Tensor, w: Tensor, square: Tensor) -> Tensor:
    x = torch.mm(x, w)
    for _ in range(3):
        x = torch.addmm(x, F.silu(x), square)
    return x


def norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


CASES: dict[str, tuple[Function, int]] = {
    "read by a norm": (lambda x, w, s: norm(torch.addmm(x @ w, x, w)), 1),
    "and returned": (lambda x, w, s: (lambda y: (y, norm(y)))(torch.addmm(x @ w, x, w)), 1),
    "a view of it": (lambda x, w, s: torch.addmm(x @ w, x, w).view(-1, 2, 4).sum(1), 1),
    "sums of sums, the last returned": (chain, 2),
    "read by another sum alone": (lambda x, w, s: norm(torch.addmm(torch.addmm(x @ w, x, w), x, w)), 2),
    "an input": (lambda x, w, s: norm(torch.addmm(s, s.sin(), s)), 1),
    "returned": (lambda x, w, s: torch.addmm(x @ w, x, w), 0),
    "a view of it returned": (lambda x, w, s: torch.addmm(x @ w, x, w).view(-1, 2, 4), 0),
    "read by a product": (lambda x, w, s: torch.mm(torch.addmm(x @ w, x, w), s), 0),
    "read by an op of ours": (
        lambda x, w, s: norm_gate_dropout(torch.addmm(x @ w, x, w), x @ w, None, None, norm_eps=1e-5),
        0,
    ),
    "a bias": (lambda x, w, s: norm(torch.addmm(s[0], x, w)), 0),
    "a row": (lambda x, w, s: norm(torch.addmm(s[:1], x, w)), 0),
    "a column": (lambda x, w, s: norm(torch.addmm(s[:, :1], s, s)), 0),
    "scaled": (lambda x, w, s: norm(torch.addmm(x @ w, x, w, beta=2)), 0),
}


@pytest.mark.parametrize("function, count", CASES.values(), ids=CASES)
def test_taken_apart_or_left_alone(function: Function, count: int) -> None:
    gm = traced(lambda w, s, x: function(x, w, s), [torch.randn(5, 6)], fixed=[W, SQUARE])
    assert residual.run(gm.graph) == count
    gm.graph.lint()
    gm.recompile()
    x = torch.randn(9, 6)
    torch.testing.assert_close(gm(W, SQUARE, x), function(x, W, SQUARE))


class Seen(CustomGraphPass):
    """A user's pass: how many addmm of a whole x the graph has that Inductor is about to lower, and how many others."""

    def __init__(self, counts: list[tuple[int, int]]) -> None:
        self.counts = counts

    def __call__(self, graph: fx.Graph) -> None:
        dims = [n.args[0].meta["val"].dim() for n in graph.find_nodes(op="call_function", target=aten.addmm.default)]
        self.counts.append((dims.count(2), dims.count(1)))

    def uuid(self) -> Any:
        return None  # nothing is cached


@pytest.fixture(params=[False, True], ids=["cpu", "as on a gpu"])
def counts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    monkeypatch.setattr(post_grad, "is_gpu", lambda device: request.param)
    found = list[tuple[int, int]]()
    with config.patch(post_grad_custom_post_pass=Seen(found)):
        yield found


class Scores(nn.Module):
    """A block behind embeddings; what it gives is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.block = nn.Embedding(ITEMS, 16), HSTUBlock(3, 16, 2, 16, MAX_SEQ_LEN)

    def forward(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, n: int, times: Tensor) -> Tensor:
        return self.block(self.items(ids), offsets, num_targets, n)


def serve(model: nn.Module) -> None:
    traffic = Traffic(model)
    engine = hstu_compile.serve(model, max_batch=2, max_seq_len=MAX_SEQ_LEN, page_size=16)
    for users, histories, targets in ((["a", "b"], [7, 4], [2, 1]), (["b"], [20], [3])):
        args = traffic.request(users, histories, targets)
        traffic.check(engine(users, *args), args)


def test_served(counts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what Inductor makes an addmm, the last layer's only is left, which nothing reads; and those of a bias."""
    model = Scores().eval().to(torch.bfloat16)
    serve(model)
    assert counts == [(1, 3)]
    torch._dynamo.reset()
    monkeypatch.setattr(residual, "run", lambda graph: 0)
    serve(model)
    assert counts[1:] == [(3, 3)]


class Written(Scores):
    """The second layer's sum is an addmm already."""

    def forward(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, n: int, times: Tensor) -> Tensor:
        x = super().forward(ids, offsets, num_targets, n, times)
        return norm(torch.addmm(x, norm(x), self.items.weight[:16]))


def test_an_addmm_of_the_model_is_left_alone(counts: list[tuple[int, int]]) -> None:
    serve(Written().eval().to(torch.bfloat16))
    assert counts == [(1, 3)]


def test_the_users_own_passes(counts: list[tuple[int, int]]) -> None:
    """They are called, before Inductor's patterns and after all; what can't be cached is not."""
    called = []
    with config.patch(post_grad_custom_pre_pass=lambda graph: called.append(graph)):
        hooks = residual.hooks()
        serve(Scores().eval())
    assert len(called) == len(counts) == 1
    assert all(hook.uuid() is None for hook in hooks.values())
    with config.patch(post_grad_custom_pre_pass=None, post_grad_custom_post_pass=None):
        ids = [hook.uuid() for hook in residual.hooks().values()]
    assert None not in ids and ids[0] != ids[1]
