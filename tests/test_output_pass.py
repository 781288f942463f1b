"""norm * gate, however it is written: found, rewritten, as exact as eager, and what is left alone and why."""

from functools import partial

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_compile.capture import capture
from hstu_compile.ops import hstu_attention
from hstu_compile.ops.norm_gate_dropout_reference import keep_scale
from hstu_compile.passes import attention, output, uvqk
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.models import MODELS
from tests.tracing import traced, traced_module

T, H, D, E = 19, 2, 16, 24
W = H * D
EPS = 1e-6
OP = torch.ops.hstu_compile.norm_gate_dropout.default


class Output(nn.Module):
    """The second half of a layer; `body(self, a, u)` is the spelling under test. a, u: [T, W]."""

    def __init__(self, body, pieces: int = 1, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.body = body
        self.weight, self.bias = (nn.Parameter(torch.randn(W)) for _ in range(2))
        self.head_weight, self.head_bias = (nn.Parameter(torch.randn(H)) for _ in range(2))
        self.o = nn.Linear(pieces * W, E, bias=False)
        self.to(dtype)

    def forward(self, a: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return self.o(self.body(self, a, u)) + x


def rms(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rms_by_division(x: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + EPS)


def upcast(m: Output, a: Tensor, u: Tensor, p: float = 0.0, concat: bool = False) -> Tensor:
    """As in Meta's generative-recommenders: everything in fp32, cast at the end."""
    wide = torch.promote_types(a.dtype, torch.float32)
    x, g = a.to(wide), u.to(wide)
    norm = F.group_norm(
        x.view(-1, H, D), num_groups=H, weight=m.head_weight.to(wide), bias=m.head_bias.to(wide), eps=EPS
    )
    y = g * norm.view(-1, W)
    y = torch.cat([g, x, y], dim=1) if concat else y
    return F.dropout(y, p=p, training=m.training).to(a.dtype)


def attended(a: Tensor) -> Tensor:
    """[T, W], of one sequence."""
    heads = a.reshape(1, -1, H, D)
    return hstu_attention(heads, heads, heads, max_seq_len=heads.shape[1], alpha=0.3, scaling_seq_len=T).view(-1, W)


def per_head(x: Tensor) -> Tensor:
    return x.view(-1, H, D)


def layer_norm(m: Output, x: Tensor) -> Tensor:
    return F.layer_norm(x, (W,), m.weight, m.bias, EPS)


# name -> (body, pieces in the output, what the report must say)
FUSED = {
    "u * norm(a)": (lambda m, a, u: u * layer_norm(m, a), 1, "layer_norm * u"),
    "norm(a) * u": (lambda m, a, u: layer_norm(m, a) * u, 1, "layer_norm * u"),
    "no affine": (lambda m, a, u: u * F.layer_norm(a, (W,), eps=EPS), 1, "layer_norm * u"),
    "silu(u)": (lambda m, a, u: F.silu(u) * layer_norm(m, a), 1, "layer_norm * silu(u)"),
    "u * sigmoid(u)": (lambda m, a, u: (u * torch.sigmoid(u)) * layer_norm(m, a), 1, "layer_norm * silu(u)"),
    "sigmoid(u)": (lambda m, a, u: torch.sigmoid(u) * layer_norm(m, a), 1, "layer_norm * sigmoid(u)"),
    "Meta": (lambda m, a, u: upcast(m, a, u), 1, "group_norm (2 groups) * u"),
    "Meta, concat": (lambda m, a, u: upcast(m, a, u, concat=True), 3, "-> cat[u, a, .]"),
    "research, concat": (
        lambda m, a, u: torch.cat([u, n := F.layer_norm(a, [W], eps=EPS), u * n], dim=-1),
        3,
        "-> cat[u, norm(a), .]",
    ),
    "concat in another order": (
        lambda m, a, u: torch.cat([u * layer_norm(m, a), u, a], dim=-1),
        3,
        "layer_norm * u -> float32",
    ),
    "activated u in the concat": (
        lambda m, a, u: torch.cat([g := F.silu(u), g * layer_norm(m, a)], dim=-1),
        2,
        "layer_norm * u -> cat[u, .]",
    ),
    "raw u in the concat": (
        lambda m, a, u: torch.cat([u, F.silu(u) * layer_norm(m, a)], dim=-1),
        2,
        "layer_norm * silu(u) -> cat[u, .]",
    ),
    "norm per head": (lambda m, a, u: u * F.layer_norm(per_head(a), (D,), eps=EPS).flatten(1), 1, "layer_norm * u"),
    "gate per head": (
        lambda m, a, u: (per_head(u) * F.layer_norm(per_head(a), (D,), m.weight[:D], eps=EPS)).flatten(1),
        1,
        "layer_norm * u",
    ),
    "group norm of rows": (
        lambda m, a, u: u * F.group_norm(a, H, m.weight, m.bias, EPS),
        1,
        "group_norm (2 groups) * u",
    ),
    "rms_norm": (lambda m, a, u: u * F.rms_norm(a, (W,), m.weight, EPS), 1, "rms_norm * u"),
    "rms_norm, default eps": (lambda m, a, u: u * F.rms_norm(a, (W,)), 1, "rms_norm * u"),
    "rms norm written out": (lambda m, a, u: rms(a, m.weight) * u, 1, "rms_norm (written out) * u"),
    "rms norm by division": (lambda m, a, u: u * rms_by_division(a), 1, "rms_norm (written out) * u"),
    "rms norm per head, weight per row": (
        lambda m, a, u: u * (rms_by_division(per_head(a)).flatten(1) * m.weight),
        1,
        "rms_norm (written out) * u",
    ),
    "layer norm written out": (
        lambda m, a, u: u * ((a - a.mean(1, True)) / (a.var(1, unbiased=False, keepdim=True) + EPS).sqrt() * m.weight),
        1,
        "layer_norm (written out) * u",
    ),
    "concat of silu(u), twice": (
        lambda m, a, u: torch.cat([F.silu(u), n := layer_norm(m, a), n * F.silu(u)], -1),
        3,
        "layer_norm * u -> cat[u, norm(a), .]",
    ),
    "norm of the product": (lambda m, a, u: layer_norm(m, u * attended(a)), 1, "layer_norm of a * u"),
    "norm of the product, written out": (
        lambda m, a, u: rms(attended(a) * F.silu(u), m.weight),
        1,
        "rms_norm (written out) of a * silu(u)",
    ),
    "norm of the product per head": (
        lambda m, a, u: F.dropout(F.layer_norm(per_head(attended(a) * u), (D,)).flatten(1), 0.5, training=False),
        1,
        "layer_norm of a * u",
    ),
    "affine written out": (
        lambda m, a, u: u * (F.layer_norm(a, (W,), eps=EPS) * m.weight + m.bias),
        1,
        "layer_norm * u",
    ),
    "dropout in eval": (lambda m, a, u: F.dropout(u * layer_norm(m, a), 0.5, training=False), 1, "layer_norm * u"),
}


def inputs(dtype: torch.dtype, tokens: int = T) -> list[Tensor]:
    """a from an attention-like product, u a slice of a packed buffer."""
    packed = torch.randn(tokens, 4 * W, dtype=dtype)
    return [
        torch.randn(tokens, W, dtype=dtype).requires_grad_(),
        packed[:, W : 2 * W].detach().requires_grad_(),
        torch.randn(tokens, E, dtype=dtype).requires_grad_(),
    ]


def rewritten(module: nn.Module, args: list[Tensor], expect: int = 1):
    gm, parameters = traced_module(module, args)
    report = Report()
    assert output.run(gm, report) == expect, [str(r) for r in report.regions]
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=OP)) == expect
    assert output.run(gm, Report()) == 0
    return gm, parameters, report


def values_and_grads(function, leaves: list[Tensor], dout: Tensor) -> list[Tensor | None]:
    out = function()
    return [out, *torch.autograd.grad(out, leaves, dout, allow_unused=True)]


@pytest.mark.parametrize("tokens", [T, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused(name, dtype, tokens):
    body, pieces, says = FUSED[name]
    module, args = Output(body, pieces, dtype), inputs(dtype, tokens)
    gm, parameters, report = rewritten(module, args)
    assert says.replace("float32", str(dtype).removeprefix("torch.")) in report.fused("output")[0].what
    targets = {n.target for n in gm.graph.nodes}
    assert not targets & {
        torch.ops.aten.layer_norm.default,
        torch.ops.aten.group_norm.default,
        torch.ops.aten.rms_norm.default,
        torch.ops.aten.rsqrt.default,
    }

    exact = Output(body, pieces, torch.float64)
    exact.load_state_dict(module.state_dict())
    draws = []
    for _ in range(-(-T // tokens)):  # the largest error of few rows is luck
        args = inputs(dtype, tokens)
        doubles = [a.detach().double().requires_grad_() for a in args]
        dout = torch.randn(tokens, E, dtype=dtype)
        ours = values_and_grads(partial(gm, *parameters, *args), [*args, *parameters], dout)
        eager = values_and_grads(partial(module, *args), [*args, *parameters], dout)
        reference = values_and_grads(partial(exact, *doubles), [*doubles, *exact.parameters()], dout.double())
        draws.append((ours, eager, reference))
    for i, results in enumerate(zip(*(zip(*draw, strict=True) for draw in draws), strict=True)):
        assert len({x is None for result in results for x in result}) == 1
        if results[0][0] is not None:
            o, e, r = (torch.stack(of) for of in zip(*results, strict=True))
            assert_within_budget(o, e, r, BACKWARD if i else FORWARD, f"value {i}")


def test_token_count_stays_dynamic():
    module = Output(FUSED["Meta, concat"][0], 3)
    gm, parameters, _ = rewritten(module, inputs(torch.float32))
    for rows in (0, 1, 64):
        args = [torch.randn(rows, n) for n in (W, W, E)]
        torch.testing.assert_close(gm(*parameters, *args), module(*args))


def test_dense_and_interleaved_layouts():
    class Dense(nn.Module):
        def forward(self, a, uvqk):  # a [B, N, H, D], uvqk [B, N, H, 4 * D]
            u = uvqk[..., :D].reshape(*a.shape[:2], W)
            return u * F.layer_norm(a.flatten(2), (W,), eps=EPS)

    args = [torch.randn(3, 5, H, D), torch.randn(3, 5, H, 4 * D)]
    gm = traced(Dense(), args)
    assert output.run(gm, Report()) == 1
    gm.recompile()
    op = gm.graph.find_nodes(op="call_function", target=OP)[0]
    assert tuple(op.args[1].meta["val"].shape[1:]) == (H, D)  # the slice itself, not a copy of it
    for B in (3, 2):
        args = [torch.randn(B, 5, H, D), torch.randn(B, 5, H, 4 * D)]
        torch.testing.assert_close(gm(*args), Dense()(*args))


def test_dropout_follows_the_seed_and_its_gradient_the_mask():
    module = Output(lambda m, a, u: upcast(m, a, u, p=0.25, concat=True), 3).train()
    args = inputs(torch.float32)
    gm, parameters, report = rewritten(module, args)
    assert "-> dropout 0.25" in report.fused("output")[0].what
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)

    def call(seed):
        torch.manual_seed(seed)
        return gm(*parameters, *args)

    assert torch.equal(call(3), call(3))
    assert not torch.equal(call(3), call(4))
    # The projection's gradient shows what its input was.
    (dweight,) = torch.autograd.grad(call(3).sum(), [parameters[-1]])
    dropped = dweight[0].view(3, W)  # the column sums of the dropped output
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, [1])
    keep = [keep_scale(seed, 0.25, T, piece, H, D, torch.float32).view(T, W) for piece in (0, 1, 3)]
    dry = upcast(module, args[0], args[1], concat=True).detach().split(W, dim=1)
    torch.testing.assert_close(dropped, torch.stack([(k * d).sum(0) for k, d in zip(keep, dry, strict=True)]))


def test_dropout_stays_outside_under_fallback_random():
    module = Output(lambda m, a, u: F.dropout(u * layer_norm(m, a), 0.25)).train()
    args = inputs(torch.float32)
    with torch._inductor.config.patch(fallback_random=True):
        gm, parameters, _ = rewritten(module, args)
    assert gm.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    torch.manual_seed(1)
    ours = gm(*parameters, *args)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, module(*args))


def test_autocast_rounds_where_the_projection_would():
    args = [*inputs(torch.float32), torch.randn(E, W)]

    def call(a, u, x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(u * F.layer_norm(a, (W,)), weight) + x

    gm = traced(call, args)
    assert output.run(gm, Report()) == 1
    gm.recompile()
    op = gm.graph.find_nodes(op="call_function", target=OP)[0]
    assert op.meta["val"].dtype == torch.bfloat16
    a, u, x, weight = (t.double() for t in args)
    reference = F.linear(u * F.layer_norm(a, (W,)), weight) + x
    assert_within_budget(gm(*args), call(*args), reference, FORWARD)


NEAR_MISSES = {
    "gated value escapes": (
        lambda a, u: (F.layer_norm(p := attended(a) * u, (W,)), p),
        "the normalised value has a second use",
    ),
    "normalised value escapes": (
        lambda a, u: ((n := F.layer_norm(a, (W,))) * u, n),
        "the normalised value has a second use",
    ),
    "one gate a row": (lambda a, u: F.layer_norm(a, (W,)) * u.mean(-1, keepdim=True), "the gate has shape"),
    "not attention": (lambda a, u: F.layer_norm(torch.tanh(a), (W,)) * u, "not by attention"),
    "operand written in between": (
        lambda a, u: ((n := F.layer_norm(a, (W,))), (g := F.silu(u)), u.zero_(), g * n)[-1],
        "written in place by zero_",
    ),
    "wider precision": (lambda a, u: (F.layer_norm(a.double(), (W,)) * u).float(), "float64"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    function, reason = NEAR_MISSES[name]
    args = [torch.randn(T, W), torch.randn(T, W)]
    gm = traced(function, args)
    before = str(gm.graph)
    report = Report()
    assert output.run(gm, report) == 0
    assert reason in report.missed("output")[0].reason
    assert str(gm.graph) == before


@pytest.mark.parametrize(
    "function",
    [
        lambda a, u: F.layer_norm(a, (W,)) * u[0],  # its own affine
        lambda a, u: F.layer_norm(a, (W,)) + u,
        lambda a, u: F.softmax(a, -1) * u,
        lambda a, u: a * u,
        lambda a, u: F.layer_norm(a, (W,)) * 2,
        lambda a, u: F.layer_norm(a, (W,)) * (u[:, :1] > 0).to(a.dtype),  # padded rows cleared
    ],
)
def test_nothing_to_find(function):
    gm = traced(function, [torch.randn(T, W), torch.randn(T, W)])
    report = Report()
    assert output.run(gm, report) == 0 and not report.regions


def test_no_sequences_of_any_length():
    def gated(a, u):  # [N, 0, W], N free
        return F.layer_norm(a.transpose(0, 1), (W,)) * u.transpose(0, 1)

    args = [torch.randn(5, 0, W), torch.randn(5, 0, W)]
    gm = traced(gated, args)
    assert output.run(gm, Report()) == 1
    gm.recompile()
    assert gm(*args).shape == (0, 5, W)


def test_with_one_token_a_weight_is_no_gate():
    module = Output(lambda m, a, u: F.layer_norm(a, (W,)) * m.weight.view(1, W) + u)
    gm, parameters = traced_module(module, inputs(torch.float32, tokens=1))
    for node, parameter in zip(gm.graph.find_nodes(op="placeholder"), parameters, strict=False):
        node.meta["example_value"] = parameter
    report = Report()
    assert output.run(gm, report) == 0 and not report.regions


def test_value_needed_before_dropout_ends_the_region():
    module = Output(lambda m, a, u: F.dropout(y := u * layer_norm(m, a), 0.5) + y).train()
    gm, _, report = rewritten(module, inputs(torch.float32))
    assert "dropout" not in report.fused("output")[0].what


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "after attention"])
@pytest.mark.parametrize("name", ["meta_stu group norm", "nvidia_native", "research unbroken", "four linears"])
def test_models(name, alone):
    case, counts = MODELS[name], []

    def backend(gm, example_inputs):
        graph, passes = capture(gm), [uvqk, output] if alone else [attention, uvqk, output]
        counts.extend(p.run(graph, Report()) for p in passes)
        assert [p.run(graph, Report()) for p in passes] == [0] * len(passes)
        graph.recompile()
        return graph.forward

    model, arguments = case.model(), case.arguments(3)
    x = arguments[0].requires_grad_()
    torch._dynamo.maybe_mark_dynamic(x, 0)

    def run(call, model):
        out = next(t for t in torch.utils._pytree.tree_leaves(call(*arguments)) if isinstance(t, Tensor))
        grads = torch.autograd.grad(out, [x, *model.parameters()], torch.ones_like(out), allow_unused=True)
        return [t for t in (out, *grads) if t is not None]

    ours, eager = run(torch.compile(model, backend=backend), model), run(model, model)
    assert counts == [1] * len(counts) and counts
    arguments = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
    x = arguments[0] = arguments[0].detach().requires_grad_()
    with in_plain_pytorch():
        reference = run(model.double(), model)
    for i, (o, e, r) in enumerate(zip(ours, eager, reference, strict=True)):
        assert_within_budget(o, e, r, BACKWARD if i else FORWARD, f"value {i}")
