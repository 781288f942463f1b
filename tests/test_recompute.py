"""What docs/recompute.md promises: which tensors are saved, no attention twice, the same bits, less GPU memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import checkpoint

import hstu_compile
from bench.native_layer import HSTUStack
from hstu_compile.passes.graph import value
from hstu_compile.passes.recompute import SaveResults
from tests.models import MODELS
from tests.without_codegen import Compiled, inductor_without_codegen

OPS = torch.ops.hstu_compile
ATTENTION, ATTENTION_BACKWARD = OPS.hstu_attention_forward.default, OPS.hstu_attention_backward.default
GATE, GATE_BACKWARD = OPS.norm_gate_dropout_forward.default, OPS.norm_gate_dropout_backward.default
GATED_BACKWARD = OPS.gated_silu_attention_backward.default
LAYERNORM, SILU, UVQK = ({f"recompute_{name}": True} for name in ("input_layernorm", "input_silu", "uvqk"))
BOTH = LAYERNORM | SILU


@dataclass(frozen=True)
class Layer:
    """A model of one layer, and how many numbers a token are saved of its norm, projection and activation."""

    model: Callable[[], nn.Module]
    arguments: tuple[Any, ...]
    norm: int
    projection: int
    activation: int
    backward: tuple[Any, ...] = (GATE_BACKWARD, ATTENTION_BACKWARD)


def one(name: str, projection: int, activation: int, *backward: Any) -> Layer:
    calls = (backward,) if backward else ()
    return Layer(MODELS[name].model, MODELS[name].arguments(3), 16, projection, activation, *calls)


def native(dropout_ratio: float) -> Layer:
    arguments = torch.randn(3, 10, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 4, 7])
    return Layer(lambda: HSTUStack(1, 24, 2, 8, dropout_ratio), arguments, 24, 64, 48, (GATED_BACKWARD,))  # v, q, k


LAYERS = {
    "native": native(0.0),
    "native with dropout": native(0.2),
    "meta_stu": one("meta_stu", 48, 0, GATED_BACKWARD),  # silu on u alone
    "nvidia_native": one("nvidia_native", 64, 48, GATED_BACKWARD),
    "research unbroken": one("research unbroken", 48, 48),
    "four linears": one("four linears", 64, 48),
}


@dataclass
class Step:
    saved: int  # elements that the forward makes and the backward gets
    saved_bytes: int
    calls: list[Any]  # of ops of ours, forward then backward
    values: list[Tensor]  # the output and every gradient


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield from inductor_without_codegen(monkeypatch)


def step(layer: Layer, options: dict[str, bool], inductor: Compiled) -> Step:
    torch._dynamo.reset()
    inductor.aot_graphs.clear()
    torch.manual_seed(0)
    model = layer.model()
    x, *others = layer.arguments
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = torch.compile(model, backend=hstu_compile.backend, options={"strict": True, **options})(x, *others)
    out = out[0] if isinstance(out, tuple) else out
    out.square().sum().backward()
    forward, backward = inductor.aot_graphs
    kept = [n for n in backward.graph.find_nodes(op="placeholder") if not n.name.startswith(("primals", "tangents"))]
    saved = [n for n in forward.graph.nodes if n.name in {n.name for n in kept} and isinstance(n.meta["val"], Tensor)]
    each = {value(n).untyped_storage()._cdata: value(n) for n in saved}.values()  # views of one tensor are one
    sizes = [t.untyped_storage().nbytes() for t in each]
    numbers = sum(size // t.itemsize for size, t in zip(sizes, each, strict=True))
    nodes = [*forward.graph.nodes, *backward.graph.nodes]
    ours = [n.target for n in nodes if str(n.target).startswith("hstu_compile.")]
    calls = [target for target in ours if target is not OPS.mask_tile_states.default]
    return Step(numbers, sum(sizes), calls, [out.detach(), x.grad, *(p.grad for p in model.parameters())])


@pytest.mark.parametrize("name", LAYERS)
def test_saved_tensors_calls_and_bits(name: str, inductor: Compiled) -> None:
    layer = LAYERS[name]
    tokens = layer.arguments[0].shape[:-1].numel()
    plain = step(layer, {}, inductor)
    freed = {"norm": layer.norm, "silu": layer.activation}
    freed |= {"both": layer.norm + layer.activation, "uvqk": layer.norm + layer.projection + layer.activation}
    for options, expected in zip((LAYERNORM, SILU, BOTH, UVQK), freed.values(), strict=True):
        ours = step(layer, options, inductor)
        statistics = (plain.saved - ours.saved) / tokens - expected  # of the norm: up to two numbers a token
        assert statistics in ((0,) if options == SILU else (0, 1, 2)), options
        assert ours.calls == plain.calls == [ATTENTION, GATE, *layer.backward]
        for a, b in zip(ours.values, plain.values, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), options


def test_an_activation_is_saved_in_its_own_dtype(inductor: Compiled) -> None:
    """Not the float32 steps that Inductor decomposes it into, although the gradient could use them."""
    layer = LAYERS["native"]
    x, lengths = layer.arguments
    half = Layer(
        lambda: layer.model().bfloat16(), (x.bfloat16(), lengths), layer.norm, layer.projection, layer.activation
    )
    plain, recomputed = step(half, {}, inductor), step(half, SILU, inductor)
    assert plain.saved_bytes - recomputed.saved_bytes == layer.activation * x.shape[:-1].numel() * 2
    assert all(torch.equal(a, b) for a, b in zip(plain.values, recomputed.values, strict=True))


def test_a_checkpointed_layer_saves_nothing(inductor: Compiled) -> None:
    """What the user says of a region goes before what is worth saving."""
    layer = LAYERS["native"]

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer.model()

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return checkpoint(self.inner, x, lengths, use_reentrant=False)

    plain, ours = (step(Layer(m, layer.arguments, 0, 0, 0), {}, inductor) for m in (layer.model, Checkpointed))
    assert ours.saved == 0 < plain.saved
    assert all(torch.equal(a, b) for a, b in zip(ours.values, plain.values, strict=True))


def test_a_checkpointed_projection_is_not_saved(inductor: Compiled) -> None:
    """The layer is recognised as a whole, and of norm, projection and silu of u only x is held, as with recompute."""
    layer = LAYERS["meta_stu"]
    model = MODELS["meta_stu checkpointed"].model
    explanation = hstu_compile.explain(model(), *layer.arguments)
    assert [len(report.recognised("uvqk")) for report in explanation.reports] == [1]
    theirs = step(Layer(model, layer.arguments, 0, 0, 0), {}, inductor)
    ours = step(layer, UVQK, inductor)
    assert theirs.saved <= ours.saved and theirs.calls == ours.calls
    assert all(torch.equal(a, b) for a, b in zip(theirs.values, ours.values, strict=True))


def test_own_joint_passes_run_too(inductor: Compiled) -> None:
    class Own(CustomGraphPass):
        calls = 0

        def __call__(self, graph: torch.fx.Graph) -> None:
            Own.calls += 1

        def uuid(self) -> str:
            return "own"

    layer, own = LAYERS["native"], Own()
    step(layer, {"joint_custom_pre_pass": own}, inductor)
    with torch._inductor.config.patch(joint_custom_pre_pass=own):
        step(layer, {}, inductor)
    assert Own.calls == 2
    assert SaveResults(own).uuid() != SaveResults(None).uuid() is not None


def test_casts_of_what_is_recomputed_are_not_saved(inductor: Compiled) -> None:
    """Under autocast the projection reads a bfloat16 copy of the norm's output."""
    layer = LAYERS["native"]

    def under_autocast() -> nn.Module:
        model = layer.model()
        inner = model.forward
        model.forward = torch.autocast("cpu", torch.bfloat16)(inner)  # type: ignore[method-assign]
        return model

    cast = Layer(under_autocast, layer.arguments, 0, 0, 0)
    plain = step(cast, {}, inductor)
    for options, freed in ((LAYERNORM, layer.norm), (UVQK, layer.norm + layer.projection)):
        ours = step(cast, options, inductor)
        assert plain.saved - ours.saved >= freed * layer.arguments[0].shape[:-1].numel()
        assert all(torch.equal(a, b) for a, b in zip(ours.values, plain.values, strict=True))


