"""Evaluate a captured tensor at chosen coordinates, without making the tensor.

A mask, a position or a normaliser is a pure function of index vectors, lengths, counts and constants. Here a node's
value is a function of its coordinates: views move the coordinates, pointwise ops run on what they find there. So a
[B, N, N] mask can be read at a few thousand places, for lengths and sizes of the reader's choice.
"""

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from hstu_compile.passes.contents import content
from hstu_compile.passes.graph import attribute
from hstu_compile.passes.index_space_ops import PARTS, UNTAGGED_POINTWISE, VALUES
from hstu_compile.passes.index_space_views import VIEWS, Arguments, Coords, NotUnderstood, broadcast_coords
from hstu_compile.passes.report import source_line

Leaf = Callable[[Coords], Tensor]  # the sampled values of an input at coordinates
MAX_CELLS = 1 << 26  # evaluated at once, by a reduction


def op_name(node: fx.Node) -> str:
    """The op without namespace and overload ("slice"), or "" for a node that calls no op."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else ""


def arguments(node: fx.Node) -> Arguments:
    """A node's arguments by their names in the schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    named = {}
    for k, argument in enumerate(node.target._schema.arguments):
        given = node.args[k] if k < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        named[argument.name] = given
    return named


def is_scalar(node: fx.Node) -> bool:
    """Whether the node's value is a number: a size, or arithmetic on sizes."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    # max.other and min.other are pointwise, their other overloads reduce.
    return torch.Tag.pointwise in target.tags or op_name(node) in UNTAGGED_POINTWISE or target._overloadname == "other"


def is_understood(node: fx.Node) -> bool:
    """Whether a node's op is in the tables (its arguments may still turn out to be strange)."""
    if node.op == "get_attr" or is_scalar(node) or is_pointwise(node):
        return True
    if node.op == "placeholder":
        return content(node) is not None
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and op_name(source) in PARTS
    return op_name(node) in VIEWS or op_name(node) in VALUES


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose value a node reads, looking through the node of an op with several results."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    name = op_name(source)
    shape_only = name.endswith(("_like", "_as")) or name.startswith("new_")
    kept = source.args[:1] if name.endswith("_as") else ()
    return [n for n in source.all_input_nodes if not shape_only or n in kept or is_scalar(n)]


def symbol_hints(graph: fx.Graph) -> dict[sympy.Symbol, int]:
    """The size each symbol had when the graph was captured."""
    hints = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else [value]:
            # SymNode.expr, .has_hint() and .hint: read in torch 2.11 and 2.13.
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol) and size.node.has_hint():
                hints[size.node.expr] = int(size.node.hint)
    return hints


def symbols_of(value: Any) -> set[sympy.Symbol]:
    """The symbols in a number or in the sizes of a tensor."""
    if isinstance(value, Tensor):
        return set().union(*(symbols_of(size) for size in value.shape))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set(value.node.expr.free_symbols)
    return set()


