"""The interpreter against torch itself: any expression, also under other sizes than it was captured with."""

import operator

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from hstu_compile.passes.index_space import IndexSpace, NotUnderstood, symbol_hints


def capture(function, *args, mode="symbolic"):
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*args)


def everywhere(shape):
    return tuple(torch.meshgrid(*[torch.arange(s) for s in shape], indexing="ij")) if shape else ()


def evaluate_all(gm: fx.GraphModule, args) -> Tensor:
    """The graph's result at all its coordinates, with sizes and inputs taken from `args`."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    symbols, leaves = {}, {}
    for node, arg in zip(placeholders, args, strict=True):
        value = node.meta.get("val")
        pairs = zip(value.shape, arg.shape, strict=True) if isinstance(arg, Tensor) else [(value, arg)]
        symbols |= {size.node.expr: number for size, number in pairs if isinstance(size, torch.SymInt)}
        if isinstance(arg, Tensor):
            leaves[node] = lambda coords, arg=arg: arg[coords]
    (result,) = gm.graph.output_node().all_input_nodes
    space = IndexSpace(symbols, leaves, rank=result.meta["val"].dim())
    shape = space.shape(result)
    return space.value(result, everywhere(shape)).expand(shape)


def ids(n):
    return torch.arange(n)


EXPRESSIONS = {
    "compare": lambda x, n: ids(n)[:, None] >= ids(n)[None, :],
    "tril": lambda x, n: torch.ones(n, n).tril(-1) + torch.tril(x[:, None, None] * torch.ones(n, n), 1),
    "triu": lambda x, n: 1 - torch.ones(n, n).triu(1),
    "lengths": lambda x, n: (ids(n) < x.view(-1, 1)).unsqueeze(1) & torch.eye(n, dtype=torch.bool),
    "where": lambda x, n: torch.where(ids(n) < x[:, None], 0.5, torch.zeros((), dtype=torch.float64)),
    "views": lambda x, n: (ids(n * n).view(n, n).t() + x.view(-1, 1, 1)).permute(1, 2, 0).flatten(0, 1),
    "regroup": lambda x, n: ids(6 * n).view(2, 3, n).transpose(0, 1).reshape(3, 2 * n).reshape(6, n)[1::2],
    "expand": lambda x, n: x.view(-1, 1).expand(-1, n).unsqueeze(0).squeeze(0).expand_as(torch.zeros(x.size(0), n)),
    "slices": lambda x, n: x[1:] - x[:-1] + ids(n)[-2:].sum() + ids(n)[0],
    "cat": lambda x, n: torch.cat([x[:1], x * 2, ids(n)]),
    "stack": lambda x, n: torch.stack([x, x + 1, x * n], dim=1),
    "pad": lambda x, n: torch.nn.functional.pad(x, (2, -1), value=7) + 0,
    "split": lambda x, n: torch.cat([ids(7).split(3)[1], ids(8).chunk(2)[1], torch.eye(3, n).unbind(0)[1].long()]),
    "meshgrid": lambda x, n: operator.sub(*torch.meshgrid(ids(n), ids(n), indexing="xy")) // 3 % 4,
    "cumsum": lambda x, n: torch.cumsum(x, 0)[:, None] + (ids(n) < 3).cumsum(0),
    "diff": lambda x, n: torch.diff(x, prepend=x[:1] * 0) + torch.diff(x, append=x[-1:]),
    "reductions": lambda x, n: x.max() + x.sum() + (x > 2).any() + (ids(n)[:, None] >= x).sum(1, keepdim=True),
    "count": lambda x, n: ((ids(n)[None, :, None] >= ids(n)) & (ids(n) < x[:, None, None])).sum((-1, 1)),
    "min.dim": lambda x, n: (x[:, None] + ids(n)).min(1).values + x.clamp(max=2),
    "index": lambda x, n: torch.tensor([3, 1, 4, 1, 5])[ids(n) % 5] + x[(ids(n) % 2)[:, None] - 1],
    "gather": lambda x, n: (ids(n) * 3).expand(x.size(0), n).gather(1, x[:, None] % n),
    "embedding": lambda x, n: torch.nn.functional.embedding(x, torch.arange(30.0).view(15, 2)),
    "outer": lambda x, n: torch.einsum("bi,bj->bij", *2 * [(ids(n) < x[:, None]).float()]),
    "matmul": lambda x, n: (ids(n) < x[:, None]).float().unsqueeze(2) @ (ids(n) < x[:, None]).float().unsqueeze(1),
    "mm": lambda x, n: torch.ones(n, n).tril() @ torch.ones(n, n).tril(),
    "repeat": lambda x, n: x.repeat(2, 2) + x.repeat_interleave(2).view(1, -1),
    "repeat by tensor": lambda x, n: ids(3).repeat_interleave(torch.tensor([2, 0, 3]), output_size=5) + x[:1],
    "searchsorted": lambda x, n: torch.searchsorted(ids(3) * 4, x, right=True) + torch.bucketize(x, ids(n)),
    "index_put": lambda x, n: x.new_full((n, n), 7).index_put((ids(3), ids(3) - 2), x[:1].expand(3)) + 0,
    "flip": lambda x, n: ids(n).flip(0) - ids(n).roll(2, 0),
    "casts": lambda x, n: (torch.arange(300, dtype=torch.bfloat16)[:, None] >= torch.arange(300)).type_as(x),
    "alpha": lambda x, n: torch.sub(ids(n), x[:, None], alpha=2).abs().clamp(min=-1, max=n - 3).to(torch.float16),
    "bits": lambda x, n: ~((ids(n) > 2) ^ (ids(n) < n - 1)) | torch.logical_not(ids(n) == x[:, None]),
    "masked_fill": lambda x, n: torch.ones(n, n).masked_fill(ids(n) > ids(n)[:, None], float("-inf")).exp(),
    "full": lambda x, n: torch.full((n, 2), n) * torch.full_like(x[:2], 3) + x.new_full((2,), n) + x.new_zeros(()),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["symbolic", "fake"])
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_values_are_those_of_torch(name, mode):
    function = EXPRESSIONS[name]
    gm = capture(function, torch.tensor([2, 0, 5, 3]), 6, mode=mode)
    lengths = [torch.tensor([2, 0, 5, 3])] if mode == "fake" else [torch.tensor([1, 7, 4, 2, 9]), torch.tensor([3, 8])]
    for x in lengths:
        n = 6 if mode == "fake" else 10
        expected, actual = function(x, n), evaluate_all(gm, (x, n))
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_only_the_asked_coordinates_are_computed():
    n = 1 << 20  # the whole mask would be a terabyte

    def function(lengths):
        rows, cols = ids(n).view(1, n, 1), ids(n).view(1, 1, n)
        return torch.logical_and(rows >= cols, cols < lengths.view(-1, 1, 1))

    gm = capture(function, torch.tensor([5, 6]), mode="fake")
    (mask,) = gm.graph.output_node().all_input_nodes
    (lengths,) = gm.graph.find_nodes(op="placeholder")
    space = IndexSpace({}, {lengths: lambda coords: torch.tensor([5, n])[coords]}, rank=3)
    at = (torch.tensor([0, 1]), torch.tensor([n - 1, n - 1]), torch.tensor([n - 2, n - 2]))
    assert space.value(mask, at).tolist() == [False, True]


def test_unknown_ops_and_inputs_are_named_with_the_line():
    for function, culprit in [
        (lambda x: x.sort().values, "getitem"),
        (lambda x: torch.rand(3) < x, "rand"),
        (lambda x: x.index_put((ids(3) // 2,), x) + 1, "writes twice"),
    ]:
        gm = capture(function, torch.tensor([1.0, 2.0, 3.0]))
        with pytest.raises(NotUnderstood, match=culprit):
            evaluate_all(gm, (torch.tensor([1.0, 2.0, 3.0]),))
    gm = capture(lambda x: x + 1, torch.ones(3))
    (result,) = gm.graph.output_node().all_input_nodes
    with pytest.raises(NotUnderstood, match="input x_1"):
        IndexSpace(symbol_hints(gm.graph), {}, rank=1).value(result, (torch.arange(3),))


def test_a_tensor_that_is_written_in_place_is_refused():
    def function(x):
        mask = torch.ones(3, 3)
        mask[:, :1] = 0
        return mask * x

    gm = capture(function, torch.ones(3))
    with pytest.raises(NotUnderstood, match="writes in place"):
        evaluate_all(gm, (torch.ones(3),))