def test_caches_on_disk_know_what_is_recomputed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Their keys are of the graph without its metadata, where the tags are."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer = LAYERS["native"]

    def saved(options: dict[str, Any]) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        tensors: list[Tensor] = []
        run = torch.compile(layer.model(), backend=hstu_compile.backend, options=options)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            run(*layer.arguments).sum().backward()
        return sum(t.numel() for t in tensors), counters["aot_autograd"]["autograd_cache_hit"]

    budget = {"recompute_budget": 0.8}
    (plain, plain_hits), (less, hits), (half, half_hits) = saved({}), saved(UVQK), saved(budget)
    assert plain - less >= layer.arguments[0].shape[:-1].numel() * layer.projection
    assert less < half < plain
    assert plain_hits == hits == half_hits == 0
    assert saved({}) == (plain, 1) and saved(UVQK) == (less, 1) and saved(budget) == (half, 1)


@pytest.mark.cuda
def test_memory() -> None:
    layers, B, N, E, H, D = 4, 8, 1024, 512, 4, 128
    x = torch.randn(B, N, E, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lengths = torch.full((B,), N, device="cuda")

    def held_and_peak(options: dict[str, bool]) -> tuple[int, int]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = HSTUStack(layers, E, H, D).to("cuda", torch.bfloat16)
        run = torch.compile(model, backend=hstu_compile.backend, options=options)
        run(x, lengths).sum().backward()  # compiles; gradients exist from here on
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = run(x, lengths)
        held = torch.cuda.memory_allocated() - before
        out.sum().backward()
        return held, torch.cuda.max_memory_allocated() - before

    (held, peak), (held_less, peak_less) = map(held_and_peak, ({}, UVQK))
    a_layer = B * N * (E + 4 * H * D) * 2  # the normed input and the projection
    assert held - held_less >= layers * a_layer
    assert peak - peak_less >= (layers - 2) * a_layer  # one layer's are there again while its backward runs
