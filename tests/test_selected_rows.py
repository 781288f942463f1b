"""Chosen rows of whatever works row by row are those rows of the whole; what mixes rows is refused, by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import tests.fbgemm_stand_ins  # noqa: F401
from hstu_compile.passes.graph import is_floating, same, shape, value
from hstu_compile.passes.jagged import read_offsets_at_their_source
from hstu_compile.passes.row_wise import MixesRows
from hstu_compile.passes.selected_rows import SelectedRows
from tests.tracing import traced

aten = torch.ops.aten
T, WIDTH = 11, 6
OFFSETS = torch.tensor([0, 4, 4, 9, 11])
ROWS = torch.tensor([2, 3, 4, 8, 10])
# Rows computed apart are rounded otherwise: of numbers about 1, by less than assert_close allows.
WEIGHT, TABLE = torch.randn(WIDTH, WIDTH) * WIDTH**-0.5, torch.randn(20, WIDTH)


def selected(function: Callable[..., Tensor]) -> tuple[fx.GraphModule, SelectedRows, list[bool]]:
    """The graph of function(weight, table, x, ids, offsets) where relu is computed at the rows of a further input."""
    args = [torch.zeros(T, WIDTH), torch.zeros(T, dtype=torch.int64), OFFSETS]
    gm = traced(lambda w, t, *others: function(*others, w, t), args, fixed=[WEIGHT, TABLE])
    read_offsets_at_their_source(gm.graph)
    last = list(gm.graph.find_nodes(op="placeholder"))[-1]
    with gm.graph.inserting_after(last):
        rows = gm.graph.placeholder("rows")
    mode = value(last).fake_mode
    with mode:
        rows.meta["val"] = torch.empty(mode.shape_env.create_unbacked_symint(), dtype=torch.int64)

    def relu(selection: SelectedRows, node: fx.Node) -> fx.Node:
        return selection.call(node, aten.relu.default, (selection.at(node.all_input_nodes[0], (selection.rows,)),))

    anchors = gm.graph.find_nodes(op="call_function", target=aten.relu.default)
    selection = SelectedRows(gm, rows, dict.fromkeys(anchors, relu))
    chosen = selection.run()
    gm.graph.lint()
    gm.recompile()
    return gm, selection, chosen


def sequence_of(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.bucketize(torch.arange(x.shape[0]), offsets[1:], right=True)


def heads(x: Tensor) -> Tensor:
    return x.view(x.shape[0], 2, 3)


def pad(x: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.fbgemm.jagged_to_padded_dense(x, [offsets], [5], 0.0)


def unpad(x: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    return torch.ops.fbgemm.dense_to_jagged(x, [offsets], like.shape[0])[0]


ROW_WISE: dict[str, Callable[..., Tensor]] = {
    "pointwise": lambda x, i, o, w, t: (x * 2 + x.sin()).clamp(min=-1),
    "row vectors": lambda x, i, o, w, t: torch.where(i.unsqueeze(-1) > 2, x, w[0]) + w[:1],
    "cast": lambda x, i, o, w, t: x.double().float() + i.to(x.dtype).unsqueeze(1),
    "linear": lambda x, i, o, w, t: F.linear(x, w, w[0]) @ w,
    "addmm": lambda x, i, o, w, t: torch.addmm(x, x, w) + torch.addmm(w[0], x, w),
    "einsum": lambda x, i, o, w, t: torch.einsum("thd,dk->tkh", heads(x), w[:3, :3]).flatten(1),
    "bmm": lambda x, i, o, w, t: torch.bmm(heads(x), heads(x).transpose(1, 2) @ heads(x)).flatten(1),
    "layer norm": lambda x, i, o, w, t: F.layer_norm(x, [WIDTH], w[0]) + F.rms_norm(x, [WIDTH]),
    "group norm": lambda x, i, o, w, t: F.group_norm(heads(x), 2).flatten(1),
    "views": lambda x, i, o, w, t: heads(x).transpose(1, 2).unsqueeze(2).squeeze(2).reshape(-1, WIDTH),
    "permute": lambda x, i, o, w, t: heads(x).permute(0, 2, 1).unflatten(1, (3, 1)).flatten(1),
    "expand": lambda x, i, o, w, t: x.unsqueeze(1).expand(-1, 2, -1).sum(1),
    "split": lambda x, i, o, w, t: torch.cat([*x.split([4, 2], dim=1)[::-1]], -1) + torch.cat(x.chunk(2, 1), dim=1),
    "unbind": lambda x, i, o, w, t: torch.stack(heads(x).unbind(1), dim=-1).flatten(1),
    "slices": lambda x, i, o, w, t: torch.cat([x[:, 2:], x[:, :2]], dim=1) + x[:, 1:2] + x.select(1, 0).unsqueeze(1),
    "softmax": lambda x, i, o, w, t: x.softmax(-1) * x.mean(1, keepdim=True) + x.amax(dim=1, keepdim=True),
    "fill": lambda x, i, o, w, t: torch.zeros_like(x) + x + torch.full_like(x, 3.0),
    "embedding": lambda x, i, o, w, t: F.embedding(i, t) + t[i] + t.index_select(0, i) + x,
    "position": lambda x, i, o, w, t: x + t[torch.arange(x.shape[0]) - o[sequence_of(x, o)]],
    "of the sequence": lambda x, i, o, w, t: x + (o.diff() * 1.0)[sequence_of(x, o)].unsqueeze(-1),
    "dense and back": lambda x, i, o, w, t: unpad(F.linear(pad(x, o), w) + t[:5], o, x),
}


@pytest.mark.parametrize("name", ROW_WISE)
def test_row_wise(name: str) -> None:
    """Before and after the call that is computed at some rows only."""

    def function(x: Tensor, ids: Tensor, offsets: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return ROW_WISE[name](torch.relu(ROW_WISE[name](x, ids, offsets, w, t)), ids, offsets, w, t)

    x, ids = torch.randn(T, WIDTH), torch.arange(T) % 7
    gm, selection, chosen = selected(function)
    assert chosen == [True]
    torch.testing.assert_close(gm(WEIGHT, TABLE, x, ids, OFFSETS, ROWS), function(x, ids, OFFSETS, WEIGHT, TABLE)[ROWS])
    tokens = shape(list(gm.graph.find_nodes(op="placeholder"))[2])[0]
    whole = [n for n in gm.graph.nodes if n.op == "call_function" and is_floating(n) and shape(n)]
    assert not [n for n in whole if any(not isinstance(size, int) and same(size, tokens) for size in shape(n))]
    assert not selection.reads and not selection.computed_whole


READS: dict[str, Callable[..., Tensor]] = {
    "last": lambda y, i, o, w, t: y[o[1:] - 1],
    "index_select": lambda y, i, o, w, t: y.index_select(0, o[1:] - 1).sum(0),
    "grid": lambda y, i, o, w, t: F.linear(y, w)[(o[1:] - 1).unsqueeze(1) - torch.arange(1)].mean(1),
    "padded": lambda y, i, o, w, t: pad(y, o)[torch.tensor([0, 2, 3]), torch.tensor([3, 4, 1])],
    "padding": lambda y, i, o, w, t: pad(y, o)[torch.tensor([0, 1, 3]), torch.tensor([4, 0, 2])],
}


@pytest.mark.parametrize("name", READS)
def test_reads_by_an_index(name: str) -> None:
    def function(x: Tensor, ids: Tensor, offsets: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return READS[name](torch.relu(F.linear(x, w)) * 2, ids, offsets, w, t)

    x, ids = torch.randn(T, WIDTH), torch.arange(T)
    gm, selection, chosen = selected(function)
    assert chosen == [False] and selection.reads
    torch.testing.assert_close(gm(WEIGHT, TABLE, x, ids, OFFSETS, ROWS), function(x, ids, OFFSETS, WEIGHT, TABLE))


MIXED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "mean": (lambda x, i, o, w, t: x - x.mean(0), "mean needs rows of all tokens"),
    "sum of all": (lambda x, i, o, w, t: x / x.sum(), "sum needs rows of all tokens"),
    "cumsum": (lambda x, i, o, w, t: x.cumsum(0), "cumsum needs .*: it works along dimension 0"),
    "softmax": (lambda x, i, o, w, t: x.softmax(0), "softmax needs .*: it works along dimension 0"),
    "product of rows": (lambda x, i, o, w, t: x @ x.T @ x, "needs rows of all tokens"),
    "transposed": (lambda x, i, o, w, t: x.T.contiguous().softmax(1).T + x, "needs rows of all tokens"),
    "other rows": (lambda x, i, o, w, t: x + x[i], "index needs rows of all tokens"),
    "the row before": (lambda x, i, o, w, t: torch.cat([x[:1], x[:-1]]), "cat needs rows of all tokens"),
    "slice": (lambda x, i, o, w, t: x[1:], "cuts rows|needs rows"),
    "flattened": (lambda x, i, o, w, t: x.view(-1, 2).softmax(0), "needs rows of all tokens|reshapes rows"),
    "flip": (lambda x, i, o, w, t: x.flip(0), "flip needs .*: it is not known to work row by row"),
    "batch norm": (
        lambda x, i, o, w, t: F.batch_norm(x, None, None, training=True),
        "batch_norm needs .*: it is not known",
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_rows(name: str) -> None:
    mix, message = MIXED[name]
    with pytest.raises(MixesRows, match=message) as error:
        selected(lambda x, *others: mix(torch.relu(x), *others))
    assert "test_selected_rows.py" in str(error.value) or "unknown source" in str(error.value)


def test_no_slice_is_searched() -> None:
    """Inductor reads a slice from where its memory begins: see searched_lists."""

    def function(x: Tensor, ids: Tensor, offsets: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return ROW_WISE["dense and back"](x, ids, offsets, w, t).relu()

    gm, _, _ = selected(function)
    searched = [n.args[1] for n in gm.graph.find_nodes(op="call_function", target=aten.bucketize.Tensor)]
    assert searched and all(node.op == "placeholder" for node in searched)


def test_rows_before_may_be_mixed() -> None:
    """What no chosen row goes into is whole: picking rows of it is exact, and said if it costs."""

    def function(x: Tensor, ids: Tensor, offsets: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return torch.relu(x.cumsum(0) - x.mean(0))

    x, ids = torch.randn(T, WIDTH), torch.arange(T)
    gm, selection, _ = selected(function)
    torch.testing.assert_close(gm(WEIGHT, TABLE, x, ids, OFFSETS, ROWS), function(x, ids, OFFSETS, WEIGHT, TABLE)[ROWS])
    assert [node.target for node in selection.computed_whole] == [aten.cumsum.default]
