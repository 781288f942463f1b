"""What all passes see through: parts cut and joined again, silu written out, tensors of zeros and ones alone."""

import pytest
import torch
from torch import Tensor

from hstu_compile.passes import apply
from hstu_compile.passes.activation import as_silu
from hstu_compile.passes.joined_parts import as_layout
from hstu_compile.passes.report import Report
from hstu_compile.passes.zero_one import is_zero_or_one
from tests.tracing import traced

aten = torch.ops.aten
JOINS = {
    "chunk, cat": lambda x: torch.cat(x.chunk(2, -1), 0),
    "split, cat": lambda x: torch.cat(x.split(3, dim=1), dim=2),
    "split by sizes, stack": lambda x: torch.stack(x.split([2, 2, 2, 2], -1), 1),
    "chunk of the batch": lambda x: torch.cat(torch.cat([x, x + 1], 0).chunk(2, 0), -1),
    "unbind, cat": lambda x: torch.cat(x.unbind(1), dim=-1),
    "unbind, stack": lambda x: torch.stack(x.unbind(2), dim=-2),
}
NO_JOINS = {
    "another order": lambda x: torch.cat(x.chunk(2, -1)[::-1], 0),
    "a part is missing": lambda x: torch.cat(x.chunk(4, -1)[:3], 0),
    "parts of several sizes": lambda x: torch.cat(x.split(4, 1), 1),
    "a part changed": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.chunk(2, -1))], 0),
    "two tensors": lambda x: torch.cat([x.chunk(2, -1)[0], (x + 1).chunk(2, -1)[1]], 0),
}


@pytest.mark.parametrize("name", JOINS)
def test_joined_parts_become_a_layout(name: str) -> None:
    x = torch.randn(3, 6, 8)
    gm = traced(JOINS[name], [x])
    as_layout(gm.graph)
    gm.recompile()
    gm.graph.lint()
    assert len(gm.graph.find_nodes(op="call_function", target=aten.clone.default)) == 1
    for batch in (3, 4):
        x = torch.randn(batch, 6, 8)
        ours, eager = gm(x), JOINS[name](x)
        assert torch.equal(ours, eager) and ours.stride() == eager.stride()
        ours.zero_()  # memory of its own, like that of a join
        assert x.count_nonzero()
    before = str(gm.graph)
    as_layout(gm.graph)
    assert str(gm.graph) == before


@pytest.mark.parametrize("name", NO_JOINS)
def test_other_joins_stay(name: str) -> None:
    gm = traced(NO_JOINS[name], [torch.randn(3, 6, 8)])
    before = str(gm.graph)
    as_layout(gm.graph)
    assert str(gm.graph) == before


@pytest.mark.parametrize(
    "function, left",
    [
        (lambda x: x * torch.sigmoid(x), 0),
        (lambda x: torch.mul(x.sigmoid(), x) + 1, 0),
        (lambda x: (g := x.sigmoid()) * x + g, 1),
        (lambda x: x * torch.sigmoid(1.7 * x), 1),
        (lambda x: x.long() * torch.sigmoid(x.long()), 1),
        (lambda x: (g := x.sigmoid()) * g, 1),
    ],
)
def test_silu_written_out(function, left: int) -> None:
    gm = traced(function, [torch.randn(3, 4)])
    as_silu(gm.graph)
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=aten.sigmoid.default)) == left
    x = torch.randn(5, 4)
    torch.testing.assert_close(gm(x), function(x))


def ones(n: int) -> Tensor:
    return torch.ones(n, n)


ZERO_ONE = {
    "bool": lambda m: m > 1,
    "a cast": lambda m: (m > 1).float()[None].expand(2, -1, -1),
    "a triangle": lambda m: torch.tril(ones(4)) * (m > 0),
    "one minus": lambda m: 1 - (m > 0).long(),
    "one minus, a tensor": lambda m: torch.ones_like(m) - (m > 0).float(),
    "chosen": lambda m: torch.where(m > 0, 1.0, 0.0),
    "filled": lambda m: ones(4).masked_fill(m > 0, 0.0),
    "either": lambda m: (m > 0).int() | (m < -1).int(),
}
MORE = {
    "an input": lambda m: m,
    "a half": lambda m: (m > 0) * 0.5,
    "a sum": lambda m: (m > 0).int() + (m < 1).int(),
    "two minus": lambda m: 2 - (m > 0).long(),
    "minus twice": lambda m: torch.sub(torch.ones_like(m), (m > 0).float(), alpha=2),
    "one minus an input": lambda m: 1 - m,
    "chosen": lambda m: torch.where(m > 0, 1.0, m),
    "filled with two": lambda m: ones(4).masked_fill(m > 0, 2.0),
    "a quotient": lambda m: (m > 0) / 3,
}


@pytest.mark.parametrize("function", ZERO_ONE.values(), ids=ZERO_ONE)
def test_zeros_and_ones(function) -> None:
    (result,) = traced(function, [torch.randn(4, 4)]).graph.output_node().all_input_nodes
    assert is_zero_or_one(result)


@pytest.mark.parametrize("function", MORE.values(), ids=MORE)
def test_more_than_zeros_and_ones(function) -> None:
    (result,) = traced(function, [torch.randn(4, 4)]).graph.output_node().all_input_nodes
    assert not is_zero_or_one(result)


def test_heads_that_are_cut_and_joined_are_heads() -> None:
    """The mask of the batch is identified, which needs to know the batch from the heads."""

    def attention(x: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(6)
        real = place < lengths[:, None]
        keep = (place[:, None] >= place) & real[:, None] & real[:, :, None]
        q, k, v = (torch.cat(t.chunk(2, -1), 0) for t in x.chunk(3, -1))
        weights = torch.nn.functional.silu(q @ k.mT) * keep.repeat(2, 1, 1)
        return torch.cat((weights @ v).chunk(2, 0), -1)

    x, lengths = torch.randn(3, 6, 24), torch.tensor([2, 6, 4])
    gm, report = traced(attention, [x, lengths]), Report()
    apply(gm, report)
    (region,) = report.fused("attention")
    assert "causal; padding by lengths" in region.what
    torch.testing.assert_close(gm(x, lengths), attention(x, lengths))
    assert not gm.graph.find_nodes(op="call_function", target=aten.cat.default)
