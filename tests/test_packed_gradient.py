"""One gradient of u, v, q and k: where it is found, that no other is left in the backward, and what is left alone."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import hstu_compile
from bench.native_layer import HSTUStack
from hstu_compile.ops import hstu_attention
from hstu_compile.passes import NAMES, apply, packed_gradient
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.models import MODELS
from tests.models.dense_padded import RelativeBias
from tests.models.packed_slices import (
    EXPLAINED,
    HEADS,
    RIGHT,
    B,
    D,
    H,
    N,
    W,
    attend,
    gated,
    halves_of_a_head_apart,
    u_viewed_first,
)
from tests.tracing import traced
from tests.without_codegen import Compiled, inductor_without_codegen

aten, OPS = torch.ops.aten, torch.ops.hstu_compile
FUSED, ATTENTION, FORWARD_OP = (
    OPS.silu_attention.default,
    OPS.hstu_attention.default,
    OPS.hstu_attention_forward.default,
)
FUSED_BACKWARD, ATTENTION_BACKWARD = OPS.silu_attention_backward.default, OPS.hstu_attention_backward.default
GATED, GATED_BACKWARD = OPS.gated_silu_attention.default, OPS.gated_silu_attention_backward.default
E = 16


def calls(graph: fx.Graph | fx.GraphModule, target: Any) -> int:
    graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
    return len(graph.find_nodes(op="call_function", target=target))


def graph_of(model: Callable[..., Tensor]) -> fx.GraphModule:
    return traced(model, [torch.randn(B, N, 4 * W)])


def with_gradient(model: Callable[..., Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    out = model(z)
    return out, torch.autograd.grad(out, z, torch.ones_like(out))[0]


@pytest.mark.parametrize("model", RIGHT, ids=lambda model: model.__name__)
def test_found_and_the_same_numbers(model: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    gm, report = graph_of(model), Report()
    assert packed_gradient.run(gm, report) == 1
    gm.graph.lint()
    gm.recompile()
    assert calls(gm, FUSED) == 1 and calls(gm, ATTENTION) == 0
    (region,) = report.fused("packed_gradient")
    assert region.what == f"one gradient through {RIGHT[model]} -> attention" and not report.missed()
    z = torch.randn(B, N, 4 * W)
    ours, eager = with_gradient(gm, z), with_gradient(model, z)
    exact = with_gradient(model, z.double())
    for m, *triple in zip((FORWARD, BACKWARD), ours, eager, exact, strict=True):
        assert_within_budget(*triple, m)
    assert packed_gradient.run(gm, Report()) == 0


@pytest.mark.parametrize("model", EXPLAINED, ids=lambda model: model.__name__)
def test_near_misses_are_left_alone_and_explained(model: Callable[..., Tensor]) -> None:
    gm, report = graph_of(model), Report()
    before = str(gm.graph)
    assert packed_gradient.run(gm, report) == 0 and str(gm.graph) == before
    (miss,) = report.missed("packed_gradient")
    assert any(words in miss.reason for words in EXPLAINED[model].split("|")), miss.reason


def test_the_size_of_a_view_of_u_is_wanted_before_the_attention() -> None:
    gm, report = graph_of(u_viewed_first), Report()
    (attention,) = gm.graph.find_nodes(op="call_function", target=ATTENTION)
    (view,) = gm.graph.find_nodes(op="call_function", target=aten.transpose.int)[:1]
    with gm.graph.inserting_before(attention):
        gm.graph.call_function(aten.sym_size.int, (view, 0))
    assert packed_gradient.run(gm, report) == 0
    assert "u is used before the attention: sym_size" in report.missed()[0].reason


def cast_between(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q.half(), k.half(), v.half()))


def detached(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q, k.detach(), v))


def scaled(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q * 2, k, v))


@pytest.mark.parametrize("model", [cast_between, detached, scaled, halves_of_a_head_apart])
def test_other_layers_are_none_of_its_business(model: Callable[..., Tensor]) -> None:
    gm, report = graph_of(model), Report()
    before = str(gm.graph)
    assert packed_gradient.run(gm, report) == 0 and str(gm.graph) == before and not report.regions


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield from inductor_without_codegen(monkeypatch)


def native(layers: int = 1) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return HSTUStack(layers, 24, 2, 8, dropout_ratio=0.0), (torch.randn(3, 10, 24), torch.tensor([10, 4, 7]))


def step(model: nn.Module, arguments: tuple[Any, ...], **options: Any) -> list[Tensor]:
    x, *others = arguments
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = torch.compile(model, backend=hstu_compile.backend, options={"strict": True, **options})(x, *others)
    out = out[0] if isinstance(out, tuple) else out
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()], allow_unused=True)]


def values_and_gradients(call: Callable[..., Tensor], model: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = call(x, *others)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("layers", [1, 2])
def test_the_native_layer(layers: int, inductor: Compiled) -> None:
    """No concatenation and no other backward of attention; the attention's own count is as it was."""
    model, arguments = native(layers)
    ours = step(model, arguments, expect=layers)
    forward, backward = inductor.aot_graphs
    assert calls(forward, FORWARD_OP) == layers and calls(backward, FORWARD_OP) == 0
    assert calls(backward, GATED_BACKWARD) == layers and calls(backward, ATTENTION_BACKWARD) == 0
    assert not calls(backward, FUSED_BACKWARD)
    assert not calls(backward, aten.cat.default)
    torch._dynamo.reset()
    without = step(model, arguments, disable=("packed_gradient",))
    assert calls(inductor.aot_graphs[-1], aten.cat.default) == layers
    x, lengths = arguments
    double = copy.deepcopy(model).double()
    exact = values_and_gradients(double, double, x.double(), lengths)
    for i, triple in enumerate(zip(ours, without, exact, strict=True)):
        assert_within_budget(*triple, BACKWARD if i else FORWARD)


