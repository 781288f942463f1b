"""Which calls compute each row from the same row of their operands, and the same call on chosen rows.

`index` says which rows of a call's result are wanted: a coordinate for each of its leading dimensions, tensors [R] or 0
for a dimension of size 1. A handler returns these rows, [R, *trailing dimensions], from rows of its operands
(`selection.at`) and whole ones; it raises MixesRows where rows of the result need more than that.
"""

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from hstu_compile.passes.graph import Size, argument, aten, is_tensor, number, same, shape, value
from hstu_compile.passes.index_space import arguments, is_pointwise, op_name
from hstu_compile.passes.jagged import padded_by_call, unpadded_by_call
from hstu_compile.passes.report import source_line

if TYPE_CHECKING:
    from hstu_compile.passes.selection import Selection

Coordinate = fx.Node | int
Index = tuple[Coordinate, ...]
Handler = Callable[["Selection", fx.Node, dict[str, Any], Index], fx.Node]


class MixesRows(Exception):
    """A call needs other rows than those that are computed; the message names it, the user's line and why."""

    def __init__(self, node: fx.Node, reason: str, has_rows: bool = False) -> None:
        self.node, self.reason = node, reason
        self.has_rows = has_rows  # the node itself is by rows: its reader is at fault
        super().__init__(f"{_words(node)} {reason}, at {source_line(node)}")


def _words(node: fx.Node) -> str:
    return op_name(node) or getattr(node.target, "__name__", str(node.target))


def handler(node: fx.Node) -> Handler | None:
    if node.op != "call_function":
        return None
    if number(node) is not None and is_tensor(node):
        return _filled
    if padded_by_call(node) is not None:
        return _padded
    if node.target is operator.getitem:
        return _part
    if is_pointwise(node):
        return _pointwise
    return HANDLERS.get(op_name(node))


def push(node: fx.Node, index: Index, new: Sequence[Size], old: Sequence[Size]) -> Index:
    """The coordinates of a reshape's operand (of shape `old`) for those of its result (`new`).

    Raises:
        MixesRows: a leading dimension is split from, or merged with, what is no leading dimension.
    """
    result: list[Coordinate] = []
    i = 0
    for j, coordinate in enumerate(index):
        while i < len(old) and same(old[i], 1) and not same(new[j], 1):
            result.append(0)
            i += 1
        if i < len(old) and same(old[i], new[j]):
            result.append(coordinate)
            i += 1
        elif not same(new[j], 1):
            raise MixesRows(node, f"reshapes rows, from {tuple(old)} to {tuple(new)}")
    return tuple(result)


def trailing(node: fx.Node, dim: int, rank: int, index: Index) -> int:
    """A dimension counted from the end, where no leading one is touched."""
    dim %= rank
    if dim < len(index):
        raise MixesRows(node, f"works along dimension {dim}, that of the rows")
    return dim - rank


def aligned(selection: "Selection", node: fx.Node, x: Any, result: Sequence[Size], index: Index) -> Any:
    """The rows of an operand that broadcasts to `result`."""
    if not is_tensor(x):
        return x
    sizes, found = shape(x), []
    missing = len(result) - len(sizes)
    for j in range(missing, len(index)):
        if same(sizes[j - missing], result[j]):
            found.append(index[j])
        elif same(sizes[j - missing], 1):
            found.append(0)
        else:
            raise MixesRows(node, f"broadcasts {tuple(sizes)} to {tuple(result)}")
    return selection.at(x, tuple(found)) if found else selection.whole(x)


# Handlers


def _pointwise(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    def operand(x: Any) -> Any:
        return aligned(selection, node, x, shape(node), index)

    args, kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), operand)
    return selection.call(node, node.target, args, kwargs)


