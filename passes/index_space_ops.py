"""Ops that compute: each gives the values of its result at coordinates, of those of its operands.

One handler an op (all its overloads), in the tables `VALUES` and `PARTS` of `IndexSpace`. Pointwise ops need none:
torch's own op runs on the sampled values.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from hstu_compile.passes.index_space_views import (
    ZERO,
    Arguments,
    Coords,
    axis_of,
    beside,
    broadcast_coords,
    replaced,
)

if TYPE_CHECKING:
    from hstu_compile.passes.index_space import IndexSpace

ValueHandler = Callable[["IndexSpace", fx.Node, Arguments, Coords], Tensor]

# Tensors made from nothing


def _filled(number: float) -> ValueHandler:
    return lambda space, node, a, coords: torch.tensor(number)


def _full(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    return torch.tensor(space.scalar(a["fill_value"] if "fill_value" in a else a["s"]))


def _arange(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    start, step = space.scalar(a.get("start", 0)), space.scalar(a.get("step", 1))
    at = coords[0] if isinstance(start, int) and isinstance(step, int) else coords[0].double()
    return at * step + start if (start, step) != (0, 1) else at


def _eye(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    return coords[0] == coords[1]


# Tensors made from others


def _triangle(keep: Callable[[Tensor, Tensor, int], Tensor]) -> ValueHandler:
    def handler(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
        value = space.value(a["self"], coords)
        return torch.where(keep(coords[-2], coords[-1], space.scalar(a["diagonal"])), value, torch.zeros_like(value))

    return handler


def _joined(space: "IndexSpace", parts: Sequence[fx.Node], axis: int, coords: Coords) -> Tensor:
    """The value at `coords` of the parts put one after the other along `axis`."""
    result, begin = torch.zeros(()), 0
    for part in parts:
        size = space.shape(part)[axis]
        if size:
            at = (coords[axis] - begin).clamp(0, size - 1)
            result = torch.where(coords[axis] >= begin, space.value(part, replaced(coords, axis, at)), result)
        begin += size
    return result


def _cat(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    return _joined(space, a["tensors"], axis_of(a["dim"], len(coords)), coords)


def _stack(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = axis_of(a["dim"], len(coords))
    rest, result = (*coords[:axis], *coords[axis + 1 :]), torch.zeros(())
    for index, part in enumerate(a["tensors"]):
        result = torch.where(coords[axis] >= index, space.value(part, rest), result)
    return result


def _pad(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    if a.get("mode", "constant") != "constant":
        raise ValueError(f"padding mode {a['mode']}")
    shape, inside, at = space.shape(a["self"]), torch.tensor(True), list(coords)
    for k, left in enumerate(a["pad"][::2]):
        axis = len(shape) - 1 - k
        moved = coords[axis] - space.scalar(left)
        inside = inside & (moved >= 0) & (moved < shape[axis])
        at[axis] = moved.clamp(0, max(shape[axis] - 1, 0))
    if 0 in shape:
        return torch.tensor(space.scalar(a["value"] or 0))
    value = space.value(a["self"], tuple(at))
    return torch.where(inside, value, torch.tensor(space.scalar(a["value"] or 0), dtype=value.dtype))


def _diff(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    if a["n"] != 1:
        raise ValueError("a difference of higher order")
    axis = axis_of(a["dim"], len(coords))
    parts = [part for part in (a["prepend"], a["self"], a["append"]) if part is not None]
    after = _joined(space, parts, axis, replaced(coords, axis, coords[axis] + 1))
    return after - _joined(space, parts, axis, coords)


def _cumsum(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = axis_of(a["dim"], len(coords))
    return _pick(space.along(a["self"], (axis,), coords).cumsum(0), coords[axis])


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """`values` at `index` of its first dimension, the index broadcasting against the other dimensions."""
    shape = torch.broadcast_shapes(values.shape[1:], index.shape)
    values = values.reshape(len(values), *[1] * (len(shape) - values.dim() + 1), *values.shape[1:])
    return values.expand(-1, *shape).gather(0, index.expand(shape).unsqueeze(0))[0]


def _reduction(reduce: Callable[[Tensor, Any], Tensor]) -> ValueHandler:
    def handler(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
        ndim, dims = len(space.shape(a["self"])), a.get("dim")
        listed = [dims] if isinstance(dims, int) else dims or range(ndim)
        axes = tuple(sorted(axis_of(dim, ndim) for dim in listed))
        kept = iter(coords)
        if a.get("keepdim", False):
            at = coords
        else:
            at = tuple(ZERO if axis in axes else next(kept) for axis in range(ndim))
        return reduce(space.along(a["self"], axes, at), tuple(range(len(axes))))

    return handler


def _index(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    shape, indices = space.shape(a["self"]), a["indices"]
    at = [k for k, index in enumerate(indices) if index is not None]
    if any(indices[k].meta["val"].dtype in (torch.bool, torch.uint8) for k in at):
        raise ValueError("an index by a bool tensor")
    adjacent = at == list(range(at[0], at[-1] + 1))
    begin = at[0] if adjacent else 0
    ndim = max(len(space.shape(indices[k])) for k in at)
    inner, rest = coords[begin : begin + ndim], iter((*coords[:begin], *coords[begin + ndim :]))
    result = []
    for k, size in enumerate(shape):
        if k in at:
            picked = space.value(indices[k], broadcast_coords(space.shape(indices[k]), inner)).long()
            result.append(torch.where(picked < 0, picked + size, picked))
        else:
            result.append(next(rest))
    return space.value(a["self"], tuple(result))


def _index_select(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = axis_of(a["dim"], len(coords))
    picked = space.value(a["index"], broadcast_coords(space.shape(a["index"]), (coords[axis],))).long()
    return space.value(a["self"], replaced(coords, axis, picked))


def _gather(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = axis_of(a["dim"], len(coords))
    return space.value(a["self"], replaced(coords, axis, space.value(a["index"], coords)))


def _index_put(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    indices, count = a["indices"], len(a["indices"])
    shapes = [space.shape(index) for index in indices if index is not None]
    if len(shapes) != count or a["accumulate"] or len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError("it writes elsewhere than at places of its first dimensions")
    written, sizes = space.new_axis(shapes[0][0], (ZERO,)), space.shape(a["self"])[:count]
    places, wanted, inside = written * 0, ZERO, torch.tensor(True)
    for index, length, coord in zip(indices, sizes, coords, strict=False):
        at = space.value(index, (written,))
        inside = inside & (at >= -length) & (at < length)
        places, wanted = places * length + at % length, wanted * length + coord
    places = torch.where(inside, places, math.prod(sizes))
    table = torch.zeros((math.prod(sizes) + 1, *places.shape[1:]), dtype=torch.int64)
    if (table.scatter_add(0, places, torch.ones_like(places))[:-1] > 1).any():
        raise ValueError("it writes twice to a place")
    place = _pick((table - 1).scatter(0, places, written.expand(places.shape)), wanted)
    moved = broadcast_coords(space.shape(a["values"]), (place.clamp(min=0), *coords[count:]))
    return torch.where(place >= 0, space.value(a["values"], moved), space.value(a["self"], coords))


def _searchsorted(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    ordered = a["sorted_sequence"] if "sorted_sequence" in a else a["boundaries"]
    if a.get("sorter") is not None or len(space.shape(ordered)) != 1:
        raise ValueError("a search in more than one sequence")
    wanted, given = a["self"], a.get("side")
    sought = space.value(wanted, coords) if isinstance(wanted, fx.Node) else torch.tensor(wanted)
    known = beside(space.along(ordered, (0,), (ZERO,)), sought)
    return (known <= sought if a["right"] or given == "right" else known < sought).sum(0)


def _embedding(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    return space.value(a["weight"], (space.value(a["indices"], coords[:-1]).long(), coords[-1]))


def _contract(space: "IndexSpace", operands: Sequence[fx.Node], equation: str, coords: Coords) -> Tensor:
    """An einsum with at most one summed index."""
    inputs, output = equation.replace(" ", "").split("->")
    at = dict(zip(output, coords, strict=True))
    summed = sorted(set(inputs) - set(output) - {","})
    if len(summed) > 1 or "." in equation:
        raise ValueError(f"einsum {equation}")
    terms = inputs.split(",")
    if summed:
        (size,) = {
            space.shape(node)[names.index(summed[0])]
            for names, node in zip(terms, operands, strict=True)
            if summed[0] in names
        }
        at[summed[0]] = space.new_axis(size, coords)
    product = torch.ones((), dtype=torch.int64)
    for names, node in zip(terms, operands, strict=True):
        product = product * space.value(node, broadcast_coords(space.shape(node), tuple(at[c] for c in names)))
    if not summed:
        return product
    axis = at[summed[0]]
    return product.expand(torch.broadcast_shapes(product.shape, axis.shape)).sum(0)


def _einsum(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    equation = a["equation"]
    if "->" not in equation:
        letters = equation.replace(",", "").replace(" ", "")
        equation += "->" + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return _contract(space, a["tensors"], equation, coords)


def _matmul(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    left, right = a["self"], a["mat2"] if "mat2" in a else a["other"]
    ranks = len(space.shape(left)), len(space.shape(right))
    if min(ranks) < 2:
        raise ValueError("a product with a vector")
    batch = string.ascii_lowercase[: len(coords) - 2]
    names = (batch[len(batch) - ranks[0] + 2 :] + "xz", batch[len(batch) - ranks[1] + 2 :] + "zy")
    return _contract(space, (left, right), f"{names[0]},{names[1]}->{batch}xy", coords)


def _outer(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    return _contract(space, (a["self"], a["vec2"]), "x,y->xy", coords)


def _complete_cumsum(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    (lengths,) = (value for value in a.values() if isinstance(value, fx.Node))
    sums = space.along(lengths, (0,), (ZERO,)).cumsum(0)
    return _pick(torch.cat([torch.zeros_like(sums[:1]), sums]), coords[0])


def _padded_dense(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    (offsets,) = a["offsets"]
    begin, end = space.value(offsets, (coords[0],)), space.value(offsets, (coords[0] + 1,))
    inside = begin + coords[1] < end
    value = space.value(a["values"], (torch.where(inside, begin + coords[1], 0), *coords[2:]))
    return torch.where(inside, value, torch.tensor(a["padding_value"], dtype=value.dtype))


VALUES: dict[str, ValueHandler] = {
    **dict.fromkeys(["zeros", "zeros_like", "new_zeros"], _filled(0)),
    **dict.fromkeys(["ones", "ones_like", "new_ones"], _filled(1)),
    **dict.fromkeys(["full", "full_like", "new_full", "scalar_tensor"], _full),
    "arange": _arange,
    "eye": _eye,
    "tril": _triangle(lambda row, col, diagonal: col - row <= diagonal),
    "triu": _triangle(lambda row, col, diagonal: col - row >= diagonal),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    "stack": _stack,
    **dict.fromkeys(["pad", "constant_pad_nd"], _pad),
    "diff": _diff,
    "cumsum": _cumsum,
    "sum": _reduction(lambda values, dims: values.sum(dims)),
    "mean": _reduction(lambda values, dims: values.double().mean(dims)),
    "any": _reduction(lambda values, dims: (values != 0).sum(dims) > 0),
    "all": _reduction(lambda values, dims: (values == 0).sum(dims) == 0),
    **dict.fromkeys(["amax", "max"], _reduction(lambda values, dims: values.amax(dims))),
    **dict.fromkeys(["amin", "min"], _reduction(lambda values, dims: values.amin(dims))),
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "index_put": _index_put,
    **dict.fromkeys(["searchsorted", "bucketize"], _searchsorted),
    "embedding": _embedding,
    "einsum": _einsum,
    **dict.fromkeys(["matmul", "mm", "bmm"], _matmul),
    **dict.fromkeys(["outer", "ger"], _outer),
    "asynchronous_complete_cumsum": _complete_cumsum,
    **dict.fromkeys(["jagged_to_padded_dense", "jagged_to_padded_dense_forward"], _padded_dense),
}


# Ops with several results: the value of one of them


def _part(space: "IndexSpace", node: fx.Node, a: Arguments, which: int, coords: Coords) -> Tensor:
    axis = axis_of(a["dim"], len(coords))
    begin = sum(space.sizes(part.shape)[axis] for part in node.meta["val"][:which])
    return space.value(a["self"], replaced(coords, axis, coords[axis] + begin))


def _unbind(space: "IndexSpace", node: fx.Node, a: Arguments, which: int, coords: Coords) -> Tensor:
    axis = axis_of(a["dim"], len(coords) + 1)
    return space.value(a["self"], (*coords[:axis], torch.tensor(which), *coords[axis:]))


def _meshgrid(space: "IndexSpace", node: fx.Node, a: Arguments, which: int, coords: Coords) -> Tensor:
    swapped = {0: 1, 1: 0} if a.get("indexing", "ij") == "xy" else {}
    tensor = a["tensors"][which]
    return space.value(tensor, (coords[swapped.get(which, which)],) if space.shape(tensor) else ())


def _broadcast_tensors(space: "IndexSpace", node: fx.Node, a: Arguments, which: int, coords: Coords) -> Tensor:
    tensor = a["tensors"][which]
    return space.value(tensor, broadcast_coords(space.shape(tensor), coords))


def _extreme(reduce: str) -> Callable[["IndexSpace", fx.Node, Arguments, int, Coords], Tensor]:
    def handler(space: "IndexSpace", node: fx.Node, a: Arguments, which: int, coords: Coords) -> Tensor:
        if which != 0:
            raise ValueError("the position of an extreme value")
        return VALUES[reduce](space, node, a, coords)

    return handler


PARTS: dict[str, Callable[["IndexSpace", fx.Node, Arguments, int, Coords], Tensor]] = {
    **dict.fromkeys(["split", "split_with_sizes", "chunk", "tensor_split"], _part),
    "unbind": _unbind,
    "meshgrid": _meshgrid,
    "broadcast_tensors": _broadcast_tensors,
    "max": _extreme("amax"),
    "min": _extreme("amin"),
}

# Pointwise ops that lack torch.Tag.pointwise: composites that capture keeps whole.
UNTAGGED_POINTWISE = {
    *["__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "where", "floor_divide", "true_divide", "divide"],
    *["multiply", "subtract", "less", "less_equal", "greater", "greater_equal", "not_equal", "logical_not", "negative"],
    *["absolute", "clip", "square", "rsub", "logical_xor", "bitwise_not", "fill", "fix"],
}
