"""The attention pass on every model of tests/models: what is fused, the numbers, and what is left alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from hstu_compile.capture import capture
from hstu_compile.passes import apply, attention, parts
from hstu_compile.passes.graph import is_parameter
from hstu_compile.passes.products import as_product
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.models import MODELS
from tests.models.near_misses import NearMiss
from tests.models.spellings import SPELLINGS, Spelled

ATTENTION = torch.ops.hstu_compile.hstu_attention.default


class Rewriter:
    """A torch.compile backend: capture, the attention pass, and the rewritten graph executed as it is."""

    def __init__(self) -> None:
        self.report = Report()
        self.graphs: list[fx.GraphModule] = []
        self.fused = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any]):
        captured = capture(gm)
        self.fused += apply(captured, self.report, ["attention"])
        self.graphs.append(captured)
        return captured.forward

    def calls(self, target: Any) -> list[fx.Node]:
        everywhere = [part for gm in self.graphs for part in parts(gm)]
        return [node for gm in everywhere for node in gm.graph.find_nodes(op="call_function", target=target)]

    def said(self) -> str:
        return "\n".join(region.what for region in self.report.fused())


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def converted(tree: Any, dtype: torch.dtype) -> Any:
    def convert(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return torch.utils._pytree.tree_map(convert, tree)


def values_and_gradients(model: nn.Module, call: Any, arguments: tuple[Any, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs, and the gradients of x and of every parameter for a fixed upstream gradient of every output."""
    x = arguments[0].clone().requires_grad_()
    for argument in tensors((x, *arguments[1:])):
        torch._dynamo.maybe_mark_dynamic(argument, 0)  # batch size or token count
    outputs = [out for out in tensors(call(x, *arguments[1:])) if out.is_floating_point()]
    upstream = [
        torch.randn(out.shape, generator=torch.Generator().manual_seed(i)).to(out) for i, out in enumerate(outputs)
    ]
    inputs = [x, *model.parameters()]
    grads = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return outputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def assert_same_numbers(model: nn.Module, compiled: Any, arguments: tuple[Any, ...]) -> None:
    ours = values_and_gradients(model, compiled, arguments)
    eager = values_and_gradients(model, model, arguments)
    double = copy.deepcopy(model).double()
    with in_plain_pytorch():
        reference = values_and_gradients(double, double, converted(arguments, torch.float64))
    for kind, m in enumerate((FORWARD, BACKWARD)):
        for i, triple in enumerate(zip(ours[kind], eager[kind], reference[kind], strict=True)):
            assert_within_budget(*triple, m, f"{('output', 'gradient')[kind]} {i}")


@pytest.mark.parametrize("batches", [(3, 4), (1, 1)], ids=["some sequences", "one sequence"])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_fused_and_keep_their_numbers(name: str, batches: tuple[int, int]) -> None:
    case, rewriter = MODELS[name], Rewriter()
    model = case.model()
    compiled = torch.compile(model, backend=rewriter)
    for seed, batch in enumerate(batches):
        arguments = case.arguments(batch, seed)
        assert_same_numbers(model, compiled, arguments)
        if seed == 0:
            compiles = len(rewriter.graphs)
    assert len(rewriter.graphs) == compiles or not case.dynamic, "another batch size or token count compiled again"

    expected = case.regions * len(rewriter.graphs) // compiles
    assert rewriter.fused == expected, str(rewriter.report)
    assert len(rewriter.calls(ATTENTION)) == expected
    products = [p for gm in rewriter.graphs for n in gm.graph.nodes if (p := as_product(n)) and len(p.out_labels) > 2]
    assert all(is_parameter(p.right) for p in products), "an old product is still there"
    assert all(words in rewriter.said() for words in case.says), rewriter.said()
    assert all(f"; {case.layout};" in region.what for region in rewriter.report.fused()), rewriter.said()
    assert all("tests/models" in region.source for region in rewriter.report.fused())
    assert all(attention.run(gm, Report()) == 0 for gm in rewriter.graphs), "the second application found something"


def test_an_output_as_long_as_the_offsets_say() -> None:
    """Without a total length T is read from the data: known to be that of x where the code joins the two."""
    case, rewriter = MODELS["research"], Rewriter()
    model = case.model()
    compiled = torch.compile(model, backend=rewriter)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for batch in (3, 4, 5):
            assert_same_numbers(model, compiled, case.arguments(batch))
    assert rewriter.fused == len(rewriter.graphs) <= 2, "a graph break, or another token count compiled again"
    assert all("; jagged;" in region.what for region in rewriter.report.fused())
    assert not rewriter.calls(torch.ops.fbgemm.dense_to_jagged.default), "the wait for T is still there"