class IndexSpace:
    """Values of captured nodes, with sizes and inputs chosen by the caller.

    symbols: a size for each symbol (of SymInts) that is met.
    leaves: the values of inputs, as functions of their coordinates. Evaluation stops at them.
    rank: the number of dimensions of the tensors that coordinates and leaves broadcast to.
    """

    def __init__(self, symbols: Mapping[sympy.Symbol, int], leaves: Mapping[fx.Node, Leaf], rank: int) -> None:
        self._symbols = {symbol: sympy.Integer(value) for symbol, value in symbols.items()}
        self._leaves = leaves
        self._rank = rank
        # Coordinates are held beside the value: an id is only theirs while they live.
        self._values: dict[tuple[fx.Node, tuple[int, ...]], tuple[Coords, Tensor]] = {}

    def scalar(self, value: Any) -> Any:
        """A number: an int, float or bool itself, or the value of a SymInt (or of its node) under the chosen sizes."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, Tensor):
            raise NotUnderstood("a number that is read from a tensor")
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return value
        number = value.node.expr.xreplace(self._symbols)
        if number.free_symbols:
            raise NotUnderstood(f"the size {number} is not known")
        return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)](number)

    def sizes(self, shape: Iterable[Any]) -> tuple[int, ...]:
        return tuple(self.scalar(size) for size in shape)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return self.sizes(node.meta["val"].shape)

    def value(self, node: fx.Node, coords: Coords) -> Tensor:
        """The node's value at `coords`: one int64 tensor a dimension, which broadcast against each other.

        The result broadcasts to the coordinates' common shape, and has the node's dtype. Raises NotUnderstood.
        """
        key = (node, tuple(map(id, coords)))
        if key not in self._values:
            try:
                result = self._evaluate(node, coords)
            except NotUnderstood:
                raise
            except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise NotUnderstood(f"{node.target} was not understood ({error}) at {source_line(node)}") from error
            self._values[key] = coords, result.to(node.meta["val"].dtype)
        return self._values[key][1]

    def new_axis(self, size: int, coords: Coords, count: int = 1) -> Tensor:
        """Coordinates 0..size-1 along a new leading dimension, the `count`-th before those of `coords`."""
        rank = max([self._rank, *(c.dim() for c in coords)])
        if size * math.prod(torch.broadcast_shapes(*(c.shape for c in coords))) > MAX_CELLS:
            raise ValueError("a reduction over too many elements")
        return torch.arange(size).reshape(-1, *[1] * (rank + count - 1))

    def along(self, node: fx.Node, axes: tuple[int, ...], coords: Coords) -> Tensor:
        """All values along `axes` of `node`, as new leading dimensions; what `coords` says of these axes is ignored."""
        shape, at = self.shape(node), list(coords)
        for axis in axes:
            at[axis] = torch.zeros((), dtype=torch.int64)
        base = tuple(at)
        for count, axis in enumerate(reversed(axes), 1):
            at[axis] = self.new_axis(shape[axis], base, count)
        value = self.value(node, tuple(at))
        rank = max([self._rank, *(c.dim() for c in base)]) + len(axes)
        value = value.reshape(*[1] * (rank - value.dim()), *value.shape)
        return value.expand(*(shape[axis] for axis in axes), *value.shape[len(axes) :])

    def _evaluate(self, node: fx.Node, coords: Coords) -> Tensor:
        refuse_if_written(node)
        if node in self._leaves:
            return self._leaves[node](coords)
        if node.op == "get_attr":
            return _constant(node)[coords]
        if (known := content(node)) is not None:
            return known.at(coords)
        if is_pointwise(node):
            return self._pointwise(node, coords)
        if node.target is operator.getitem:
            source, which = node.args
            assert isinstance(source, fx.Node) and isinstance(which, int)
            if op_name(source) in PARTS:
                return PARTS[op_name(source)](self, source, arguments(source), which, coords)
        name = op_name(node)
        if name in VIEWS:
            named = arguments(node)
            return self.value(named["self"], VIEWS[name](self, node, named, coords))
        if name in VALUES:
            return VALUES[name](self, node, arguments(node), coords)
        what = "the input" if node.op == "placeholder" else "the op"
        raise NotUnderstood(f"{what} {node.target} at {source_line(node)}")

    def _pointwise(self, node: fx.Node, coords: Coords) -> Tensor:
        def sampled(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if is_scalar(value):
                return self.scalar(value)
            return self.value(value, broadcast_coords(self.shape(value), coords))

        assert callable(node.target)
        return node.target(*map(sampled, node.args), **{name: sampled(v) for name, v in node.kwargs.items()})


def _constant(node: fx.Node) -> Tensor:
    value = attribute(node)
    if isinstance(value, torch.nn.Parameter) or not isinstance(value, Tensor):
        raise ValueError("a parameter's value is not known here")
    return value.detach().cpu()


def refuse_if_written(node: fx.Node) -> None:
    """An in-place op changes what later readers of a tensor, or of a view of it, see: when, can't be told here."""
    for user in node.users:
        if not isinstance(user.target, torch._ops.OpOverload) or op_name(user) == "detach_":
            continue
        for k, argument in enumerate(user.target._schema.arguments):
            given = user.args[k] if k < len(user.args) else user.kwargs.get(argument.name)
            if given is node and argument.alias_info is not None and argument.alias_info.is_write:
                raise NotUnderstood(f"{user.target} writes in place at {source_line(user)}")
        results = user.target._schema.returns
        if results and results[0].alias_info is not None:
            refuse_if_written(user)
