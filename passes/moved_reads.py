"""Reads of rows, moved towards the inputs over calls that work row by row and whose results nobody needs whole."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

from hstu_compile.passes.graph import (
    SIZE_OF,
    aten,
    erase_dead,
    is_call,
    is_floating,
    is_pure,
    is_tensor,
    same_shape,
    shape,
    storages,
    value,
    writes_to,
)
from hstu_compile.passes.index_space import arguments
from hstu_compile.passes.report import Misfit, source_line, spoken
from hstu_compile.passes.row_reads import RowRead
from hstu_compile.passes.row_wise import Index, MixesRows, handler
from hstu_compile.passes.selection import Selection

MODES = {_enter_autocast, _exit_autocast, torch._C._set_grad_enabled}


def move(graph: fx.Graph, reads: Sequence[RowRead]) -> "MovedReads":
    """The reads where they can be moved to, in new calls beside the old ones.

    What turns out to be needed whole, since rows are picked of it, needs other things whole: then once more.
    """
    needed, reasons = alive(graph, reads), {}  # type: ignore[var-annotated]
    while True:
        moved = MovedReads(graph, reads, needed, reasons)
        if not moved.missing:
            return moved
        moved.discard()
        needed |= _needed(moved.missing, reads)


def alive(graph: fx.Graph, reads: Sequence[RowRead] = ()) -> set[fx.Node]:
    """What is needed, but for what only these reads need."""
    return _needed([node for node in graph.nodes if _is_root(node)], reads)


def _is_root(node: fx.Node) -> bool:
    """Whether it is there whoever reads it."""
    return node.op != "call_function" or not is_pure(node.target)


def _needed(roots: Iterable[fx.Node], reads: Sequence[RowRead]) -> set[fx.Node]:
    """What is needed whole for these; of what is only read by rows, or for its size, nothing."""
    by_node = {read.node: read for read in reads}
    needed, todo = set(), list(roots)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            if node in by_node:
                todo += by_node[node].others
            elif not is_call(node, *SIZE_OF):
                todo += node.all_input_nodes
    return needed


class MovedReads(Selection):
    """The new calls of some reads; `commit` puts them into the place of the old ones, `discard` removes them.

    needed: values that stay whole.
    missing: others that have to. If there are any, only `discard` is left to do.
    reasons: why a read could not be moved over a call.
    """

    def __init__(
        self, graph: fx.Graph, reads: Sequence[RowRead], needed: set[fx.Node], reasons: dict[fx.Node, MixesRows]
    ) -> None:
        super().__init__(graph, before=reads[0].node)
        self.reads, self.reasons = reads, reasons
        self.gone = {node for node in graph.nodes if node not in needed}
        # What is read may be a view, itself needed, of what is not.
        memory = storages(n for n in needed if n.op == "call_function").keys()
        self._in_memory = memory - storages(read.source for read in reads).keys()
        self.missing: set[fx.Node] = set()
        self.picked: dict[fx.Node, fx.Node] = {}  # new call -> the whole value of which it picks rows
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._index_of: dict[str, Index] = {}  # of each read that moves, by what tells which rows it reads
        self._read_of: dict[Index, RowRead] = {}
        self._results = {read.node: self._moved(read) for read in reads}
        self._sizes = dict(self._sizes_elsewhere())

    def computed(self, read: RowRead) -> list[fx.Node]:
        """The new calls behind a read."""
        made, found, todo = set(self._made), [], [self._results[read.node]]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in made and node not in seen:
                seen.add(node)
                found.append(node)
                todo += node.all_input_nodes
        return found

    @property
    def numbers(self) -> list[Index]:
        """The rows that are read, each selection of them once."""
        return list(self._index_of.values())

    def stays(self, node: fx.Node) -> bool:
        """Whether it was there before, and will be."""
        return node in self._order and node not in self.gone

    def discard(self) -> None:
        for node in reversed(self._made):
            self.graph.erase_node(node)

    def commit(self) -> None:
        replaced = self._sizes | self._results
        for node in [user for old in replaced for user in old.users]:
            node.args, node.kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: replaced.get(n, n))
        erase_dead([*(read.node for read in self.reads), *self._sizes, *self._made, *reversed(list(self.gone))])

    def check_order(self) -> None:
        """Calls moved to where their rows are read: there they must mean what they did.

        Raises:
            Misfit: between, or after it in what is read, something is written; or modes change.
        """
        passed = [node for node, _ in self._at if node in self.gone]
        first = min(map(self._order.__getitem__, passed))
        last = max(self._order[read.node] for read in self.reads)
        operands = (node for call in self._made for node in call.all_input_nodes if node in self._order)
        values = {*passed, *operands, *(read.node for read in self.reads)}
        tensors = [node for node in values if is_tensor(node)]
        for node in self._order:
            if first < self._order[node] < last and node.target in MODES:
                raise Misfit("autocast or grad mode changes before the rows are read", "read them in the same mode")
            if first < self._order[node] and any(changes(node, written) for written in tensors):
                raise Misfit(
                    f"written in place by {spoken(node)} at {source_line(node)}", "write into a copy, or earlier"
                )

    # How rows are got

    def whole(self, node: fx.Node) -> fx.Node:
        if node in self.gone:
            self.missing.add(node)
        return node

    def _rows(self, node: fx.Node, index: Index) -> fx.Node:
        if not any(isinstance(i, fx.Node) for i in index):
            return self._first(node, index)
        if node in self.gone and not storages([node]).keys() & self._in_memory:  # a view of what is there costs nothing
            handle = handler(node)
            try:
                if handle is None:
                    raise MixesRows(node, "is not known to work row by row")
                return handle(self, node, arguments(node) if hasattr(node.target, "_schema") else {}, index)
            except MixesRows as error:
                self.reasons.setdefault(node, error)
        rows = self._picked(self.whole(node), index)
        self.picked[rows] = node
        return rows

    def _picked(self, node: fx.Node, index: Index) -> fx.Node:
        """By the call that read them, where the value has the rows that it read; by an index elsewhere."""
        read = self._read_of.get(index)
        if read is not None and same_shape(shape(node)[: read.dims], shape(read.source)[: read.dims]):
            rows = read.of(node, self.call)
            if rows is not None:
                inner = len(shape(node)) - read.dims
                numbers = len(shape(rows)) - inner
                if numbers == 1:
                    return rows
                sizes = [-1, *self.sizes(node, (0,) * read.dims)] if inner else [-1]
                return self.call(node, aten.reshape.default, (rows, sizes))
        return super()._picked(node, index)

    def _moved(self, read: RowRead) -> fx.Node:
        """The read's result, from rows of as early values as can be."""
        if read.source not in self.gone:
            return read.node
        self._before = read.node
        with _autocast_at(read.node), sizes_from_data_ignored(read.node):
            try:
                return self._rows_of(read)
            except MixesRows as error:
                self.reasons.setdefault(read.source, error)
                self.missing.add(read.source)
                return read.node

    def _rows_of(self, read: RowRead) -> fx.Node:
        numbers = self._numbers(read)
        lead = shape(numbers[0])
        index: Index = tuple(numbers)
        if len(lead) != 1:
            index = tuple(self.call(n, aten.reshape.default, (n, [-1])) for n in numbers)
        index = self._index_of.setdefault(f"{read.which} of {shape(read.source)[: read.dims]}", index)
        self._read_of.setdefault(index, read)
        rows = self.at(read.source, index)
        if value(rows).dtype != value(read.node).dtype:
            raise MixesRows(read.source, f"is {value(rows).dtype} of these rows")
        if len(lead) == 1:
            return rows
        sizes: list[Any] = [*self.sizes(numbers[0], ()), *self.sizes(read.source, (0,) * read.dims)]
        return self.call(read.node, aten.reshape.default, (rows, sizes))

    def _numbers(self, read: RowRead) -> list[fx.Node]:
        """The coordinates of the rows read, one tensor for each of the source's leading dimensions."""
        sizes = [self._size(read.source, size) for size in shape(read.source)[: read.dims]]
        found = []
        for dim, size in enumerate(sizes):
            grid = self.call(read.node, aten.arange.default, (size,), {"device": value(read.source).device})
            if read.dims > 1:
                ones = [-1 if other == dim else 1 for other in range(read.dims)]
                grid = self.call(read.node, aten.reshape.default, (grid, ones))
                grid = self.call(read.node, aten.expand.default, (grid, sizes))
            numbers = read.of(grid, self.call)
            assert numbers is not None
            found.append(numbers)
        return found

    def _sizes_elsewhere(self) -> Iterator[tuple[fx.Node, Any]]:
        """Whole values will be gone: sizes that are read of them are read of others."""
        for node in list(self._order):
            if is_call(node, *SIZE_OF) and node not in self.gone and node.all_input_nodes[0] in self.gone:
                self._before = node
                try:
                    yield node, self._size(node, value(node))
                except MixesRows:
                    self.missing.add(node.all_input_nodes[0])


def changes(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether the call writes to a tensor. The detach_ that follows a constant of integers changes nothing."""
    return writes_to(node, tensor) and (is_floating(node) or not is_call(node, aten.detach_.default))


def sizes_from_data_ignored(node: fx.Node) -> contextlib.AbstractContextManager:
    """Rows that a mask tells: their number is a symbol that a trace would have to account for, and this is none."""
    shapes = value(node).fake_mode.shape_env
    return contextlib.nullcontext() if shapes is None else shapes.ignore_fresh_unbacked_symbols()


@contextlib.contextmanager
def _autocast_at(node: fx.Node) -> Iterator[None]:
    """The autocast regions of the graph that are entered where a node stands."""
    entered: dict[fx.Node, tuple] = {}
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        if earlier.target is _enter_autocast:
            entered[earlier] = earlier.args
        elif earlier.target is _exit_autocast:
            entered.pop(earlier.args[0], None)
    with contextlib.ExitStack() as stack:
        for args in entered.values():
            stack.enter_context(torch.autocast(*args))
        yield
