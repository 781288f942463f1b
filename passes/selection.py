"""Values at chosen rows: what the handlers of `row_wise` ask for, whoever chooses the rows and why.

`Selection.at` asks for rows of a value. The two that choose are `selected_rows` (an attention of new rows only: from
there up to the inputs and down to the outputs) and `candidates` (rows that are read of the last layer's output).
"""

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from hstu_compile.passes.graph import aten, insert_call, is_floating, is_tensor, same, shape, value
from hstu_compile.passes.index_space import is_scalar
from hstu_compile.passes.row_wise import Index, MixesRows

CHOSEN = "hstu_compile_chosen_rows"  # marks the calls that compute chosen rows


class Selection:
    """The graph's values at chosen rows, in new calls that are inserted before `before`."""

    def __init__(self, graph: fx.Graph, before: fx.Node) -> None:
        self.graph = graph
        self.gone: set[fx.Node] = set()  # the values that nobody will need as they were
        self.computed_whole: list[fx.Node] = []  # floating-point values of which rows are picked only afterwards
        self._before = before
        self._made: list[fx.Node] = []
        self._at: dict[tuple[fx.Node, Index], fx.Node] = {}
        self._parts: dict[tuple[fx.Node, Index], fx.Node] = {}
        self._cells: dict[tuple[fx.Node, fx.Node], Index] = {}

    # What handlers ask for

    def at(self, node: fx.Node, index: Index) -> fx.Node:
        """[R, *trailing dimensions] of a value, at coordinates of its leading dimensions; [*trailing] if all are 0."""
        if (node, index) not in self._at:
            self._at[node, index] = self._rows(node, index)
        return self._at[node, index]

    def whole(self, node: fx.Node) -> fx.Node:
        """A value as it was."""
        raise NotImplementedError

    def whole_operands(self, named: dict[str, Any], *but: str) -> dict[str, Any]:
        return {name: self.whole(x) if is_tensor(x) and name not in but else x for name, x in named.items()}

    def call(self, like: fx.Node, target: Any, args: Any, kwargs: Any = None) -> fx.Node:
        node = insert_call(self.graph, self._before, target, tuple(args), kwargs, like=like)
        node.meta[CHOSEN] = True
        self._made.append(node)
        return node

    def call_named(self, like: fx.Node, named: dict[str, Any]) -> fx.Node:
        """The call of `like`, with other arguments."""
        args, kwargs = [], {}
        for parameter in like.target._schema.arguments:  # type: ignore[union-attr]
            if not parameter.kwarg_only:
                args.append(named[parameter.name])
            elif named[parameter.name] is not None:
                kwargs[parameter.name] = named[parameter.name]
        return self.call(like, like.target, args, kwargs)

    def sizes(self, node: fx.Node, index: Index) -> list[Any]:
        """The shape of chosen rows of a value, as arguments."""
        rest = list(shape(node)[len(index) :])
        row = next((i for i in index if isinstance(i, fx.Node)), None)
        result: list[Any] = [] if row is None else [self.call(row, aten.sym_size.int, (row, 0))]
        for size in rest:
            result.append(size if isinstance(size, int) else self._size(node, size))
        return result

    def parts(self, source: fx.Node, index: Index, named: dict[str, Any]) -> fx.Node:
        """The rows of a call with several results, once."""
        if (source, index) not in self._parts:
            self._parts[source, index] = self.call_named(source, named)
        return self._parts[source, index]

    def cell_of(self, offsets: fx.Node, row: fx.Node) -> Index:
        """(sequence, position) of rows of a jagged layout."""
        if (offsets, row) not in self._cells:
            last = self.call(row, operator.sub, (self.call(row, aten.sym_size.int, (offsets, 0)), 2))
            # All offsets, not a slice of them: see searched_lists.
            sequence = self.call(row, aten.bucketize.Tensor, (row, offsets), {"right": True})
            sequence = self.call(row, aten.sub.Tensor, (sequence, 1))
            sequence = self.call(row, aten.clamp.default, (sequence, None, last))  # rows of no sequence
            begin = self.call(row, aten.index.Tensor, (offsets, [sequence]))
            position = self.call(row, aten.sub.Tensor, (row, begin))
            self._cells[offsets, row] = (sequence, position)
        return self._cells[offsets, row]

    def row_of(self, offsets: fx.Node, cell: Index) -> fx.Node | None:
        """The rows of which `cell_of` gave these cells."""
        return next((row for (o, row), known in self._cells.items() if o is offsets and known == cell), None)

    # How rows are got

    def _rows(self, node: fx.Node, index: Index) -> fx.Node:
        raise NotImplementedError

    def _first(self, node: fx.Node, index: Index) -> fx.Node:
        """What stands at 0 of leading dimensions of size 1; a tensor of one dimension still, which decides dtypes."""
        whole = self.whole(node)
        for _ in range(min(len(index), len(shape(node)) - 1)):
            whole = self.call(node, aten.select.int, (whole, 0, 0))
        return whole

    def _picked(self, node: fx.Node, index: Index) -> fx.Node:
        if is_floating(node) and node.op != "placeholder":
            self.computed_whole.append(node)
        whole = node
        for dim in reversed([dim for dim, i in enumerate(index) if not isinstance(i, fx.Node)]):
            whole = self.call(node, aten.select.int, (whole, dim, 0))
        return self.call(node, aten.index.Tensor, (whole, [i for i in index if isinstance(i, fx.Node)]))

    def _size(self, node: fx.Node, size: Any) -> Any:
        """A size of this graph as an argument of a call."""
        if isinstance(size, int):
            return size
        found = self._known(lambda other: same(other, size))
        found = self._arithmetic(node, size.node.expr) if found is None else found
        if found is None:
            raise MixesRows(node, f"has a size, {size}, that nothing before it has")
        return found

    def _known(self, fits: Callable[[Any], bool]) -> fx.Node | None:
        for known in itertools.takewhile(lambda known: known is not self._before, self.graph.nodes):
            if is_scalar(known) and fits(value(known)):
                return known
            if is_tensor(known) and known not in self.gone:
                for dim, other in enumerate(shape(known)):
                    if fits(other):
                        return self.call(known, aten.sym_size.int, (known, dim))
        return None

    def _arithmetic(self, node: fx.Node, size: sympy.Expr) -> Any:
        """A sum or product of sizes that are there."""
        if size.is_Integer:
            return int(size)
        if size.is_Symbol:
            return self._known(lambda other: isinstance(other, torch.SymInt) and other.node.expr == size)
        parts = [self._arithmetic(node, part) for part in size.args] if size.is_Add or size.is_Mul else [None]
        if None in parts:
            return None
        calculate = operator.add if size.is_Add else operator.mul
        return functools.reduce(lambda a, b: self.call(node, calculate, (a, b)), parts)
