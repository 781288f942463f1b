"""What each ATen op does to coordinates: the table behind `IndexSpace`, one handler an op (all its overloads).

A view handler maps the coordinates of the result to coordinates of its `self`; a value handler computes the result at
the coordinates. Pointwise ops need no handler: torch's own op runs on the sampled values.
"""

import math
import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from hstu_compile.passes.index_space import IndexSpace

Coords = tuple[Tensor, ...]
Arguments = dict[str, Any]
ViewHandler = Callable[["IndexSpace", fx.Node, Arguments, Coords], Coords]
ValueHandler = Callable[["IndexSpace", fx.Node, Arguments, Coords], Tensor]

ZERO = torch.zeros((), dtype=torch.int64, device="cpu")


class NotUnderstood(Exception):
    """A node whose value can't be computed from its coordinates; the message names the op and the user's line."""


def _axis(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


def _replace(coords: Coords, axis: int, value: Tensor) -> Coords:
    return (*coords[:axis], value, *coords[axis + 1 :])


# Views


def reshape_coords(old: Sequence[int], new: Sequence[int], coords: Coords) -> Coords:
    """Coordinates in a tensor of shape `old` of the element at `coords` of its reshape to `new`.

    Dimensions are matched in the smallest groups of equal size, so that what is only moved keeps its own tensor.
    """
    result: list[Tensor] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            result.append(ZERO)
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            j += 1
            continue
        if i == len(old) or j == len(new):
            raise ValueError(f"cannot view {list(old)} as {list(new)}")
        i_end, j_end, inner, outer = i + 1, j + 1, old[i], new[j]
        while inner != outer:
            if inner < outer:
                inner, i_end = inner * old[i_end], i_end + 1
            else:
                outer, j_end = outer * new[j_end], j_end + 1
        if (i_end, j_end) == (i + 1, j + 1):
            result.append(coords[j])
        else:
            flat = coords[j]
            for k in range(j + 1, j_end):
                flat = flat * new[k] + coords[k]
            for k in range(i, i_end):
                stride = math.prod(old[k + 1 : i_end])
                result.append(flat // stride % old[k] if k > i else flat // stride)
        i, j = i_end, j_end
    return tuple(result)


def broadcast_coords(shape: Sequence[int], coords: Coords) -> Coords:
    """Coordinates in a tensor of `shape` that broadcasts, right-aligned, against the result at `coords`."""
    aligned = coords[len(coords) - len(shape) :]
    return tuple(ZERO if size == 1 else c for size, c in zip(shape, aligned, strict=True))


def _reshape(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    return reshape_coords(space.shape(a["self"]), space.shape(node), coords)


def _expand(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    return broadcast_coords(space.shape(a["self"]), coords)


def _same(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    return coords


def _permute(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    # The op itself, on a tensor whose sizes are all different, tells the permutation.
    ndim = len(coords)
    assert callable(node.target)
    moved = node.target(torch.empty(tuple(range(ndim)), device="meta"), *node.args[1:], **node.kwargs)
    result = list(coords)
    for position, origin in enumerate(moved.shape):
        result[origin] = coords[position]
    return tuple(result)


def _select(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(a["self"])
    axis, index = _axis(a["dim"], len(shape)), space.scalar(a["index"])
    picked = torch.tensor(index % shape[axis])
    return (*coords[:axis], picked, *coords[axis:])


def _slice(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(a["self"])
    axis = _axis(a["dim"], len(shape))
    start = 0 if a["start"] is None else space.scalar(a["start"])
    start = min(max(start + shape[axis] if start < 0 else start, 0), shape[axis])
    step = space.scalar(a.get("step", 1))
    return _replace(coords, axis, coords[axis] * step + start if (start, step) != (0, 1) else coords[axis])


def _diagonal(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    ndim = len(coords) + 1
    first, second = _axis(a["dim1"], ndim), _axis(a["dim2"], ndim)
    rest = iter(coords[:-1])
    at = {first: coords[-1] + max(-a["offset"], 0), second: coords[-1] + max(a["offset"], 0)}
    return tuple(at[axis] if axis in at else next(rest) for axis in range(ndim))


def _flip(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(node)
    axes = {_axis(dim, len(shape)) for dim in a["dims"]}
    return tuple(shape[k] - 1 - c if k in axes else c for k, c in enumerate(coords))


def _roll(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(node)
    for dim, shift in zip(a["dims"], a["shifts"], strict=True):
        axis = _axis(dim, len(shape))
        coords = _replace(coords, axis, (coords[axis] - space.scalar(shift)) % shape[axis])
    return coords


def _repeat(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(a["self"])
    aligned = coords[len(coords) - len(shape) :]
    return tuple(ZERO if size == 1 else c % size for size, c in zip(shape, aligned, strict=True))


def _repeat_interleave(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    if a["dim"] is None and len(space.shape(a["self"])) != 1:
        raise ValueError("repeat_interleave of a flattened tensor")
    axis = _axis(a["dim"] or 0, len(coords))
    return _replace(coords, axis, _repeated(space, a["repeats"], coords[axis]))


def _repeated(space: "IndexSpace", repeats: Any, at: Tensor) -> Tensor:
    """Which element stands at a place where each is repeated so many times: a number, or one an element."""
    if not isinstance(repeats, fx.Node) or isinstance(repeats.meta["val"], torch.SymInt):
        return at // space.scalar(repeats)
    return (_beside(space.along(repeats, (0,), (ZERO,)).cumsum(0), at) <= at).sum(0)


def _beside(values: Tensor, others: Tensor) -> Tensor:
    """`values`, a list in its first dimension, such that the others broadcast against each in turn."""
    missing = max(0, others.dim() + 1 - values.dim())
    return values.reshape(len(values), *[1] * missing, *values.shape[1:])


VIEWS: dict[str, ViewHandler] = {
    **dict.fromkeys(["view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"], _reshape),
    **dict.fromkeys(["squeeze", "unsqueeze", "ravel"], _reshape),
    **dict.fromkeys(["expand", "expand_as", "broadcast_to"], _expand),
    **dict.fromkeys(["permute", "transpose", "t", "mT", "numpy_T", "movedim", "moveaxis"], _permute),
    **dict.fromkeys(["swapaxes", "swapdims", "adjoint", "mH", "matrix_H"], _permute),
    **dict.fromkeys(["clone", "alias", "detach", "detach_", "contiguous", "lift_fresh", "lift_fresh_copy"], _same),
    **dict.fromkeys(["to", "_to_copy", "type_as"], _same),
    "select": _select,
    **dict.fromkeys(["slice", "narrow"], _slice),
    "diagonal": _diagonal,
    "flip": _flip,
    "roll": _roll,
    **dict.fromkeys(["repeat", "tile"], _repeat),
    "repeat_interleave": _repeat_interleave,
}


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
            result = torch.where(coords[axis] >= begin, space.value(part, _replace(coords, axis, at)), result)
        begin += size
    return result


def _cat(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    return _joined(space, a["tensors"], _axis(a["dim"], len(coords)), coords)


def _stack(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = _axis(a["dim"], len(coords))
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
    axis = _axis(a["dim"], len(coords))
    parts = [part for part in (a["prepend"], a["self"], a["append"]) if part is not None]
    after = _joined(space, parts, axis, _replace(coords, axis, coords[axis] + 1))
    return after - _joined(space, parts, axis, coords)


def _cumsum(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = _axis(a["dim"], len(coords))
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
        axes = tuple(sorted(_axis(dim, ndim) for dim in listed))
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
    axis = _axis(a["dim"], len(coords))
    picked = space.value(a["index"], broadcast_coords(space.shape(a["index"]), (coords[axis],))).long()
    return space.value(a["self"], _replace(coords, axis, picked))


def _gather(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Tensor:
    axis = _axis(a["dim"], len(coords))
    return space.value(a["self"], _replace(coords, axis, space.value(a["index"], coords)))


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
    known = _beside(space.along(ordered, (0,), (ZERO,)), sought)
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
    axis = _axis(a["dim"], len(coords))
    begin = sum(space.sizes(part.shape)[axis] for part in node.meta["val"][:which])
    return space.value(a["self"], _replace(coords, axis, coords[axis] + begin))


def _unbind(space: "IndexSpace", node: fx.Node, a: Arguments, which: int, coords: Coords) -> Tensor:
    axis = _axis(a["dim"], len(coords) + 1)
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