def _cast(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    x = selection.at(a["self"], index)
    if value(node).device != value(x).device:
        raise MixesRows(node, "moves to another device")
    return x if value(x).dtype == value(node).dtype else selection.call(node, aten.to.dtype, (x, value(node).dtype))


def _copy(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    return selection.at(a["self"], index)


def _detach(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    return selection.call(node, aten.detach.default, (selection.at(a["self"], index),))


def _filled(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    kwargs = {"dtype": value(node).dtype, "device": value(node).device}
    return selection.call(node, aten.full.default, (selection.sizes(node, index), number(node)), kwargs)


def _reshape(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    new, old, pushed = shape(node), shape(a["self"]), index
    if len(index) == 1 and len(old) > 1 and not same(new[0], old[0]) and same(new[0], old[0] * old[1]):
        # [B, N, ..] -> [B * N, ..]
        inner = selection.sizes(a["self"], (0,))[0]
        outer = selection.call(node, aten.div.Scalar_mode, (index[0], inner), {"rounding_mode": "floor"})
        pushed = (outer, selection.call(node, aten.remainder.Scalar, (index[0], inner)))
        new = (*old[:2], *new[1:])
    x = selection.at(a["self"], push(node, pushed, new, old))
    return selection.call(node, aten.reshape.default, (x, selection.sizes(node, index)))


def _expand(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    x = aligned(selection, node, a["self"], shape(node), index)
    return selection.call(node, aten.expand.default, (x, selection.sizes(node, index)))


def _permute(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    # The op itself, on a tensor whose sizes are all different, tells the permutation.
    k, rank = len(index), len(shape(node))
    assert callable(node.target)
    order = list(node.target(torch.empty(tuple(range(rank)), device="meta"), *node.args[1:], **node.kwargs).shape)
    if set(order[:k]) != set(range(k)):
        raise MixesRows(node, f"moves dimensions {order[:k]} to the front")
    x = selection.at(a["self"], tuple(index[order.index(j)] for j in range(k)))
    return selection.call(node, aten.permute.default, (x, [0, *(origin - k + 1 for origin in order[k:])]))


def _slice(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    rank = len(shape(a["self"]))
    if a["dim"] % rank < len(index):
        start, step = a["start"], a.get("step", 1)
        if start not in (None, 0) or step != 1:
            raise MixesRows(node, f"cuts rows from {start} in steps of {step}")
        return selection.at(a["self"], index)
    return _along(selection, node, a, index)


def _along(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    """Any call along trailing dimensions."""
    rank = len(shape(a["self"]))
    dim = a.get("dim")
    dims = dim if isinstance(dim, (list, tuple)) else [dim]
    if dim is None or not dims:
        raise MixesRows(node, "works along all dimensions, also that of the rows")
    moved = [trailing(node, int(d), rank, index) for d in dims if d is not None]
    named = {**a, "self": selection.at(a["self"], index), "dim": moved if dim is dims else moved[0]}
    return selection.call_named(node, named)


def _joined(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    dim = trailing(node, a["dim"], len(shape(node)), index)
    tensors = [selection.at(x, index) for x in a["tensors"]]
    return selection.call_named(node, {**a, "tensors": tensors, "dim": dim})


def _on_input(fits: Callable[[dict[str, Any], int, int], bool], else_: str) -> Handler:
    """A call on the trailing dimensions of `input`, with whole weights; `fits(arguments, rank, rows' dimensions)`."""

    def handle(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
        if not fits(a, len(shape(a["input"])), len(index)):
            raise MixesRows(node, else_)
        whole = selection.whole_operands(a, "input")
        return selection.call_named(node, {**whole, "input": selection.at(a["input"], index)})

    return handle


def _matmul(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    other = "mat2" if "mat2" in a else "other"
    ranks = len(shape(a["self"])), len(shape(a[other]))
    if ranks[0] <= len(index):
        raise MixesRows(node, "sums over rows")
    x = selection.at(a["self"], index)
    if ranks[1] <= 2:
        return selection.call(node, aten.matmul.default, (x, selection.whole(a[other])))
    if ranks[0] != ranks[1] or len(index) > ranks[0] - 2:
        raise MixesRows(node, "is a product of batches")
    batches = [*shape(node)[:-2], *shape(a[other])[-2:]]
    y = aligned(selection, node, a[other], batches, index)
    return selection.call(node, aten.matmul.default, (x, y))


def _addmm(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    if len(index) != 1:
        raise MixesRows(node, "sums over rows")
    named = {"self": aligned(selection, node, a["self"], shape(node), index), "mat1": selection.at(a["mat1"], index)}
    return selection.call_named(node, {**a, **named, "mat2": selection.whole(a["mat2"])})


def _bmm(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    if len(index) != 1:
        raise MixesRows(node, "sums over rows")
    return selection.call_named(node, {name: selection.at(x, index) for name, x in a.items()})


def _einsum(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    inputs, _, output = a["equation"].replace(" ", "").partition("->")
    terms, rows = inputs.split(","), output[: len(index)]
    if "." in inputs or len(rows) < len(index):
        raise MixesRows(node, f"has the equation {a['equation']}")
    tensors, names = [], []
    for term, x in zip(terms, a["tensors"], strict=True):
        if set(term) & set(rows) and not term.startswith(rows):
            raise MixesRows(node, f"has the equation {a['equation']}")
        tensors.append(selection.at(x, index) if term.startswith(rows) else selection.whole(x))
        names.append(rows[0] + term[len(rows) :] if term.startswith(rows) else term)
    equation = f"{','.join(names)}->{rows[0]}{output[len(rows) :]}"
    return selection.call_named(node, {**a, "equation": equation, "tensors": tensors})


def _embedding(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    indices = aligned(selection, node, a["indices"], shape(node)[: len(shape(a["indices"]))], index)
    return selection.call_named(node, {**a, "weight": selection.whole(a["weight"]), "indices": indices})


def _looked_up(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    """x[index of rows]"""
    rows = a["indices"] if "indices" in a else [a["index"]]
    leading = all(isinstance(i, fx.Node) and value(i).dtype in (torch.int64, torch.int32) for i in rows)
    rank = max((len(shape(i)) for i in rows), default=0) if leading else 0
    if not leading or len(index) > rank or ("dim" in a and a["dim"] != 0):
        raise MixesRows(node, "looks up rows by an index along another dimension, or by a mask")
    picked = [aligned(selection, node, i, shape(node)[:rank], index) for i in rows]
    return selection.call(node, aten.index.Tensor, (selection.whole(a["self"]), picked))


def _bucketize(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    bounds = "boundaries" if "boundaries" in a else "sorted_sequence"
    if not is_tensor(a["self"]) or len(shape(a[bounds])) != 1:
        raise MixesRows(node, "searches a number, or in more than one sequence")
    named = {**a, bounds: selection.whole(a[bounds]), "self": selection.at(a["self"], index)}
    return selection.call_named(node, named)


def _arange(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    if (a.get("start", 0), a.get("step", 1)) != (0, 1) or value(node).dtype != torch.int64:
        raise MixesRows(node, "does not count from 0 in steps of 1")
    (row,) = index
    assert isinstance(row, fx.Node)
    return row


def _gate(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    if len(index) != 1 or a["seed"] is not None:
        raise MixesRows(node, "drops elements at random")
    rows = {name: selection.at(a[name], index) for name in ("a", "u")}
    return selection.call_named(node, {**selection.whole_operands(a, "a", "u"), **rows})


def _padded(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    """jagged [T, ..] -> dense [B, N, ..]"""
    pad = padded_by_call(node)
    assert pad is not None
    if len(index) != 2:
        raise MixesRows(node, "makes dense rows of jagged ones")
    row = selection.row_of(pad.offsets, index)
    if row is not None:
        return selection.at(pad.values, (row,))
    if not isinstance(index[0], fx.Node) or not isinstance(index[1], fx.Node) or pad.padding is None:
        raise MixesRows(node, "makes dense rows of jagged ones")
    if same(shape(pad.values)[0], 0):
        raise MixesRows(node, "makes dense rows of no jagged ones")
    # Any cell: beyond the end of a sequence is padding.
    begin, end = (
        selection.call(node, aten.index.Tensor, (pad.offsets, [at]))
        for at in (index[0], selection.call(node, aten.add.Tensor, (index[0], 1)))
    )
    row = selection.call(node, aten.add.Tensor, (begin, index[1]))
    inside = selection.call(node, aten.lt.Tensor, (row, end))
    last = selection.call(node, aten.minimum.default, (row, selection.call(node, aten.sub.Tensor, (end, 1))))
    x = selection.at(pad.values, (selection.call(node, aten.clamp.default, (last, 0)),))
    inside = selection.call(node, aten.reshape.default, (inside, [-1, *[1] * (len(shape(x)) - 1)]))
    return selection.call(node, aten.where.ScalarOther, (inside, x, pad.padding))


def _part(selection: "Selection", node: fx.Node, a: dict[str, Any], index: Index) -> fx.Node:
    """One result of a call that has several."""
    source, which = node.args
    assert isinstance(source, fx.Node)
    found = unpadded_by_call(source)
    if found is not None and found.result is node:
        if len(index) != 1 or not isinstance(index[0], fx.Node):
            raise MixesRows(node, "makes jagged rows of dense ones")
        return selection.at(found.dense, selection.cell_of(found.offsets, index[0]))
    if op_name(source) not in PARTS:
        raise MixesRows(source, "is not known to work row by row")
    named = arguments(source)
    dim = trailing(source, named["dim"], len(shape(named["self"])), index)
    parts = selection.parts(source, index, {**named, "self": selection.at(named["self"], index), "dim": dim})
    return selection.call(node, operator.getitem, (parts, which))


_NORM = _on_input(lambda a, rank, rows: len(a["normalized_shape"]) + rows <= rank, "normalises over rows")

PARTS = {"split", "split_with_sizes", "chunk", "tensor_split", "unbind"}

HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(["to", "_to_copy", "type_as"], _cast),
    **dict.fromkeys(["clone", "alias", "contiguous", "lift_fresh_copy"], _copy),
    "detach": _detach,
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"], _reshape),
    **dict.fromkeys(["squeeze", "unsqueeze"], _reshape),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _expand),
    **dict.fromkeys(["permute", "transpose", "t", "mT", "movedim", "moveaxis", "swapaxes", "swapdims"], _permute),
    **dict.fromkeys(["slice", "narrow"], _slice),
    **dict.fromkeys(["select", "sum", "mean", "amax", "amin", "var", "std", "prod", "any", "all", "argmax"], _along),
    **dict.fromkeys(["softmax", "log_softmax", "logsumexp", "cumsum", "linalg_vector_norm", "norm"], _along),
    **dict.fromkeys(["cat", "concat", "concatenate", "stack"], _joined),
    **dict.fromkeys(["layer_norm", "rms_norm"], _NORM),
    "group_norm": _on_input(lambda a, rank, rows: rows == 1, "normalises over rows"),
    "linear": _on_input(lambda a, rank, rows: rows < rank, "sums over rows"),
    **dict.fromkeys(["mm", "matmul"], _matmul),
    "addmm": _addmm,
    "bmm": _bmm,
    "einsum": _einsum,
    "embedding": _embedding,
    **dict.fromkeys(["index", "index_select"], _looked_up),
    **dict.fromkeys(["bucketize", "searchsorted"], _bucketize),
    "arange": _arange,
    "norm_gate_dropout": _gate,
}


def is_lookup(node: fx.Node) -> bool:
    """x[rows]: reads rows of x in whatever order, and makes something else of them."""
    if op_name(node) == "index_select":
        return argument(node, 1, "dim") == 0
    indices = argument(node, 1, "indices") if op_name(node) == "index" else ()
    return bool(indices) and all(isinstance(i, fx.Node) and value(i).dtype == torch.int64 for i in indices)
