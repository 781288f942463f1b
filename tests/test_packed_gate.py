"""The gate that takes u before its silu: where it is found, the same numbers, and what is left alone."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from hstu_compile.ops import hstu_attention
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.models.packed_slices import B, D, H, N, W
from tests.test_packed_gradient import E, calls, values_and_gradients
from tests.without_codegen import Compiled, inductor_without_codegen

OPS = torch.ops.hstu_compile
GATED_BACKWARD, GATE_BACKWARD = OPS.gated_silu_attention_backward.default, OPS.norm_gate_dropout_backward.default
OFFSETS = torch.tensor([0, 5, 5, 13])


class Layer(nn.Module):
    """Norm, projection with silu, attention and a gate, from `order` of u, v, q, k; jagged if x is [T, E]."""

    order = "uvqk"

    def __init__(self) -> None:
        super().__init__()
        self.uvqk, self.o = nn.Linear(E, 4 * W), nn.Linear(W, E)
        self.weight = nn.Parameter(torch.randn(W))

    def forward(self, x: Tensor) -> Tensor:
        s = F.silu(self.uvqk(x))
        parts = dict(zip(self.order, s.split(W, dim=-1), strict=True))
        return self.o(self.gate(parts["u"], self.attend(*(parts[name] for name in "qkv")))) + x

    def attend(self, *qkv: Tensor) -> Tensor:
        q, k, v = (t if t.shape[-1] == D else t.unflatten(-1, (H, D)) for t in qkv)
        offsets = OFFSETS if q.dim() == 3 else None
        a = hstu_attention(q, k, v, seq_offsets=offsets, max_seq_len=N, alpha=0.5, scaling_seq_len=N)
        return a.flatten(-2)

    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return F.layer_norm(a, (W,), self.weight) * u


class UInTheMiddle(Layer):
    order = "quvk"


class ULast(Layer):
    order = "kqvu"


class WithoutAffine(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.weight = None

    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return u * F.layer_norm(a, (W,))


class NormOfEachHead(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        a = a.unflatten(-1, (H, D))
        return (F.layer_norm(a, (D,), self.weight[:D]) * u.unflatten(-1, (H, D))).flatten(-2)


class JoinedNorm(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        norm = F.layer_norm(a, (W,), self.weight)
        return torch.cat([a, norm, norm * u], dim=-1)[..., :W]


class UIsJoined(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return torch.cat([u, F.layer_norm(a, (W,), self.weight) * u], dim=-1)[..., W:]


class SiluOnUOnly(Layer):
    """As Meta's STU: the silu of u is also part of the result."""

    activated = "u"

    def forward(self, x: Tensor) -> Tensor:
        parts = dict(zip("uvqk", self.uvqk(x).split(W, dim=-1), strict=True))
        u, q, k, v = (F.silu(parts[name]) if name in self.activated else parts[name] for name in "uqkv")
        return self.o(self.gate(u, self.attend(q, k, v))) + x

    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return torch.cat([u, a, F.layer_norm(a, (W,), self.weight) * u], dim=-1)[..., 2 * W :]


class SiluOnUOnlyForTheGate(SiluOnUOnly):
    gate = Layer.gate


class SiluOnVAndQ(SiluOnUOnly):
    activated = "vq"


class SiluOnEach(SiluOnUOnly):
    activated = "uvqk"


class Interleaved(Layer):
    """As NVIDIA's: the heads' u, v, q and k side by side."""

    def forward(self, x: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(x)).unflatten(-1, (H, 4 * D)).split(D, dim=-1)
        return self.o(self.gate(u.reshape(*x.shape[:-1], W), self.attend(q, k, v))) + x


class InterleavedSiluOnU(Interleaved):
    def forward(self, x: Tensor) -> Tensor:
        q, u, k, v = self.uvqk(x).unflatten(-1, (H, 4 * D)).split(D, dim=-1)
        return self.o(self.gate(F.silu(u).flatten(-2), self.attend(q, k, v))) + x


