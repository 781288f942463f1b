"""Compute only chosen rows: from the calls where they are chosen up to the inputs, and down to the outputs.

A model works token by token, but for its attention. If an attention needs only some rows of q, k and v (those of tokens
that no cache holds), then everything that leads to them is needed at these rows alone: projections, norms, embeddings,
ids. `Selection.at` asks for rows of a value and, where the call that makes it works row by row (`row_wise`), asks for
the same rows of its operands; elsewhere the rows are picked from the whole value. So positions and times, computed from
whole batches of integers, keep their true values. What reads rows of a value by an index reads them among those that
are computed. A call that needs other rows is refused.

Nothing here knows why rows are chosen.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.graph import (
    SIZE_OF,
    aten,
    erase_dead,
    insert_call,
    is_call,
    is_floating,
    is_tensor,
    same,
    shape,
    value,
)
from hstu_compile.passes.index_space import arguments, is_scalar
from hstu_compile.passes.row_wise import Index, MixesRows, handler, is_lookup

_NEEDS_ALL = "needs rows of all tokens, of which only chosen ones are computed"

CHOSEN = "hstu_compile_chosen_rows"  # marks the calls that compute chosen rows


class Selection:
    """The graph's values at the rows `rows` [R], ascending, of the token dimension of size `tokens`.

    anchors: the calls that exist for these rows only, and what replaces each: a function of the selection and the call.
    """

    def __init__(
        self, gm: fx.GraphModule, rows: fx.Node, anchors: dict[fx.Node, Callable[["Selection", fx.Node], fx.Node]]
    ) -> None:
        self.gm, self.graph, self.rows = gm, gm.graph, rows
        self.reads: list[fx.Node] = []  # tensors of row numbers that are read of chosen rows
        self.computed_whole: list[fx.Node] = []  # floating-point values of which rows are picked only afterwards
        self._anchors = anchors
        self._before = next(iter(anchors))  # new calls are inserted here
        self._made: list[fx.Node] = []
        self._at: dict[tuple[fx.Node, Index], fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self._parts: dict[tuple[fx.Node, Index], fx.Node] = {}
        self._cells: dict[tuple[fx.Node, fx.Node], Index] = {}
        self._depends: set[fx.Node] = set(anchors)
        for node in self.graph.nodes:
            if any(n in self._depends for n in node.all_input_nodes) and not is_call(node, *SIZE_OF):
                self._depends.add(node)

    def run(self) -> list[bool]:
        """Rewrite the graph in place; returns, output by output, whether it has the chosen rows only.

        Raises:
            MixesRows: a call needs others.
        """
        self._read_sizes_elsewhere()
        for anchor, replace in self._anchors.items():
            self._before = anchor
            self._at[anchor, (self.rows,)] = replace(self, anchor)
        output = self._before = next(iter(self.graph.find_nodes(op="output")))
        chosen: dict[fx.Node, bool] = {}
        tokens = shape(next(iter(self._anchors)))[0]

        def selected(node: fx.Node) -> fx.Node:
            chosen[node] = False
            if node not in self._depends:
                return node
            if shape(node) and same(shape(node)[0], tokens):
                try:
                    found = self.at(node, (self.rows,))
                    chosen[node] = True
                    return found
                except MixesRows as error:
                    first = error
                try:
                    return self.whole(node)
                except MixesRows as error:
                    raise (first if error.has_rows else error) from error
            return self.whole(node)

        before = torch.utils._pytree.tree_leaves(output.args)
        output.args = fx.map_arg(output.args, selected)
        erase_dead([*self._depends - {output}, *self._made])
        for anchor in self._anchors:
            if anchor in self.graph.nodes:
                raise MixesRows(next(iter(anchor.users)), "reads what is computed at chosen rows only")
        return [chosen.get(node, False) for node in before]

    # What handlers ask for

    def at(self, node: fx.Node, index: Index) -> fx.Node:
        """[R, *trailing dimensions] of a value, at coordinates of its leading dimensions; [*trailing] if all are 0."""
        if (node, index) not in self._at:
            self._at[node, index] = self._rows(node, index)
        return self._at[node, index]

    def whole(self, node: fx.Node) -> fx.Node:
        """A value as it was: where it depends on chosen rows, that is so only if it reads them by an index."""
        if node not in self._depends:
            return node
        if node not in self._whole:
            self._whole[node] = self._all(node)
        return self._whole[node]

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
        if not any(isinstance(i, fx.Node) for i in index):
            whole = self.whole(node)
            for _ in index:
                whole = self.call(node, aten.select.int, (whole, 0, 0))
            return whole
        reason = None
        if node in self._depends and (node, (self.rows,)) in self._at:
            return self._read(node, *index)  # type: ignore[arg-type]
        handle = handler(node)
        if handle is not None:
            try:
                return handle(self, node, arguments(node) if hasattr(node.target, "_schema") else {}, index)
            except MixesRows as error:
                reason = MixesRows(node, _NEEDS_ALL) if error.has_rows else error
        if node in self._depends:
            raise reason or MixesRows(node, "is not known to work row by row")
        return self._picked(node, index)

    def _picked(self, node: fx.Node, index: Index) -> fx.Node:
        if is_floating(node) and node.op != "placeholder":
            self.computed_whole.append(node)
        whole = node
        for dim in reversed([dim for dim, i in enumerate(index) if not isinstance(i, fx.Node)]):
            whole = self.call(node, aten.select.int, (whole, dim, 0))
        return self.call(node, aten.index.Tensor, (whole, [i for i in index if isinstance(i, fx.Node)]))

    def _read(self, node: fx.Node, row: fx.Node) -> fx.Node:
        """Rows of a value of which the chosen ones are computed; they must be among these."""
        if self._follows_from_rows(row):
            raise MixesRows(node, "is read at rows that lie elsewhere than those to compute")
        self.reads.append(row)
        place = self.call(node, aten.searchsorted.Tensor, (self.rows, row))
        last = self.call(node, operator.sub, (self.call(node, aten.sym_size.int, (self.rows, 0)), 1))
        place = self.call(node, aten.clamp.default, (place, None, last))
        return self.call(node, aten.index.Tensor, (self._at[node, (self.rows,)], [place]))

    def _follows_from_rows(self, node: fx.Node) -> bool:
        todo, seen = [node], set()
        while todo:
            node = todo.pop()
            if node is self.rows:
                return True
            if node not in seen and node.meta.get(CHOSEN):
                todo += node.all_input_nodes
            seen.add(node)
        return False

    def _all(self, node: fx.Node) -> fx.Node:
        if node in self._anchors:
            raise MixesRows(node, "is computed at chosen rows only", has_rows=True)
        try:
            operands = {n: self.whole(n) for n in node.all_input_nodes if n in self._depends}
        except MixesRows as error:
            if is_lookup(node):
                return self._looked_up(node)
            if not error.has_rows:
                raise
            raise self._refusal(node) from error
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: operands.get(n, n))
        return self.call(node, node.target, args, kwargs)

    def _refusal(self, node: fx.Node) -> MixesRows:
        try:
            self.at(node, (self.rows,))
        except MixesRows as error:
            return MixesRows(node, f"{_NEEDS_ALL}: {f'it {error.reason}' if error.node is node else error}")
        return MixesRows(node, "is computed at chosen rows only", has_rows=True)

    def _looked_up(self, node: fx.Node) -> fx.Node:
        """x[rows], of an x of which only chosen rows are computed."""
        named = arguments(node)
        places = [self.whole(i) for i in named.get("indices", [named.get("index")])]
        rank = max(len(shape(i)) for i in places)
        is_flat = rank == 1 and len(places) == 1
        sizes = [] if is_flat else [self._size(node, size) for size in shape(node)]
        flat = []
        for place in places:
            if len(places) > 1:
                place = self.call(node, aten.expand.default, (place, sizes[:rank]))
            flat.append(self.call(node, aten.reshape.default, (place, [-1])) if rank != 1 else place)
        found = self.at(named["self"], tuple(flat))
        return found if rank == 1 else self.call(node, aten.reshape.default, (found, sizes))

    # Sizes

    def _size(self, node: fx.Node, size: Any) -> Any:
        """A size of this graph as an argument of a call."""
        if isinstance(size, int):
            return size
        for known in itertools.takewhile(lambda known: known is not self._before, self.graph.nodes):
            if is_scalar(known) and same(value(known), size):
                return known
            if is_tensor(known) and known not in self._depends:
                for dim, other in enumerate(shape(known)):
                    if same(other, size):
                        return self.call(known, aten.sym_size.int, (known, dim))
        raise MixesRows(node, f"has a size, {size}, that nothing before it has")

    def _read_sizes_elsewhere(self) -> None:
        """The whole values will be gone: their sizes are those of inputs."""
        for node in list(self.graph.nodes):
            if is_call(node, *SIZE_OF) and node.all_input_nodes[0] in self._depends:
                self._before = node
                node.replace_all_uses_with(self._size(node, value(node)))
                self.graph.erase_node(node)
