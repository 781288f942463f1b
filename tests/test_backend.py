"""The backend as torch.compile sees it, with a small stand-in for the passes."""

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

import hstu_compile
from bench.native_layer import HSTUStack
from hstu_compile import compiler
from hstu_compile.passes.recompute import SaveResults
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.without_codegen import ONLY, Compiled, SiluPass, inductor_without_codegen, install

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    install(monkeypatch, SiluPass())
    yield from inductor_without_codegen(monkeypatch)


class Layer(nn.Module):
    """Jagged tokens [T, E] and their offsets [B + 1]; pooled per sequence, so that both sizes matter."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.uvqk, self.out = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(width, width)
        self.dropout = dropout
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, seq_offsets: Tensor, max_seq_len: int = 100) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        s = F.silu(torch.einsum("nd,md->nm", q, k)) / max_seq_len
        y = x + self.out(F.dropout(u * torch.einsum("nm,md->nd", s, v), self.dropout, self.training))
        lengths = seq_offsets[1:] - seq_offsets[:-1]
        return y.cumsum(0)[seq_offsets[1:] - 1] / lengths[:, None]


def batch(lengths: tuple[int, ...] = (3, 1, 2), width: int = 8) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return torch.randn(int(offsets[-1]), width, requires_grad=True), offsets


def compiled(model: Callable, **options: Any) -> Callable:
    return torch.compile(model, backend=hstu_compile.backend, options={**ONLY, **options})


def gradients(model: nn.Module, out: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [x, *model.parameters()]))


def assert_as_good_as_eager(model: Layer, run: Callable, x: Tensor, *args: Any) -> None:
    out, eager = run(x, *args), model(x, *args)
    exact_model, exact_x = Layer().double(), x.detach().double().requires_grad_()
    exact_model.load_state_dict(model.state_dict())
    exact = exact_model(exact_x, *args)
    assert_within_budget(out, eager, exact, FORWARD)
    names = ["x", *(name for name, _ in model.named_parameters())]
    grads = (gradients(model, out, x), gradients(model, eager, x), gradients(exact_model, exact, exact_x))
    for name, *values in zip(names, *grads, strict=True):
        assert_within_budget(*values, BACKWARD, name)


def test_rewritten_forward_and_backward(inductor: Compiled) -> None:
    model, (x, offsets) = Layer(), batch()
    assert_as_good_as_eager(model, compiled(model, strict=True, expect=2), x, offsets)
    assert aten.silu.default not in inductor.targets[0] and aten.sigmoid.default in inductor.targets[0]


def test_static_inputs_are_inductors(inductor: Compiled) -> None:
    """Else CUDA graphs copy every parameter at each replay."""
    found = []
    for run in (compiled, torch.compile):
        torch._dynamo.reset()
        inductor.static_inputs.clear()
        model, (x, offsets) = Layer(), batch()
        run(model)(x, offsets).sum().backward()
        found.append(list(inductor.static_inputs))
    ours, theirs = found
    assert ours == theirs
    assert len(ours[0]) >= 6  # the parameters


def test_buffer_mutated_in_forward(inductor: Compiled) -> None:
    class Counting(Layer):
        def forward(self, *args: Any) -> Tensor:
            self.calls.add_(1)
            return super().forward(*args)

    model, (x, offsets) = Counting(), batch()
    run = compiled(model)
    for _ in range(3):
        run(x, offsets)
    assert model.calls == 3 and len(inductor.graphs) == 1
    assert inductor.static_inputs


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    model, (x, offsets) = Layer(), batch()

    def f(x: Tensor, offsets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return model(x, offsets)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        out, eager = compiled(f if inside else model, strict=True)(x, offsets), f(x, offsets)
        eager = eager if inside else model(x, offsets)
    exact = Layer().double()
    exact.load_state_dict(model.state_dict())
    assert out.dtype == eager.dtype
    assert_within_budget(out, eager, exact(x.double(), offsets), FORWARD)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference_mode"])
def test_modes(mode: str, inductor: Compiled) -> None:
    model, (x, offsets) = Layer(), batch()
    model.train(mode == "train")
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    run = compiled(model, strict=True)
    with guard():
        out, eager = run(x, offsets), model(x, offsets)
    assert out.requires_grad == eager.requires_grad and out.is_inference() == eager.is_inference()
    if mode in ("train", "eval"):
        return assert_as_good_as_eager(model, run, x, offsets)
    assert_within_budget(out, eager, Layer.forward(model.double(), x.double(), offsets), FORWARD)
    return None


def test_dropout_under_a_seed() -> None:
    model, (x, offsets) = Layer(dropout=0.5), batch()
    run = compiled(model)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(run(x, offsets))
    torch.manual_seed(1)
    eager = model(x, offsets)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[0], eager)  # fallback_random: the very mask of eager


def test_checkpointed_layer(inductor: Compiled) -> None:
    model, (x, offsets) = Layer(), batch()

    def f(x: Tensor, offsets: Tensor) -> Tensor:
        return checkpoint(model, x, offsets, use_reentrant=False)

    assert_as_good_as_eager(model, compiled(f, strict=True, expect=2), x, offsets)
    assert aten.silu.default not in inductor.targets[0]


def test_graph_break_in_the_middle(inductor: Compiled) -> None:
    first, second, (x, offsets) = Layer(), Layer(), batch()

    def f(x: Tensor, offsets: Tensor) -> Tensor:
        first_out = first(x, offsets)
        torch._dynamo.graph_break()
        return second(first_out, torch.tensor([0, 1, 3])) * 2

    # Each half holds its own two regions.
    out = compiled(f, strict=True, expect=2)(x, offsets)
    assert len(inductor.graphs) == 2
    torch.testing.assert_close(out, f(x, offsets))


def test_glue_of_a_graph_break_is_not_judged(inductor: Compiled) -> None:
    model, (x, offsets) = Layer(), batch()

    def f(x: Tensor, offsets: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        x = model(x, offsets)
        torch._dynamo.graph_break()
        return x + 1

    torch.testing.assert_close(compiled(f, strict=True, expect=2)(x, offsets), f(x, offsets))
    assert len(inductor.graphs) == 3


def test_two_models_in_one_process(inductor: Compiled) -> None:
    one, other, (x, offsets) = Layer(), Layer(), batch()
    runs = [compiled(one), compiled(other)]
    for model, run in zip((one, other), runs, strict=True):
        assert_as_good_as_eager(model, run, x, offsets)


def test_sizes_change_without_recompilation(inductor: Compiled) -> None:
    """T and B; the second size makes Dynamo's sizes symbolic once, from then on nothing is compiled again."""
    model = Layer()
    run = compiled(model)
    for lengths in ((3, 1, 2), (4, 4, 4, 4)):
        run(*batch(lengths))
    graphs = len(inductor.graphs)
    assert graphs <= 2
    for lengths in ((2, 2), (9, 1, 1, 5, 1), (64, 3, 2), (30,) * 7):
        assert_as_good_as_eager(model, run, *batch(lengths))
    assert len(inductor.graphs) == graphs
    for max_seq_len in (50, 60, 70):  # may recompile, must be right
        assert_as_good_as_eager(model, run, *batch(), max_seq_len)


