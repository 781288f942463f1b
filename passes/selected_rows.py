"""Compute only chosen rows: from the calls where they are chosen up to the inputs, and down to the outputs.

A model works token by token, but for its attention. If an attention needs only some rows of q, k and v (those of tokens
that no cache holds), then everything that leads to them is needed at these rows alone: projections, norms, embeddings,
ids. `Selection.at` asks for rows of a value and, where the call that makes it works row by row (`row_wise`), asks for
the same rows of its operands; elsewhere the rows are picked from the whole value. So positions and times, computed from
whole batches of integers, keep their true values. What reads rows of a value by an index reads them among those that
are computed. A call that needs other rows is refused.

Nothing here knows why rows are chosen.
"""

import operator
from collections.abc import Callable

import torch
from torch import fx

from hstu_compile.passes.graph import (
    SIZE_OF,
    aten,
    erase_dead,
    is_call,
    same,
    shape,
    value,
)
from hstu_compile.passes.index_space import arguments
from hstu_compile.passes.row_wise import Index, MixesRows, handler, is_lookup
from hstu_compile.passes.selection import CHOSEN, Selection

_NEEDS_ALL = "needs rows of all tokens, of which only chosen ones are computed"


class SelectedRows(Selection):
    """The graph's values at the rows `rows` [R], ascending, of the token dimension of size `tokens`.

    anchors: the calls that exist for these rows only, and what replaces each: a function of the selection and the call.
    """

    def __init__(
        self, gm: fx.GraphModule, rows: fx.Node, anchors: dict[fx.Node, Callable[["SelectedRows", fx.Node], fx.Node]]
    ) -> None:
        super().__init__(gm.graph, before=next(iter(anchors)))
        self.gm, self.rows = gm, rows
        self.reads: list[fx.Node] = []  # tensors of row numbers that are read of chosen rows
        self._anchors = anchors
        self._whole: dict[fx.Node, fx.Node] = {}
        self.gone |= set(anchors)
        for node in self.graph.nodes:
            if any(n in self.gone for n in node.all_input_nodes) and not is_call(node, *SIZE_OF):
                self.gone.add(node)

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
            if node not in self.gone:
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
        erase_dead([*self.gone - {output}, *self._made])
        for anchor in self._anchors:
            if anchor in self.graph.nodes:
                raise MixesRows(next(iter(anchor.users)), "reads what is computed at chosen rows only")
        return [chosen.get(node, False) for node in before]

    # What handlers ask for

    def whole(self, node: fx.Node) -> fx.Node:
        """A value as it was: where it depends on chosen rows, that is so only if it reads them by an index."""
        if node not in self.gone:
            return node
        if node not in self._whole:
            self._whole[node] = self._all(node)
        return self._whole[node]

    # How rows are got

    def _rows(self, node: fx.Node, index: Index) -> fx.Node:
        if not any(isinstance(i, fx.Node) for i in index):
            return self._first(node, index)
        reason = None
        if node in self.gone and (node, (self.rows,)) in self._at:
            return self._read(node, *index)  # type: ignore[arg-type]
        handle = handler(node)
        if handle is not None:
            try:
                return handle(self, node, arguments(node) if hasattr(node.target, "_schema") else {}, index)
            except MixesRows as error:
                reason = MixesRows(node, _NEEDS_ALL) if error.has_rows else error
        if node in self.gone:
            raise reason or MixesRows(node, "is not known to work row by row")
        return self._picked(node, index)

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
            operands = {n: self.whole(n) for n in node.all_input_nodes if n in self.gone}
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

    def _read_sizes_elsewhere(self) -> None:
        """The whole values will be gone: their sizes are those of inputs."""
        for node in list(self.graph.nodes):
            if is_call(node, *SIZE_OF) and node.all_input_nodes[0] in self.gone:
                self._before = node
                node.replace_all_uses_with(self._size(node, value(node)))
                self.graph.erase_node(node)