def test_an_output_of_unknown_length_stays_dense() -> None:
    class Alone(nn.Module):
        """Nothing else has the output's T."""

        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            q, k, v = (fbgemm.jagged_to_padded_dense(t, [offsets], [12]) for t in x.chunk(3, 1))
            a = torch.nn.functional.silu(q @ k.mT).tril() @ v / 12
            return fbgemm.dense_to_jagged(a, [offsets])[0]

    fbgemm, model, rewriter = torch.ops.fbgemm, Alone(), Rewriter()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(model, backend=rewriter, dynamic=True)
        assert_same_numbers(model, compiled, (torch.randn(15, 24), torch.tensor([0, 7, 15])))
    assert rewriter.fused == len(rewriter.graphs) == 1 and "; dense;" in rewriter.said()
    assert rewriter.calls(torch.ops.fbgemm.dense_to_jagged.default)


MISSES = {
    "softmax": "softmax, not silu",
    "gelu": "gelu, not silu",
    "second nonlinearity": "tanh",
    "minus infinity": "masked with -inf before silu",
    "dropout": "dropout on the attention weights",
    "scores returned": "the attention scores leave the graph",
    "learned mask": "needs a gradient",
    "half masked before silu": "multiplied by a tensor over rows and columns before silu",
    "added after silu": "something is added to the attention weights",
    "fewer queries": "fewer queries than keys",
}


