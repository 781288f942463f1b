"""Capture: one ATen graph, faithful to Dynamo's, and grafted so that nobody notices."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from hstu_compile.capture import NotCaptured, capture, graft
from hstu_compile.passes import parts
from hstu_compile.passes.report import source_line

aten = torch.ops.aten


def captured_graphs(f: Callable, *args: Any, dynamic: bool | None = True) -> tuple[list[fx.GraphModule], Any]:
    """The captured graphs of a call, and its result by way of capture, graft and AOTAutograd."""
    found = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        captured = capture(gm)
        found.append(captured)
        graft(captured, gm)
        return aot_eager(gm, example_inputs)

    return found, torch.compile(f, backend=backend, dynamic=dynamic)(*args)


def captured(f: Callable, *args: Any) -> fx.GraphModule:
    return captured_graphs(f, *args)[0][-1]


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for part in parts(gm) for node in part.graph.nodes if node.op == "call_function"]


def reason_not_captured(f: Callable, *args: Any) -> str:
    reasons = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        try:
            capture(gm)
        except NotCaptured as reason:
            reasons.append(str(reason))
        return gm.forward

    torch.compile(f, backend=backend)(*args)
    return "".join(reasons)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.uvqk = nn.Linear(width, 4 * width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        s = F.silu(torch.einsum("nd,md->nm", q, k)) / x.shape[0]
        return x + F.dropout(u * torch.einsum("nm,md->nd", s, v), 0.5, self.training)


assert_close = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def assert_same_as_eager(f: Callable, *args: Any, inputs: list[Tensor], dynamic: bool | None = True) -> fx.GraphModule:
    """Bitwise, forward and every gradient, under the same seed."""
    torch.manual_seed(1)
    expected = f(*args)
    torch.manual_seed(1)
    graphs, actual = captured_graphs(f, *args, dynamic=dynamic)
    assert_close(actual, expected)
    grads = (torch.autograd.grad(out.float().square().sum(), inputs, allow_unused=True) for out in (actual, expected))
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)
    return graphs[-1]


def test_one_spelling() -> None:
    block, x = Block(), torch.randn(5, 8, requires_grad=True)
    gm = assert_same_as_eager(block, x, inputs=[x, *block.parameters()])
    found = targets(gm)
    for op, count in ((aten.layer_norm, 1), (aten.linear, 1), (aten.einsum, 2), (aten.silu, 2), (aten.dropout, 1)):
        assert found.count(op.default) == count
    assert not any(node.op == "call_method" for node in gm.graph.nodes)


def test_source_lines_are_the_users() -> None:
    gm = captured(Block(), torch.randn(5, 8))
    (einsum, _) = gm.graph.find_nodes(op="call_function", target=aten.einsum.default)
    assert source_line(einsum).endswith('s = F.silu(torch.einsum("nd,md->nm", q, k)) / x.shape[0]')
    assert __file__ in source_line(einsum)


def test_sizes_stay_symbolic() -> None:
    gm = captured(Block(), torch.randn(5, 8))
    (einsum, _) = gm.graph.find_nodes(op="call_function", target=aten.einsum.default)
    assert not any(isinstance(size, int) for size in einsum.meta["val"].shape)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    """Recorded where it is inside, ambient where it is outside; in both cases the values have its dtype."""
    block, x = Block(), torch.randn(5, 8, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y = block(x)
            with torch.autocast("cpu", enabled=False):
                return y + block.norm(x) + block.uvqk(x)[:, :8]

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        gm = assert_same_as_eager(f if inside else block, x, inputs=[x, *block.parameters()])
    assert gm.graph.find_nodes(op="call_function", target=aten.linear.default)[0].meta["val"].dtype == torch.bfloat16
    regions = gm.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)
    assert len(regions) == (2 if inside else 0)
    if inside:
        assert gm.graph.find_nodes(op="call_function", target=aten.linear.default)[1].meta["val"].dtype == torch.float32


def test_casts_under_autocast_are_kept() -> None:
    """`.float()` does something only because autocast made the product bfloat16."""
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return (x @ w).float() * 3

    assert_same_as_eager(f, x, inputs=[x, w])


@pytest.mark.parametrize("context_fn", [False, True])
def test_checkpoint(context_fn: bool) -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.PREFER_RECOMPUTE

    block, x = Block(), torch.randn(5, 8, requires_grad=True)
    block.eval()
    more = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if context_fn else {}

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return checkpoint(block, x, use_reentrant=False, **more) + 1

    gm = assert_same_as_eager(f, x, inputs=[x, *block.parameters()])
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    assert len(calls) == context_fn  # what is recomputed, the context function says when it runs
    body = list(parts(gm))[-1]
    assert ("_checkpoint_context_fn" in body.meta) == context_fn
    (linear,) = body.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert linear.meta["val"].dtype == torch.bfloat16  # the autocast around the call
    assert "block" in source_line(linear) or "self.uvqk" in source_line(linear)


def test_a_checkpointed_region_stands_in_its_graph() -> None:
    """Its calls are tagged to be computed again, each region with its own number; what is around it is not."""
    inner, outer, x = Block().eval(), Block().eval(), torch.randn(5, 8, requires_grad=True)

    def nested(x: Tensor) -> Tensor:
        return checkpoint(inner, outer(x), use_reentrant=False)

    def f(x: Tensor) -> Tensor:
        return checkpoint(nested, x.sin(), use_reentrant=False).cos()

    gm = assert_same_as_eager(f, x, inputs=[x, *inner.parameters(), *outer.parameters()])
    tags = {node.target: node.meta.get("recompute") for node in gm.graph.nodes if node.op == "call_function"}
    assert tags[aten.sin.default] is None and tags[aten.cos.default] is None
    assert tags[aten.linear.default] == CheckpointPolicy.PREFER_RECOMPUTE
    first, second = (n.meta["ac_graph_id"] for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default))
    assert first != second


def test_checkpointed_twice() -> None:
    block, x = Block().eval(), torch.randn(5, 8, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False)
        return x

    # dynamic=True would lift norm.eps as a symbol into both bodies, at which Dynamo (2.13) fails.
    assert_same_as_eager(f, x, inputs=[x, *block.parameters()], dynamic=None)


def test_autograd_function_stays_opaque() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return F.silu(x) * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 7

    x = torch.randn(5, requires_grad=True)
    gm = assert_same_as_eager(lambda x: F.silu(Double.apply(x)), x, inputs=[x])
    assert targets(gm).count(aten.silu.default) == 1
    assert torch.ops.higher_order.autograd_function_apply in targets(gm)


def test_grad_mode_inside() -> None:
    block, x = Block(), torch.randn(5, 8, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = block.uvqk(x)[:, :8].sigmoid()
        return block(x) * gate

    assert_same_as_eager(f, x, inputs=[x, *block.parameters()])


def test_buffer_mutation_is_kept() -> None:
    class Counting(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x)

    block = Counting()
    gm = captured(block, torch.randn(5, 8))
    assert aten.add_.Tensor in targets(gm) and block.calls == 1


def test_constants_and_unbacked_sizes() -> None:
    x = torch.randn(5, 8, requires_grad=True)

    def f(x: Tensor, n: Tensor) -> Tensor:
        rows = torch.arange(n.sum().item())
        return x.sum() * torch.tensor([0.5, 2.0]) + F.silu(rows.float()).sum()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        assert_same_as_eager(f, x, torch.tensor([2, 3]), inputs=[x])


def test_transforms_of_torch_func() -> None:
    """Their tensors have no memory to compare: nothing that looks for aliases may meet them."""
    for f in (torch.vmap(lambda row: F.silu(row) * 2), torch.func.grad(lambda x: F.silu(x).sum())):
        assert "torch.func" in reason_not_captured(f, torch.randn(3, 4))


def test_graph_without_tensors() -> None:
    assert reason_not_captured(lambda n: torch.ones(n) + 1, 5) == "the graph has no tensor input"


@pytest.mark.parametrize("name, args", [("t_", ()), ("unsqueeze_", (0,)), ("transpose_", (0, 1)), ("squeeze_", ())])
def test_shape_changed_in_place(name: str, args: tuple) -> None:
    """Dynamo breaks the graph at some of these and keeps others; of a fresh tensor it is harmless."""

    def of_input(x: Tensor) -> Tensor:
        return getattr(x, name)(*args) + 1

    def of_fresh(x: Tensor) -> Tensor:
        return getattr(x + 1, name)(*args) * 2

    x = torch.randn(4, 3)
    assert_close(captured_graphs(of_fresh, x)[1], of_fresh(x))
    reason = reason_not_captured(of_input, x.clone())
    if not reason:
        assert_close(captured_graphs(of_input, x.clone())[1], of_input(x.clone()))


def write_fresh(x: Tensor, m: Tensor) -> Tensor:
    y = x + 1
    y.masked_fill_(m, 0.0)
    y += x
    y *= 2
    return F.silu(y, inplace=True)


def write_view_alone(x: Tensor, m: Tensor) -> Tensor:
    return (x + 1).view(-1).mul_(2)


def write_bool(x: Tensor, m: Tensor) -> Tensor:
    y = x > 0
    y &= m
    y |= x > 1
    y.logical_not_()
    return x * y


def write_input(x: Tensor, m: Tensor) -> Tensor:
    x.mul_(2)
    return x + 1


def write_view_of_input(x: Tensor, m: Tensor) -> Tensor:
    return x.view(-1).mul_(2) + 1


def base_read_later(x: Tensor, m: Tensor) -> Tensor:
    y = x + 1
    y[:, 0].mul_(2)
    return y * 3


def view_read_later(x: Tensor, m: Tensor) -> Tensor:
    y = x + 1
    rows = y.view(-1)
    y.mul_(2)
    return rows * 3


def base_returned(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    y = x + 1
    return y, y[:, :2].mul_(2)


def dtype_would_change(x: Tensor, m: Tensor) -> Tensor:
    y = (x + 1).bfloat16()
    return y.mul_(x)


def layout_would_change(x: Tensor, m: Tensor) -> Tensor:
    return (x + 1)[:, ::2].mul_(2)


def write_transposed(x: Tensor, m: Tensor) -> Tensor:
    y = x.t() + 1
    return y.masked_fill_(m.t().contiguous(), 0.0).mul_(2)


@pytest.mark.parametrize(
    "f, left",
    [
        (write_fresh, 0),
        (write_view_alone, 0),
        (write_bool, 0),
        (write_input, 1),
        (write_view_of_input, 1),
        (base_read_later, 1),
        (view_read_later, 1),
        (base_returned, 1),
        (dtype_would_change, 1),
        (layout_would_change, 1),
        (write_transposed, 0),
    ],
)
def test_in_place(f: Callable, left: int) -> None:
    x, mask = torch.randn(4, 6), torch.rand(4, 6) > 0.5
    expected = f(x.clone(), mask)
    graphs, actual = captured_graphs(f, x.clone(), mask)
    assert_close(actual, expected, check_stride=True)
    assert sum(op._schema.is_mutable for op in targets(graphs[0]) if hasattr(op, "_schema")) == left


def test_in_place_gradient() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    assert_same_as_eager(write_fresh, x, torch.rand(4, 6) > 0.5, inputs=[x])


def test_graft_keeps_dynamos_object() -> None:
    seen = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        before = [(n.meta, n._dynamo_source) for n in gm.graph.find_nodes(op="placeholder")]
        meta, sources = dict(gm.meta), gm._param_name_to_source
        graft(capture(gm), gm)
        after = [(n.meta, n._dynamo_source) for n in gm.graph.find_nodes(op="placeholder")]
        assert gm.meta == meta and "dynamo_compile_id" in meta and gm._param_name_to_source is sources
        for (old, old_source), (new, new_source) in zip(before, after, strict=True):
            assert new_source is old_source and old.items() <= new.items() and "val" in new
        seen.append(len(before))
        return gm.forward

    torch.compile(Block(), backend=backend, dynamic=True)(torch.randn(5, 8))
    assert seen
