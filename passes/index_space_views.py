"""Ops that hold what their `self` holds, elsewhere: each maps coordinates of the result to coordinates of its `self`.

One handler an op (all its overloads), in the table `VIEWS` of `IndexSpace`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from hstu_compile.passes.index_space import IndexSpace

Coords = tuple[Tensor, ...]
Arguments = dict[str, Any]
ViewHandler = Callable[["IndexSpace", fx.Node, Arguments, Coords], Coords]

ZERO = torch.zeros((), dtype=torch.int64, device="cpu")


class NotUnderstood(Exception):
    """A node whose value can't be computed from its coordinates; the message names the op and the user's line."""


def axis_of(dim: int, ndim: int) -> int:
    return dim % ndim if ndim else 0


def replaced(coords: Coords, axis: int, value: Tensor) -> Coords:
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
    axis, index = axis_of(a["dim"], len(shape)), space.scalar(a["index"])
    picked = torch.tensor(index % shape[axis])
    return (*coords[:axis], picked, *coords[axis:])


def _slice(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(a["self"])
    axis = axis_of(a["dim"], len(shape))
    start = 0 if a["start"] is None else space.scalar(a["start"])
    start = min(max(start + shape[axis] if start < 0 else start, 0), shape[axis])
    step = space.scalar(a.get("step", 1))
    return replaced(coords, axis, coords[axis] * step + start if (start, step) != (0, 1) else coords[axis])


def _diagonal(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    ndim = len(coords) + 1
    first, second = axis_of(a["dim1"], ndim), axis_of(a["dim2"], ndim)
    rest = iter(coords[:-1])
    at = {first: coords[-1] + max(-a["offset"], 0), second: coords[-1] + max(a["offset"], 0)}
    return tuple(at[axis] if axis in at else next(rest) for axis in range(ndim))


def _flip(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(node)
    axes = {axis_of(dim, len(shape)) for dim in a["dims"]}
    return tuple(shape[k] - 1 - c if k in axes else c for k, c in enumerate(coords))


def _roll(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(node)
    for dim, shift in zip(a["dims"], a["shifts"], strict=True):
        axis = axis_of(dim, len(shape))
        coords = replaced(coords, axis, (coords[axis] - space.scalar(shift)) % shape[axis])
    return coords


def _repeat(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    shape = space.shape(a["self"])
    aligned = coords[len(coords) - len(shape) :]
    return tuple(ZERO if size == 1 else c % size for size, c in zip(shape, aligned, strict=True))


def _repeat_interleave(space: "IndexSpace", node: fx.Node, a: Arguments, coords: Coords) -> Coords:
    if a["dim"] is None and len(space.shape(a["self"])) != 1:
        raise ValueError("repeat_interleave of a flattened tensor")
    axis = axis_of(a["dim"] or 0, len(coords))
    return replaced(coords, axis, _repeated(space, a["repeats"], coords[axis]))


def _repeated(space: "IndexSpace", repeats: Any, at: Tensor) -> Tensor:
    """Which element stands at a place where each is repeated so many times: a number, or one an element."""
    if not isinstance(repeats, fx.Node) or isinstance(repeats.meta["val"], torch.SymInt):
        return at // space.scalar(repeats)
    return (beside(space.along(repeats, (0,), (ZERO,)).cumsum(0), at) <= at).sum(0)


def beside(values: Tensor, others: Tensor) -> Tensor:
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