@pytest.mark.parametrize("kind", MISSES)
def test_near_misses_are_left_alone_and_explained(kind: str) -> None:
    model, rewriter = NearMiss(kind), Rewriter()
    compiled = torch.compile(model, backend=rewriter)
    x = torch.randn(2, 6, 16)
    torch.manual_seed(1)
    ours = tensors(compiled(x))
    torch.manual_seed(1)
    for a, b in zip(ours, tensors(model(x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert rewriter.fused == 0
    (miss,) = rewriter.report.missed()
    assert MISSES[kind] in miss.reason
    assert "near_misses.py" in miss.source


@pytest.mark.parametrize(("kind", "words"), [("right", "causal"), ("hole", "mask tensor")])
def test_what_the_near_misses_should_be(kind: str, words: str) -> None:
    model, rewriter = NearMiss(kind), Rewriter()
    assert_same_numbers(model, torch.compile(model, backend=rewriter), (torch.randn(2, 6, 16),))
    assert rewriter.fused == 1 and words in rewriter.said()


def test_dropout_that_does_nothing_is_fused() -> None:
    model, rewriter = NearMiss("dropout").eval(), Rewriter()
    assert_same_numbers(model, torch.compile(model, backend=rewriter), (torch.randn(2, 6, 16),))
    assert rewriter.fused == 1


@pytest.mark.parametrize("batches", [(2, 3), (1,)], ids=["some sequences", "one sequence"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, batches: tuple[int, ...]) -> None:
    function, words = SPELLINGS[name]
    model, rewriter = Spelled(function), Rewriter()
    compiled = torch.compile(model, backend=rewriter)
    for batch in batches:
        assert_same_numbers(model, compiled, (torch.randn(batch, 6, 16),))
    assert len(rewriter.graphs) == 1
    assert rewriter.fused == 1, str(rewriter.report)
    assert words in rewriter.said()


@pytest.mark.parametrize(("shape", "heads"), [((1, 6, 16), 2), ((3, 6, 16), 1), ((1, 6, 16), 1), ((2, 1, 16), 2)])
def test_dimensions_of_size_one(shape: tuple[int, ...], heads: int) -> None:
    model, rewriter = Spelled(SPELLINGS["ellipsis"][0], heads=heads), Rewriter()
    x = torch.randn(shape)
    torch.testing.assert_close(torch.compile(model, backend=rewriter)(x), model(x))
    assert rewriter.fused == 1


@pytest.mark.parametrize("lengths", [[7], [0, 5, 0], [0, 0]])
def test_one_and_empty_sequences(lengths: list[int]) -> None:
    model, rewriter = MODELS["meta_stu"].model(), Rewriter()
    x, offsets = torch.randn(sum(lengths), 16), torch.tensor([0, *lengths]).cumsum(0)
    arguments = x, offsets, 12, torch.tensor(lengths).clamp(max=2)
    torch.testing.assert_close(torch.compile(model, backend=rewriter)(*arguments), model(*arguments))
    assert rewriter.fused == 1


@pytest.mark.parametrize("shape", [(0, 6, 16), (3, 0, 16)])
def test_where_nothing_is_computed_nothing_is_fused(shape: tuple[int, ...]) -> None:
    model, rewriter = Spelled(SPELLINGS["ellipsis"][0]), Rewriter()
    x = torch.randn(shape)
    torch.testing.assert_close(torch.compile(model, backend=rewriter)(x), model(x))
    (miss,) = rewriter.report.missed()
    assert "no sequences" in miss.reason


def test_max_seq_len_may_change() -> None:
    model, rewriter = MODELS["meta_stu window"].model(), Rewriter()
    compiled = torch.compile(model, backend=rewriter)
    x, offsets, _, num_targets = MODELS["meta_stu window"].arguments(3)
    for n in (12, 15, 20, 31):
        assert_same_numbers(model, compiled, (x, offsets, n, num_targets))
    assert len(rewriter.graphs) == rewriter.fused == 2  # static, then for every length


@pytest.mark.parametrize("name", ["nvidia_native", "research unbroken", "key padding"])
def test_autocast(name: str) -> None:
    """The op runs in the dtype that autocast gives the second product, from inputs of whatever dtype."""
    case, rewriter = MODELS[name], Rewriter()
    model, arguments = case.model(), case.arguments(3)
    compiled = torch.compile(model, backend=rewriter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = (values_and_gradients(model, call, arguments) for call in (compiled, model))
    exact = values_and_gradients(model, model, arguments)
    for kind, m in enumerate((FORWARD, BACKWARD)):
        for a, b, reference in zip(ours[kind], eager[kind], exact[kind], strict=True):
            assert_within_budget(a, b, reference, m)
    (call,) = rewriter.calls(ATTENTION)
    assert call.meta["val"].dtype == torch.bfloat16


class Uses(nn.Module):
    """The output leaves in the layout that the product gave it; sizes of the scores are read elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.mT
        out = nn.functional.silu(scores).tril() @ v
        return out, out.view(-1, *out.shape[2:]), torch.zeros_like(scores), scores.new_ones(scores.size(-1))


def test_strides_of_outputs_and_sizes_of_scores() -> None:
    model, rewriter = Uses(), Rewriter()
    compiled = torch.compile(model, backend=rewriter, dynamic=True)
    for shape in ((3, 6, 16), (2, 9, 16)):
        x = torch.randn(shape)
        for ours, eager in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(ours, eager)
            assert ours.stride() == eager.stride()
    assert len(rewriter.graphs) == rewriter.fused == 1
    assert not any(as_product(node) for node in rewriter.graphs[0].graph.nodes)


class FilledBeforeTheDivisor(nn.Module):
    """The size of the fill is wanted before there is a divisor, from which the batch size could be read too."""

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        fbgemm, n = torch.ops.fbgemm, 12
        q, k, v = (fbgemm.jagged_to_padded_dense(t, [offsets], [n]) for t in x.chunk(3, -1))
        scores = q @ k.mT
        scores = torch.where(torch.ones(n, n, dtype=torch.bool).tril(), scores, torch.full_like(scores, -1e9))
        divisor = offsets.diff().clamp(min=1)[:, None, None]
        a = nn.functional.dropout(nn.functional.silu(scores) / divisor, 0.0) @ v  # stays in the graph: it is random
        return fbgemm.dense_to_jagged(a, [offsets], x.shape[0])[0]


def test_a_size_is_read_where_it_is_known() -> None:
    model, rewriter = FilledBeforeTheDivisor(), Rewriter()
    compiled = torch.compile(model, backend=rewriter, dynamic=True)
    for offsets in ([0, 7, 10, 22], [0, 2, 14]):
        assert_same_numbers(model, compiled, (torch.randn(offsets[-1], 48), torch.tensor(offsets)))
    assert len(rewriter.graphs) == rewriter.fused == 1


def test_inside_a_checkpoint() -> None:
    layer, rewriter = Spelled(SPELLINGS["ellipsis"][0]), Rewriter()

    def model(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(torch.compile(model, backend=rewriter)(x), model(x))
    assert rewriter.fused == len(rewriter.calls(ATTENTION)) == 1


class Experts(nn.Module):
    """Products around a silu, of activations with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 6)), nn.Parameter(torch.randn(3, 6, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(nn.functional.silu(torch.bmm(self.linear(x), self.up)), self.down)


def test_an_mlp_is_no_attention_and_no_near_miss() -> None:
    rewriter = Rewriter()
    torch.compile(Experts(), backend=rewriter)(torch.randn(3, 6, 16))
    assert not rewriter.report.regions