def test_nothing_matches_hands_over_the_untouched_graph(inductor: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_warned", False)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    given = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable:
        given.append((gm, gm.graph, gm.code))
        return hstu_compile.backend(gm, example_inputs, options=ONLY)

    with pytest.warns(UserWarning, match="explain"):
        torch.compile(model, backend=backend)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once in a process
        torch.compile(nn.Linear(4, 3), backend=backend)(x)
    (gm, graph, _), _ = given
    assert inductor.graphs[0] is gm and gm.graph is graph
    assert not any(isinstance(target, torch._ops.OpOverload) for target in inductor.targets[0])


def test_graph_without_tensor_input(inductor: Compiled) -> None:
    def f(n: int) -> Tensor:
        return torch.ones(n) + 1

    assert torch.equal(compiled(f)(3), f(3))


@pytest.mark.parametrize("disable", [(), "attention"])
def test_sizes_that_depend_on_data(disable: Any, inductor: Compiled) -> None:
    """A size read from a tensor, with the rewritten graph and with the untouched one."""

    def f(x: Tensor, lengths: Tensor) -> Tensor:
        rows = torch.arange(lengths.max().item(), device=x.device)
        return F.silu(x).sum() * (rows < lengths[:, None])

    x = torch.randn(4)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        run = compiled(f, disable=disable)
        for lengths in ([3, 1], [2, 5], [1, 7, 2]):
            torch.testing.assert_close(run(x, torch.tensor(lengths)), f(x, torch.tensor(lengths)))
    assert len(inductor.graphs) <= 2


def test_strict_and_expect() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(Exception, match="nothing was fused"):
        compiled(nn.Linear(4, 4), strict=True)(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"2 attention regions fused, expected 3(.|\n)*fused  attention: silu"):
        compiled(Layer(), expect=3)(*batch())


def test_a_failing_pass_breaks_nothing(
    inductor: Compiled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(SiluPass):
        def run(self, gm: fx.GraphModule, report: Report) -> int:
            super().run(gm, report)
            raise KeyError("half way")

    install(monkeypatch, Failing())
    model, (x, offsets) = Layer(), batch()
    assert_as_good_as_eager(model, compiled(model), x, offsets)
    assert F.silu in inductor.targets[0]
    assert "could not be rewritten" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(Exception, match="half way"):
        compiled(model, strict=True)(x, offsets)


def test_disable_and_keyword_options(inductor: Compiled) -> None:
    model, args = Layer(), batch()
    compiled(model, disable="attention")(*args)
    torch.compile(model, backend=functools.partial(hstu_compile.backend, **ONLY), mode="max-autotune-no-cudagraphs")(
        *args
    )
    hidden, fused = inductor.targets
    assert F.silu in hidden and aten.sigmoid.default in fused
    assert inductor.configs[1]["max_autotune"] is True


def test_inductor_options_reach_inductor(inductor: Compiled) -> None:
    compiled(Layer(), **{"max_autotune": True, "triton.cudagraphs": False})(*batch())
    (configs,) = inductor.configs
    assert isinstance(configs.pop("joint_custom_pre_pass"), SaveResults)
    assert configs == {"max_autotune": True, "triton.cudagraphs": False}


def test_debug_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_compile.ops import validation

    cuda, seen = torch.device("cuda"), []

    @torch.library.custom_op("hstu_compile_tests::spy", mutates_args=())
    def spy(x: Tensor) -> Tensor:
        seen.append(validation.checks_values(cuda))
        return x.clone()

    spy.register_fake(torch.empty_like)
    run = compiled(lambda x: spy(F.silu(x)), debug_checks=True)
    for _ in range(2):
        run(torch.randn(3))
    assert seen == [True, True] and not validation.checks_values(cuda)


def test_reset() -> None:
    assert callable(hstu_compile.backend.reset)  # type: ignore[attr-defined]
    hstu_compile.backend.reset()  # type: ignore[attr-defined]


@pytest.mark.parametrize("train", [True, False])
def test_verify_accepts(train: bool, inductor: Compiled) -> None:
    model, (x, offsets) = Layer(dropout=0.5).train(train), batch()
    calls = model.calls.clone()
    state = torch.random.get_rng_state()
    run = compiled(model, verify="first")
    with torch.set_grad_enabled(train):
        for _ in range(2):
            run(x, offsets)
    assert x.grad is None and all(p.grad is None for p in model.parameters()) and torch.equal(calls, model.calls)
    torch.random.set_rng_state(state)


def test_verify_accepts_dropout(inductor: Compiled) -> None:
    """The fused op draws a seed where the original draws nothing, its dropout being off."""
    x = torch.randn(2, 6, 24, requires_grad=True)
    compiled(HSTUStack(1, 24, 2, 8, dropout_ratio=0.2), verify="first")(x, torch.tensor([6, 4])).sum().backward()


def test_verify_captures_once(inductor: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    captured, capture = [], compiler.capture
    monkeypatch.setattr(compiler, "capture", lambda gm: captured.append(gm) or capture(gm))
    model, (x, offsets) = Layer(), batch()
    compiled(model, verify="first")(x, offsets)
    assert len(captured) == 1


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("what", ["output 0", "gradient of"])
def test_verify_finds_a_wrong_pass(what: str, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SiluPass(factor=2.0))
    model, (x, offsets) = Layer(dropout=0.5), batch()

    def f(x: Tensor, offsets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return checkpoint(model, x, offsets, use_reentrant=False)

    run = compiled(f, verify="first")
    with pytest.raises(RuntimeError, match=f"{what}.*OUT"):
        run(x, offsets)


@pytest.mark.parametrize("recompute", [(), ("input_layernorm",), ("input_layernorm", "uvqk_projection", "input_silu")])
def test_recompute_reaches_the_partitioner(
    recompute: tuple[str, ...], inductor: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag set here decides what the forward of AOTAutograd saves; numbers are bitwise the same."""
    roles = {aten.layer_norm.default: "input_layernorm", aten.linear.default: "uvqk_projection"}
    roles[aten.mul.Tensor] = "input_silu"

    class Roles(SiluPass):
        def run(self, gm: fx.GraphModule, report: Report) -> int:
            fused = super().run(gm, report)
            for target, role in roles.items():
                node = gm.graph.find_nodes(op="call_function", target=target)[0]
                assert "recompute" not in node.meta
                node.meta |= {"hstu_compile_role": role, "hstu_compile_layer": 0}
            return fused

    install(monkeypatch, Roles())
    options = {
        (): {},
        ("input_layernorm",): {"recompute_input_layernorm": True},
    }.get(recompute, {"recompute_uvqk": True})
    model, (x, offsets) = Layer(), batch()
    assert_as_good_as_eager(model, compiled(model, **options), x, offsets)
    forward, backward = inductor.aot_graphs
    tags = [n for n in backward.graph.nodes if n.meta.get("recompute") == CheckpointPolicy.MUST_RECOMPUTE]
    saved = {tuple(n.meta["val"].shape) for n in forward.graph.output_node().args[0] if isinstance(n, fx.Node)}
    assert ((6, 32) in saved) == ("uvqk_projection" not in recompute)  # z = linear(norm(x)) or what silu makes of it
    assert bool(tags) == bool(recompute)


class Attention(Layer):
    """What the real attention pass recognises: dense [B, N, E], two heads, causal."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        b, n, width = x.shape
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        q, k, v = (t.view(b, n, 2, width // 2) for t in (q, k, v))
        p = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k)) / n
        p = p * torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        a = torch.einsum("bhnm,bmhd->bnhd", p, v).reshape(b, n, width)
        return x + self.out(F.dropout(a * u, self.dropout, self.training))


@pytest.mark.parametrize("autocast", [True, False])
def test_the_real_passes_together(autocast: bool, inductor: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, one of them checkpointed, all passes, verified against the captured graph; sizes change."""
    monkeypatch.delitem(sys.modules, "hstu_compile.passes.attention")
    first, second = Attention(dropout=0.5), Attention()

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return second(checkpoint(first, x, use_reentrant=False))

    options = {"strict": True, "expect": 2, "verify": "first", "recompute_uvqk": True}
    run = torch.compile(f, backend=hstu_compile.backend, options=options, dynamic=None)
    for shape in ((2, 5, 8), (3, 7, 8), (4, 9, 8)):
        x = torch.randn(shape, requires_grad=True)
        run(x).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
    assert len(inductor.graphs) <= 2
    assert all(torch.ops.hstu_compile.silu_attention.default in targets for targets in inductor.targets)


REAL = """
import torch, hstu_compile
from torch._dynamo.utils import counters
from hstu_compile.passes.report import Region
import hstu_compile.passes as passes
from hstu_compile.ops import hstu_attention

class AttentionPass:
    NAME = "attention"
    def run(self, gm, report):
        found = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.silu.default)
        for node in found:
            with gm.graph.inserting_before(node):
                x = node.args[0]
                q = gm.graph.call_function(torch.ops.aten.unsqueeze.default, (x, 1))
                offsets = [n for n in gm.graph.find_nodes(op="placeholder") if n.meta["val"].dtype == torch.int64]
                rest = offsets + [None] * 6 + [8, 1.0, 1.0, True, 0, 1, 0, 0, False]
                new = gm.graph.call_function(torch.ops.hstu_compile.hstu_attention.default, (q, q, q, *rest))
                new = gm.graph.call_function(torch.ops.aten.squeeze.dim, (new, 1))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            report.add(Region("attention", "a stand-in", "here"))
        return len(found)

import sys
sys.modules["hstu_compile.passes.attention"] = AttentionPass()
weight = torch.randn(16, 16, requires_grad=True)

def f(x, offsets):
    return torch.nn.functional.silu(x @ weight) + offsets[:1]

options = {"enable": "attention", "strict": True}
x, offsets = torch.randn(8, 16), torch.tensor([0, 3, 8])
outs = []
for _ in range(2):
    torch._dynamo.reset()
    out = torch.compile(f, backend=hstu_compile.backend, options=options)(x, offsets)
    out.sum().backward()
    outs.append(out)
qkv = [(x @ weight)[:, None]] * 3
expected = hstu_attention(*qkv, seq_offsets=offsets, max_seq_len=8, alpha=1.0, scaling_seq_len=1.0)
torch.testing.assert_close(outs[1], expected[:, 0])
assert counters["inductor"]["fxgraph_cache_bypass"] == 0 and counters["aot_autograd"]["autograd_cache_bypass"] == 0
assert counters["aot_autograd"]["autograd_cache_hit"] == 1, counters["aot_autograd"]
"""


def test_inductor_for_real_and_its_caches(tmp_path: Any) -> None:
    """One run with code generation, in a process with an empty cache: the rewritten graph is cached, not bypassed."""
    import os

    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", REAL], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