# name -> of how many layers the gradients are packed; why not of the others
STAND_INS = {
    "meta_stu": (1, None),
    "nvidia_native": (1, None),
    "research unbroken": (0, "q has a second use: jagged_to_padded_dense"),
    "four linears": (0, None),
    "relative bias": (1, None),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_ins(name: str, inductor: Compiled) -> None:
    packed, reason = STAND_INS[name]
    torch.manual_seed(0)
    model, arguments = MODELS[name].model(), MODELS[name].arguments(3)
    report = hstu_compile.explain(model, *arguments).reports[0]
    assert len(report.fused("packed_gradient")) == packed and len(report.fused("attention")) == 1
    assert [reason in region.reason for region in report.missed("packed_gradient")] == [True] * (reason is not None)
    torch._dynamo.reset()
    step(model, arguments)
    backward = inductor.aot_graphs[-1]
    ours = calls(backward, GATED_BACKWARD) + calls(backward, FUSED_BACKWARD)
    assert (ours, calls(backward, ATTENTION_BACKWARD)) == (packed, 1 - packed)
    assert not packed or not calls(backward, aten.cat.default)


class Jagged(nn.Module):
    """Research HSTU's layer without its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.uvqk, self.o = nn.Parameter(torch.randn(16, 4 * W) / 4), nn.Linear(W, 16)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        u, v, q, k = F.silu(F.layer_norm(x, (16,)) @ self.uvqk).split(W, dim=-1)
        q, k, v = (t.view(-1, H, D) for t in (q, k, v))
        a = hstu_attention(q, k, v, seq_offsets=offsets, max_seq_len=N, alpha=0.5, scaling_seq_len=N)
        return self.o(F.layer_norm(a.flatten(1), (W,)) * u) + x


def test_a_factor_of_q_may_be_a_number_that_changes(inductor: Compiled) -> None:
    case = MODELS["nvidia_native"]
    run = torch.compile(case.model(), backend=hstu_compile.backend, options={"strict": True}, dynamic=True)
    run(*case.arguments(3))
    assert ATTENTION in inductor.targets[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_jagged_with_any_number_of_tokens(checkpointed: bool, inductor: Compiled) -> None:
    torch.manual_seed(0)
    model = Jagged()

    def call(x: Tensor, offsets: Tensor) -> Tensor:
        if checkpointed:
            return torch.utils.checkpoint.checkpoint(model, x, offsets, use_reentrant=False)
        return model(x, offsets)

    compiled = torch.compile(call, backend=hstu_compile.backend, options={"verify": "first"}, dynamic=True)
    for lengths in ([3, 8, 0], [5, 1], [8, 8, 7, 2]):
        offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        x = torch.randn(sum(lengths), 16)
        double = copy.deepcopy(model).double()
        ours, eager = (values_and_gradients(f, model, x, offsets) for f in (compiled, model))
        exact = values_and_gradients(double, double, x.double(), offsets)
        for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
            assert_within_budget(*triple, BACKWARD if i else FORWARD)
    assert len(inductor.graphs) == 1, "another number of tokens compiled again"
    backward = inductor.aot_graphs[-1]
    assert calls(backward, GATED_BACKWARD) == 1 and not calls(backward, aten.cat.default)


def test_inference_costs_nothing(inductor: Compiled) -> None:
    """The same ops, silu of what the attention reads alone, and the numbers."""
    model, arguments = native()
    model.eval()
    with torch.no_grad():
        ours = torch.compile(model, backend=hstu_compile.backend)(*arguments)
        (graph,) = inductor.aot_graphs
        torch._dynamo.reset()
        options = {"disable": ("packed_gradient",)}
        without = torch.compile(model, backend=hstu_compile.backend, options=options)(*arguments)
        x, lengths = arguments
        exact = copy.deepcopy(model).double()(x.double(), lengths)
    other = inductor.aot_graphs[-1]

    for op in (FORWARD_OP, OPS.norm_gate_dropout_forward.default):
        assert calls(graph, op) == calls(other, op) == 1
    for gm, computed in ((graph, 3), (other, 4)):
        exponentials = gm.graph.find_nodes(op="call_function", target=aten.exp.default)
        assert sum(n.meta["val"].numel() for n in exponentials) == computed * arguments[0].shape[:-1].numel() * 16
    assert_within_budget(ours, without, exact, FORWARD)


def test_a_layer_with_everything_is_rewritten_once() -> None:
    """All passes twice, in their order: the second time nothing is found."""

    def layer(weight: Tensor, x: Tensor) -> Tensor:
        u, v, q, k = F.silu(F.layer_norm(x, (E,)) @ weight).split(W, dim=-1)
        q, k, v = (t.view(HEADS) for t in (q, k, v))
        p = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k)).tril() / N
        return F.layer_norm(torch.einsum("bhnm,bmhd->bnhd", p, v).flatten(2), (W,)) * u

    gm, report = traced(layer, [torch.randn(B, N, E)], fixed=[torch.randn(E, 4 * W)]), Report()
    assert apply(gm, report, NAMES) == 4
    assert [len(report.fused(name)) for name in ("attention", "output", "packed_gradient")] == [1, 1, 1]
    assert len(report.recognised("uvqk")) == 1
    assert apply(gm, Report(), NAMES) == 0


def test_a_bias_has_a_gradient_of_its_own(inductor: Compiled) -> None:
    torch.manual_seed(0)
    model, arguments = RelativeBias(), MODELS["relative bias"].arguments(3)
    ours = step(model, arguments, expect=1)
    assert calls(inductor.aot_graphs[-1], FUSED_BACKWARD) == 1
    double, wide = copy.deepcopy(model).double(), [t.double() if t.is_floating_point() else t for t in arguments]
    eager, exact = (values_and_gradients(m, m, *args) for m, args in ((model, arguments), (double, wide)))
    assert any(p is model.table.weight for p in model.parameters())
    for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_budget(*triple, BACKWARD if i else FORWARD)
