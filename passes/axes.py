"""Which axes of the computation each dimension of a tensor holds, followed through layout calls in both directions.

A tensor is written as `Dims`: per dimension the axes it is the row-major product of. [B, N, H * D] is
((b,), (n,), (h, d)); () is a dimension of size 1, where the axis is missing or broadcast. However a model transposes,
splits and folds, its tensors then say themselves which dimension is batch, head, row, column or feature.
"""

import operator
from dataclasses import dataclass, field

import torch
from torch import fx

from hstu_compile.passes.graph import Size, aten, insert_call, is_call, is_cast, same, shape

PERMUTES = {
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
}
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
EXPANDS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}
LAYOUT = PERMUTES | RESHAPES | EXPANDS


@dataclass(eq=False)
class Axis:
    """One axis; `sources` are tensor dimensions of its size, for when the size is needed as a value."""

    size: Size
    sources: list[tuple[fx.Node, int]] = field(default_factory=list)
    parent: "Axis | None" = None  # split from this one,
    sibling: "Axis | None" = None  # together with this one


Dims = tuple[tuple[Axis, ...], ...]


def flat(dims: Dims) -> list[Axis]:
    return [axis for group in dims for axis in group]


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where it is known to be a whole number."""
    if same(b, 0):
        return None
    q = a // b
    return q if same(q * b, a) else None


class Axes:
    """The axes of one region. An axis met later in a finer layout is split; `resolve` brings older Dims up to date."""

    def __init__(self) -> None:
        self._parts: dict[Axis, tuple[Axis, Axis]] = {}

    def resolve(self, dims: Dims) -> Dims:
        return tuple(tuple(part for axis in group for part in self._finest(axis)) for group in dims)

    def _finest(self, axis: Axis) -> list[Axis]:
        if axis not in self._parts:
            return [axis]
        return [part for half in self._parts[axis] for part in self._finest(half)]

    def locate(self, node: fx.Node, dims: Dims) -> None:
        """Remember where the sizes of these axes can be read."""
        for dim, group in enumerate(dims):
            if len(group) == 1:
                group[0].sources.append((node, dim))

    def before(self, node: fx.Node, dims: Dims) -> Dims | None:
        """The Dims of a layout call's input, given those of its result; None if they can't be told."""
        given = node.args[0]
        assert isinstance(given, fx.Node)
        if is_call(node, *PERMUTES):
            order = _permutation(node, len(dims))
            return tuple(dims[order.index(d)] for d in range(len(order)))
        if is_call(node, *EXPANDS):
            kept = dims[len(dims) - len(shape(given)) :]
            return tuple(() if same(size, 1) else group for size, group in zip(shape(given), kept, strict=True))
        if is_call(node, *RESHAPES):
            return self._regroup(dims, shape(given))
        return dims if is_cast(node) else None

    def after(self, node: fx.Node, dims: Dims) -> Dims | None:
        """The Dims of a layout call's result, given those of its input."""
        if is_call(node, *PERMUTES):
            return tuple(dims[d] for d in _permutation(node, len(dims)))
        if is_call(node, *RESHAPES):
            return self._regroup(dims, shape(node))
        return dims if is_cast(node) else None

    def _regroup(self, dims: Dims, sizes: tuple[Size, ...]) -> Dims | None:
        todo = [axis for axis in flat(self.resolve(dims)) if not same(axis.size, 1)][::-1]
        result = []
        for size in sizes:
            group = []
            while not same(size, 1):
                if not todo:
                    return None
                axis = todo.pop()
                rest = 1 if same(axis.size, size) else quotient(size, axis.size)
                if rest is None:
                    inner = quotient(axis.size, size)
                    if inner is None:
                        return None
                    axis, second = self._split(axis, size, inner)
                    todo.append(second)
                    rest = 1
                group.append(axis)
                size = rest
            result.append(tuple(group))
        return None if todo else tuple(result)

    def _split(self, axis: Axis, outer: Size, inner: Size) -> tuple[Axis, Axis]:
        first = Axis(outer, parent=axis)
        second = Axis(inner, parent=axis, sibling=first)
        first.sibling = second
        self._parts[axis] = first, second
        return first, second

    def size(self, axis: Axis, before: fx.Node) -> int | fx.Node:
        """The size as an argument of a call: an int, or a node inserted before `before`."""
        if isinstance(axis.size, int):
            return axis.size
        source = next((source for source in reversed(axis.sources) if source[0] < before), None)
        if source is not None:
            return insert_call(before.graph, before, aten.sym_size.int, source, like=before)
        assert axis.parent is not None and axis.sibling is not None
        assert isinstance(axis.sibling.size, int) or axis.sibling.sources, "a size that can't be read"
        sizes = self.size(axis.parent, before), self.size(axis.sibling, before)
        return insert_call(before.graph, before, operator.floordiv, sizes, like=before)

    def arrange(self, node: fx.Node, dims: Dims, wanted: Dims, before: fx.Node) -> fx.Node:
        """`node`, which holds `dims`, as a tensor that holds `wanted`; axes it lacks become dimensions of size 1.

        Splitting and permuting are views; only folding several axes into one dimension can copy. Every axis of `dims`
        that is larger than 1 must be wanted.
        """
        dims, wanted, graph = self.resolve(dims), self.resolve(wanted), before.graph
        held, order = flat(dims), [axis for axis in flat(wanted) if axis in flat(dims)]
        assert all(axis in order or same(axis.size, 1) for axis in held), "an axis would be lost"
        held = [axis for axis in held if axis in order]
        if any(len(group) != 1 for group in dims) or len(held) != len(dims):
            sizes = [self.size(axis, before) for axis in held]
            node = insert_call(graph, before, aten.reshape.default, (node, sizes), like=before)
        if held != order:
            permutation = [held.index(axis) for axis in order]
            node = insert_call(graph, before, aten.permute.default, (node, permutation), like=before)
        groups = [tuple(axis for axis in group if axis in order) for group in wanted]
        if any(len(group) > 1 for group in groups):
            sizes = [self.group_size(group, before) for group in groups]
            return insert_call(graph, before, aten.reshape.default, (node, sizes), like=before)
        for dim, group in enumerate(groups):
            if not group:
                node = insert_call(graph, before, aten.unsqueeze.default, (node, dim), like=before)
        return node

    def group_size(self, group: tuple[Axis, ...], before: fx.Node) -> int | fx.Node:
        """The size of a dimension that folds these axes."""
        result: int | fx.Node = 1
        for axis in group:
            size = self.size(axis, before)
            if result == 1:
                result = size
            elif isinstance(result, int) and isinstance(size, int):
                result *= size
            else:
                result = insert_call(before.graph, before, operator.mul, (result, size), like=before)
        return result

    def expand(self, node: fx.Node, wanted: Dims, before: fx.Node) -> fx.Node:
        """Broadcast the dimensions of size 1 to the axes wanted there (one or none each); a view."""
        wanted = self.resolve(wanted)
        missing = [
            bool(group) and not same(size, group[0].size) for size, group in zip(shape(node), wanted, strict=True)
        ]
        if not any(missing):
            return node
        sizes = [self.size(g[0], before) if m else -1 for g, m in zip(wanted, missing, strict=True)]
        return insert_call(before.graph, before, aten.expand.default, (node, sizes), like=before)


def aligned(tensor: fx.Node, dims: Dims) -> Dims:
    """The Dims of a tensor that broadcasts against one that holds `dims`."""
    sizes = shape(tensor)
    return tuple(
        () if same(size, 1) else group for size, group in zip(sizes, dims[len(dims) - len(sizes) :], strict=True)
    )


def _permutation(node: fx.Node, rank: int) -> list[int]:
    """Which input dimension each dimension of a permuting call's result is; asked of the call itself."""
    probe = torch.empty(tuple(range(rank)), device="meta")
    return list(node.target(probe, *node.args[1:], **node.kwargs).shape)  # type: ignore[operator]
