"""Relative biases: what of them goes into the op, the numbers, and that no [B, N, N] tensor is left."""

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn

import hstu_compile
from hstu_compile.passes import attention
from hstu_compile.passes.index_space_ops import NotUnderstood
from hstu_compile.passes.report import Report
from hstu_compile.passes.steps import DTYPES, steps
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.models import MODELS
from tests.models.relative_biases import FROM_BUFFERS, LONGEST, RECOGNISED, TENSORS, Biased
from tests.test_attention_pass import ATTENTION, Rewriter, assert_same_numbers, converted, values_and_gradients
from tests.without_codegen import Compiled, inductor_without_codegen

INT = torch.iinfo(torch.int64)


@pytest.fixture(autouse=True)
def the_same_each_time() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)  # the error of a gradient of few numbers is chance


def arguments(batch: int, n: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Times of whole seconds since 1970: in order, out of order, before it, and one that wraps around."""
    dice = torch.Generator().manual_seed(seed)
    times = torch.randint(0, 5000, (batch, n), generator=dice).sort(1).values + 1_700_000_000
    times[1] = times[1].flip(0) - 2 * 1_700_000_000
    times[-1, ::3] = torch.randint(INT.min, INT.max, (len(times[-1, ::3]),), generator=dice)
    return torch.randn(batch, n, 24, generator=dice), times


def planes(graph: fx.Graph, n: int) -> list[fx.Node]:
    """What the result needs that holds a number for every row and column of several sequences or heads."""

    def is_plane(value: object) -> bool:
        if not isinstance(value, Tensor):
            return False
        sizes = [int(size) if isinstance(size, int) else 0 for size in value.shape]
        return len(sizes) > 2 and (sizes.count(n) > 1 or n * n in sizes) and not 1 == sizes[0] == sizes[1]

    live, todo = set[fx.Node](), [graph.output_node()]
    while todo:
        live.add(node := todo.pop())
        todo += [above for above in node.all_input_nodes if above not in live]
    return [node for node in live if is_plane(node.meta.get("val"))]


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_bias_that_is_recognised(name: str) -> None:
    bias, words = RECOGNISED[name]
    model, rewriter = Biased(bias), Rewriter()
    compiled = torch.compile(model, backend=rewriter)
    for batch in (3, 5):
        assert_same_numbers(model, compiled, arguments(batch))
    (gm,) = rewriter.graphs
    assert rewriter.fused == 1 and words in rewriter.said() and "bias tensor" not in rewriter.said(), rewriter.said()
    (call,) = rewriter.calls(ATTENTION)
    assert call.args[3 + 5] is None and not planes(gm.graph, 11)
    assert attention.run(gm, Report()) == 0, "the second application found something"


@pytest.mark.parametrize("name", TENSORS)
def test_a_bias_that_stays_a_tensor(name: str) -> None:
    bias, reason = TENSORS[name]
    model, rewriter = Biased(bias), Rewriter()
    compiled = torch.compile(model, backend=rewriter, dynamic=name == "bucket_by_the_length")
    for batch in (3, 5):
        assert_same_numbers(model, compiled, arguments(batch, n=LONGEST // 2))
    (call,) = rewriter.calls(ATTENTION)
    assert call.args[3 + 5] is not None and call.args[3 + 6] is call.args[3 + 7] is None
    assert "bias tensor" in rewriter.said() and reason in rewriter.said(), rewriter.said()


@pytest.mark.parametrize("name", RECOGNISED)
def test_another_length_does_not_compile_again(name: str) -> None:
    model, rewriter = Biased(RECOGNISED[name][0]), Rewriter()
    compiled = torch.compile(model, backend=rewriter, dynamic=True)
    double, pooled = copy.deepcopy(model).double(), []
    for batch, n in (
        (3, 11),
        (4, 9),
        (5, LONGEST - 1),
        (6, 12),
        (9, 13),
    ):  # bad luck is gone in the maximum of more draws
        given = arguments(batch, n)
        runs = (compiled, given), (model, given), (double, converted(given, torch.float64))
        outs = [values_and_gradients(double if call is double else model, call, args) for call, args in runs]
        pooled.append([torch.cat([t.flatten() for t in values]) for values, _ in outs])
        pooled[-1] += [torch.cat([t.flatten() for t in grads]) for _, grads in outs]
    ours, eager, exact, *gradients = (torch.cat(parts) for parts in zip(*pooled, strict=True))
    assert_within_budget(ours, eager, exact, FORWARD)
    assert_within_budget(*gradients, BACKWARD, "gradients")
    assert len(rewriter.graphs) == 1
    assert "bias tensor" not in rewriter.said(), rewriter.said()


@pytest.mark.parametrize("name", ["research", "research unbroken"])
def test_no_plane_of_a_sequence_is_left_of_the_research_layer(name: str) -> None:
    case = MODELS[name]
    model, given = case.model(), case.arguments(3)
    for compiled in with_inductor():
        out, _ = torch.compile(model, backend=hstu_compile.backend)(*given)
        out.sum().backward()
        graphs = [gm.graph for gm in compiled.aot_graphs]
        named = {getattr(node.target, "_opname", "") for graph in graphs for node in graph.nodes}
        assert {"hstu_attention_forward", "hstu_attention_backward"} <= named
        assert not any(planes(graph, 12) for graph in graphs)


def with_inductor() -> Iterator[Compiled]:
    with pytest.MonkeyPatch.context() as patch:
        yield from inductor_without_codegen(patch)


def test_layers_of_one_bias() -> None:
    """Every call gets what it needs; a bias that is also returned is computed for that alone."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Biased(RECOGNISED["position_and_time"][0], heads=1) for _ in range(2))

        def forward(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
            for layer in self.layers:
                x = torch.cat([x[..., :16], layer(x, times)], -1)
            return x, layer.bias(layer, times, x.shape[1])

    model, rewriter = Layers(), Rewriter()
    assert_same_numbers(model, torch.compile(model, backend=rewriter), arguments(3))
    assert rewriter.fused == 2 and rewriter.said().count("time bias of") == 2


def test_a_gap_beyond_the_table_is_not_a_number() -> None:
    """As written the lookup stops there."""

    def unclamped(m: Biased, times: Tensor, n: int) -> Tensor:
        return m.ages[torch.log2((times[:, :, None] - times[:, None]).abs() / 100 + 1).long()][:, None]

    model, rewriter = Biased(unclamped), Rewriter()
    compiled = torch.compile(model, backend=rewriter)
    x, times = torch.randn(2, 6, 24), torch.arange(0, 6000, 500).view(2, 6)
    assert_same_numbers(model, compiled, (x, times))
    times[1, 3] += 100_000
    with pytest.raises(IndexError):
        model(x, times)
    ours = compiled(x, times)
    assert ours[1, 3:].isnan().all() and torch.equal(ours[0], compiled(x[:1], times[:1])[0])


@pytest.mark.parametrize("name", FROM_BUFFERS)
def test_a_bias_from_a_buffer_that_changes(name: str) -> None:
    bias, words = FROM_BUFFERS[name]
    model, given = Biased(bias), arguments(3)
    (report,) = hstu_compile.explain(model, *given).reports
    assert words in str(report) and "bias tensor" not in str(report), str(report)
    for _ in with_inductor():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=hstu_compile.backend)
        assert_same_numbers(model, compiled, given)
        model.apart.copy_(model.apart.flip(0, 1))
        model.bounds *= 2
        assert_same_numbers(model, compiled, given)


FUNCTIONS = {
    "logarithm": lambda d: (torch.log(d.abs().clamp(min=1)) / 0.301).long().clamp(0, 128),
    "quotient": lambda d: torch.clamp(d // 100, 0, 7).nan_to_num(0).long(),
    "identity": lambda d: d.clamp(-30, 30).nan_to_num(0).long() + 30,
    "bounds": lambda d: torch.bucketize(d.abs(), torch.tensor([1, 10, 100, 200])),
    "sign": lambda d: (d > 0).long() - (d < 0).long(),
    "two sides": lambda d: torch.where(d > 0, 16, 0) + torch.log1p(d.abs().double()).nan_to_num(0).clamp(0, 15).long(),
    "far away": lambda d: (d > 1e9).long(),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_steps_are_the_function(name: str, dtype: torch.dtype) -> None:
    function = FUNCTIONS[name]
    found = steps(function, dtype, torch.device("cpu"))
    assert bool((found.boundaries.diff() >= 0).all()) and len(found.values) == len(found.boundaries) + 1
    dice = torch.Generator().manual_seed(1)
    numbers = torch.cat([torch.arange(-3000, 3000), torch.randint(INT.min, INT.max, (5000,), generator=dice)])
    numbers = torch.cat([numbers, numbers[6000:] >> torch.randint(0, 63, (5000,), generator=dice)]).to(dtype)
    if dtype.is_floating_point:
        ends = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1e-40], dtype=dtype)
    else:
        ends = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype)
    numbers = torch.cat([numbers, numbers / 7 if dtype.is_floating_point else numbers // 7, ends])
    assert torch.equal(found.at(numbers), function(numbers))


@pytest.mark.parametrize(
    "function",
    [
        lambda d: d.abs() % 8,
        lambda d: (d == 5000).long(),
        lambda d: (d * d).clamp(0, 50),
        lambda d: d.clamp(-3000, 3000),
        lambda d: d * 0,
    ],
)
def test_what_has_no_steps_is_refused(function) -> None:
    with pytest.raises(NotUnderstood):
        steps(function, torch.int64, torch.device("cpu"))