class UIsReadAgain(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return super().gate(u, a) + u


class AttentionIsReadAgain(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return super().gate(u, a) + a


class Sigmoid(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        return super().gate(torch.sigmoid(u), a)


class OfTwoAttentions(Layer):
    """The gate normalises another attention than that of the slices."""

    def forward(self, x: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(x)).split(W, dim=-1)
        other = self.attend(*(F.silu(x[..., :W]) for _ in range(3)))
        return self.o(self.gate(u, other) + self.attend(q, k, v))


class GradModeChanges(Layer):
    def gate(self, u: Tensor, a: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 + self.weight.mean()
        return super().gate(u, a) * scale


# How many of u, v, q and k have a silu that is in memory.
FOUND = {
    Layer: 3,
    UInTheMiddle: 3,
    ULast: 3,
    WithoutAffine: 3,
    NormOfEachHead: 3,
    JoinedNorm: 3,
    UIsJoined: 3,
    SiluOnUOnly: 0,
    SiluOnUOnlyForTheGate: 0,
    SiluOnVAndQ: 2,
    SiluOnEach: 3,
    Interleaved: 3,
    InterleavedSiluOnU: 0,
}
LEFT = {
    UIsReadAgain: None,
    AttentionIsReadAgain: None,
    Sigmoid: "the gate applies sigmoid to silu(u)",
    OfTwoAttentions: None,
    GradModeChanges: "grad mode changes",
}


def inputs(layout: str) -> Tensor:
    return torch.randn(*((int(OFFSETS[-1]),) if layout == "jagged" else (B, N)), E)


def check(model: nn.Module, x: Tensor, rewritten: Callable[..., Tensor]) -> None:
    double = copy.deepcopy(model).double()
    exact = values_and_gradients(double, double, x.double())
    ours, eager = (values_and_gradients(call, model, x) for call in (rewritten, model))
    for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_budget(*triple, BACKWARD if i else FORWARD)


def report(layer: nn.Module, x: Tensor) -> Report:
    (found,) = hstu_compile.explain(layer, x).reports
    return found


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield from inductor_without_codegen(monkeypatch)


@pytest.mark.parametrize("layout", ["jagged", "dense"])
@pytest.mark.parametrize("model", FOUND, ids=lambda m: m.__name__)
def test_found_and_the_same_numbers(model: type[Layer], layout: str, inductor: Compiled) -> None:
    torch.manual_seed(0)
    layer, x = model(), inputs(layout)
    assert [region.what.endswith("attention -> gate") for region in report(layer, x).fused("packed_gradient")] == [True]
    check(layer, x, torch.compile(layer, backend=hstu_compile.backend, options={"strict": True}))
    forward, backward = inductor.aot_graphs
    assert calls(backward, GATED_BACKWARD) == 1 and calls(backward, GATE_BACKWARD) == 0
    exponentials = forward.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert sum(n.meta["val"].numel() for n in exponentials) == FOUND[model] * W * x.shape[:-1].numel()


@pytest.mark.parametrize("model", LEFT, ids=lambda m: m.__name__)
def test_near_misses_are_left_alone_and_explained(model: type[Layer], inductor: Compiled) -> None:
    torch.manual_seed(0)
    layer, x = model(), inputs("dense")
    reasons = [r.reason for r in report(layer, x).missed("packed_gradient") if r.what.endswith("gate")]
    assert len(reasons) == (LEFT[model] is not None) and all(LEFT[model] in reason for reason in reasons)
    check(layer, x, torch.compile(layer, backend=hstu_compile.backend, options={"strict": True}))
    assert not calls(inductor.aot_graphs[-1], GATED_BACKWARD)


def test_x_written_between_attention_and_gate(inductor: Compiled) -> None:
    """An argument, in inference: there eager allows it."""

    class Written(Layer):
        def forward(self, z: Tensor) -> Tensor:
            u, v, q, k = F.silu(z).split(W, dim=-1)
            a = self.attend(q, k, v)
            z.mul_(2)
            return self.gate(u, a)

    torch.manual_seed(0)
    layer, z = Written(), torch.randn(B, N, 4 * W)
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()(z.double())
        ours = torch.compile(layer, backend=hstu_compile.backend, options={"strict": True})(z.clone())
        assert_within_budget(ours, layer(z.clone()), exact, FORWARD)


def test_dropout_keeps_its_seed_and_scale(inductor: Compiled) -> None:
    """The gradient passes where the forward kept, and only there."""

    class Dropped(Layer):
        def gate(self, u: Tensor, a: Tensor) -> Tensor:
            return F.dropout(super().gate(u, a), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            u, v, q, k = F.silu(self.uvqk(x)).split(W, dim=-1)
            return self.gate(u, self.attend(q, k, v))

    torch.manual_seed(0)
    layer, x = Dropped(), inputs("jagged")
    y = torch.compile(layer, backend=hstu_compile.backend, options={"strict": True})(x)
    (dweight,) = torch.autograd.grad(y.sum(), layer.weight)
    assert calls(inductor.aot_graphs[-1], GATED_BACKWARD) == 1
    kept = y != 0
    assert 0.3 < kept.float().mean() < 0.7
    u, a = parts(layer, x)
    torch.testing.assert_close(y[kept], 2 * Layer.gate(layer, u, a)[kept])
    torch.testing.assert_close(dweight, (F.layer_norm(a, (W,)) * u * 2 * kept).sum(0))


def parts(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    u, v, q, k = F.silu(layer.uvqk(x)).split(W, dim=-1)
    return u, layer.attend(q, k, v)
