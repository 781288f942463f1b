"""The gate of an attention over a paged history becomes one op with it; everything else is left alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import hstu_compile
from hstu_compile.ops import append_kv, norm_gate_dropout, paged_hstu_attention
from hstu_compile.passes import paged_attention, paged_gate
from hstu_compile.serving import engine as engine_module
from hstu_compile.serving.step import Step
from tests.models.meta_stu import MetaSTU
from tests.models.ranking import WIDTH, Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic
from tests.tracing import traced

H, D, ROWS, PAGE = 2, 16, 7, 16
W = H * D
EPS = {"norm_eps": 1e-6}
Function = Callable[..., object]


def attend(q: Tensor, k: Tensor, v: Tensor, pool: Tensor, *others: Tensor) -> Tensor:
    table, cached, offsets = others
    return paged_hstu_attention(
        q, k, v, pool, table, cached, seq_offsets=offsets, max_seq_len=40, alpha=0.25, scaling_seq_len=8.0
    )


def write_q(q: Tensor, *others: Tensor) -> Tensor:
    a = attend(q, *others)
    q.mul_(2.0)
    return a


def append(q: Tensor, k: Tensor, v: Tensor, pool: Tensor, *others: Tensor) -> Tensor:
    a = attend(q, k, v, pool, *others)
    table, cached, offsets = others
    append_kv(pool, k, v, seq_offsets=offsets, page_table=table, cached_lengths=cached)
    return a


REWRITTEN: dict[str, Function] = {
    "as it is": lambda u, w, *p: norm_gate_dropout(attend(*p), u, w, w, **EPS),
    "as rows": lambda u, w, *p: norm_gate_dropout(attend(*p).view(-1, W), u, **EPS, concat_u=True, concat_x=True),
    "rms norm of heads": lambda u, w, *p: norm_gate_dropout(attend(*p), u, w[:D], **EPS, rms=True, num_groups=H),
    "heads as rows": lambda u, w, *p: norm_gate_dropout(
        attend(*p).reshape(-1, D), u.reshape(-1, D), w[:D], activation="silu", **EPS
    ),
    "product normalised": lambda u, w, *p: norm_gate_dropout(attend(*p).flatten(1), u, w, gate_first=True, **EPS),
    "u is written between": lambda u, w, *p: (lambda a: norm_gate_dropout(a, u.mul_(2.0), w, **EPS))(attend(*p)),
    "twice": lambda u, w, *p: norm_gate_dropout(attend(*p), norm_gate_dropout(attend(*p), u, w, **EPS), w, **EPS),
}
LEFT: dict[str, Function] = {
    "read by another": lambda u, w, *p: (lambda a: norm_gate_dropout(a, u, w, **EPS) + a.flatten(1))(attend(*p)),
    "returned as rows": lambda u, w, *p: (lambda a: (norm_gate_dropout(a, u, **EPS), a))(attend(*p).view(-1, W)),
    "the gate itself": lambda u, w, *p: norm_gate_dropout(u, attend(*p), w, **EPS),
    "both": lambda u, w, *p: (lambda a: norm_gate_dropout(a, a, w, **EPS))(attend(*p)),
    "another dtype": lambda u, w, *p: norm_gate_dropout(attend(*p), u, w, out_dtype=torch.float64, **EPS),
    "scaled": lambda u, w, *p: norm_gate_dropout(attend(*p) * 2.0, u, w, **EPS),
    "rows mixed": lambda u, w, *p: norm_gate_dropout(attend(*p).transpose(0, 1).reshape(-1, W), u, w, **EPS),
    "weights of groups in shorter rows": lambda u, w, *p: norm_gate_dropout(
        attend(*p).reshape(-1, D), u.reshape(-1, D), w[:D].view(2, D // 2), num_groups=2, **EPS
    ),
    "heads joined one by one": lambda u, w, *p: norm_gate_dropout(
        attend(*p).reshape(-1, D), u.reshape(-1, D), concat_u=True, **EPS
    ),
    "q is written between": lambda u, w, *p: norm_gate_dropout(write_q(*p), u, w, **EPS),
    "the pool is written between": lambda u, w, *p: norm_gate_dropout(append(*p), u, w, **EPS),
}


def operands(rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """u, q, k, v, and the rest: w, pool, page table, cached lengths, offsets."""
    torch.manual_seed(rows)
    packed = torch.randn(rows, 4, H, D)
    new = [packed[:, 0].reshape(rows, W), *(packed[:, i].clone() for i in (1, 2, 3))]
    integers = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32), torch.tensor([17, 5], dtype=torch.int32)
    return new, [torch.randn(W), torch.randn(4, 2, PAGE, H, D), *integers, torch.tensor([0, 3, rows - 1])]


def rewritten(function: Function) -> tuple[fx.GraphModule, int]:
    new, fixed = operands(ROWS)

    def call(w, pool, table, cached, offsets, u, q, k, v):
        return function(u, w, q, k, v, pool, table, cached, offsets)

    with torch.no_grad():
        gm = traced(call, new, fixed=fixed)
    count = paged_gate.run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    assert paged_gate.run(gm.graph) == 0
    return gm, count


CASES = [(name, function, 1 + (name == "twice")) for name, function in REWRITTEN.items()]
CASES += [(name, function, 0) for name, function in LEFT.items()]


@pytest.mark.parametrize("function, count", [pytest.param(*case, id=name) for name, *case in CASES])
def test_rewritten_or_left_alone(function: Function, count: int) -> None:
    """With the same numbers, bit for bit, for any number of rows."""
    gm, found = rewritten(function)
    assert found == count
    calls = [node.target for node in gm.graph.nodes]
    assert calls.count(paged_gate.GATED) == count
    assert count == 0 or not {paged_attention.PAGED, paged_gate.GATE} & set(calls)
    for rows in (ROWS, 13):
        outs = []
        for form in ("rewritten", "as it was"):
            (u, *new), (w, *fixed) = operands(rows)
            if form == "rewritten":
                outs.append(gm(w, *fixed, u, *new))
            else:
                outs.append(function(u, w, *new, *fixed))
        torch.testing.assert_close(*outs, rtol=0, atol=0)


def test_dropout_is_left_alone() -> None:
    seed = torch.tensor([7])
    new, fixed = operands(ROWS)

    def call(w, pool, table, cached, offsets, seed, u, q, k, v):
        a = attend(q, k, v, pool, table, cached, offsets)
        return norm_gate_dropout(a, u, w, seed=seed, dropout_ratio=0.5, **EPS)

    with torch.no_grad():
        gm = traced(call, new, fixed=[*fixed, seed])
    assert paged_gate.run(gm.graph) == 0


class GroupNorm(Ranking):
    def layer(self) -> torch.nn.Module:
        return MetaSTU(WIDTH, num_heads=2, hidden_dim=16, attn_dim=16, group_norm=True)


class SizesOfTheAttention(MetaSTU):
    def output(self, a: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return super().output(a.view(a.shape[0], -1), u, x)


class Sizes(Ranking):
    def layer(self) -> torch.nn.Module:
        return SizesOfTheAttention(WIDTH, num_heads=2, hidden_dim=16, attn_dim=16)


@pytest.mark.parametrize("model", [Ranking, GroupNorm, Sizes])
def test_an_engine(model: Callable[..., Ranking], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer; the answers are those of the graph without the pass, bit for bit, and the order of writes is its."""
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)
    ranking = model(layers=2).eval()
    traffic = Traffic(ranking)
    requests = [traffic.request(["a", "b"], [9, n], [2, 3]) for n in (5, 7)]
    answers, orders = [], []
    for with_pass in (True, False):
        with monkeypatch.context() as patch:
            if not with_pass:
                patch.setattr(paged_gate, "run", lambda graph: 0)
            engine = hstu_compile.serve(ranking, max_batch=2, max_seq_len=MAX_SEQ_LEN, page_size=16)
            answers.append([engine(["a", "b"], *args) for args in requests])
            step = engine._step
        assert isinstance(step, Step)
        targets = [node.target for node in step.graph.graph.nodes]
        merged = targets.count(paged_gate.GATED)
        assert merged == (2 if with_pass else 0) == 2 - targets.count(paged_attention.PAGED)
        orders.append([t for t in targets if t in (paged_attention.WAIT, paged_attention.APPEND)])
    assert orders[0] == orders[1]
    for one, other, args in zip(*answers, requests, strict=True):
        assert torch.equal(one.output, other.output)
        traffic.check(one, args)
