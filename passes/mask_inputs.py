"""What a mask's expression reads: counts of tokens a sequence, numbers, sizes; and which sizes to try it with."""

from collections.abc import Container, Iterable
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from hstu_compile.passes.contents import content
from hstu_compile.passes.index_space import (
    is_scalar,
    is_understood,
    op_name,
    operands,
    symbol_hints,
    symbols_of,
)
from hstu_compile.passes.index_space_views import VIEWS, NotUnderstood
from hstu_compile.passes.report import source_line, spoken

Symbols = dict[sympy.Symbol, int]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
UNKNOWN_SIZE = 24  # for a symbol without a hint
MANY = 4099  # a length at which every edge of a mask should be visible
FEW = 9  # a length at which a mask can be read whole


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.sympify(size)


class Expression:
    """The part of the graph that computes some masks.

    leaves: the inputs: integer tensors of one number a sequence ([B], unit dimensions aside).
        An input is looked for as deep as the graph is understood; a count whose origin isn't is taken as an input.
    nodes: everything between them and the masks, sizes included.
    known: inputs at which to stop. extra=1: an input may also hold one number more than there are sequences.
    Raises NotUnderstood when something else is read.
    """

    def __init__(self, roots: Iterable[fx.Node], batch_size: Any, known: Container[fx.Node], extra: int = 0) -> None:
        self._batch, self._known, self._extra = _expression(batch_size), known, extra
        self.nodes: dict[fx.Node, None] = {}
        self.leaves: dict[fx.Node, None] = {}
        for root in roots:
            for node, is_leaf in self._visit(root, {}).items():
                (self.leaves if is_leaf else self.nodes)[node] = None

    def is_count(self, node: fx.Node, extra: int = 0) -> bool:
        """Whether a node holds one integer a sequence (and `extra` more)."""
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in INTEGERS or value.dim() == 0:
            return False
        sizes = [_expression(size) for size in value.shape if _expression(size) != 1]
        return (sizes or [sympy.Integer(1)]) == [self._batch + extra]

    def _cuts_offsets(self, node: fx.Node) -> bool:
        """Whether a node is the begins or the ends of the sequences: their difference is the count."""
        return op_name(node) in ("slice", "narrow") and self.is_count(node.all_input_nodes[0], 1)

    def cuts(self, leaf: fx.Node) -> list[fx.Node]:
        """The places where a count can be read: the last one before it meets anything else, then down to the leaf."""
        places, node = [leaf], leaf
        while True:
            users = [user for user in node.users if user in self.nodes]
            if len(users) != 1 or not self.is_count(users[0]) or len(operands(users[0])) != 1:
                return places[::-1]
            node = users[0]
            if op_name(node) not in VIEWS:
                places.append(node)

    @cached_property
    def numbers(self) -> list[int]:
        """The whole numbers written in the expression, shapes aside."""
        found: set[int] = set()
        for node in self.nodes:
            if (known := content(node)) is not None:
                found |= known.numbers
            elif node.op == "get_attr":
                value = getattr(node.graph.owning_module, str(node.target), None)
                if isinstance(value, Tensor) and value.numel() == 1:
                    found.add(int(value.item()))
            elif op_name(node) not in VIEWS or op_name(node) in ("slice", "select", "narrow"):
                flat = torch.utils._pytree.tree_leaves((node.args, dict(node.kwargs)))
                found |= {int(abs(x)) for x in flat if isinstance(x, (int, float)) and abs(x) < 1 << 24}
        return sorted(found - {0})

    @cached_property
    def scalars(self) -> list[fx.Node]:
        """The nodes that hold a number known only at run time, the batch size aside."""
        batch = self._batch.free_symbols
        return [
            node
            for node in self.nodes
            if isinstance(node.meta.get("val"), torch.SymInt) and not symbols_of(node.meta["val"]) & batch
        ]

    @cached_property
    def has_table(self) -> bool:
        """Whether a constant tensor takes part, in which anything may be anywhere."""
        constants = [node for node in self.nodes if node.op == "get_attr"]
        return any(node.meta["val"].numel() > 64 for node in constants)

    @cached_property
    def buffers(self) -> list[fx.Node]:
        """The inputs of which it is known what they hold."""
        return [node for node in self.nodes if content(node) is not None]

    def _visit(
        self, node: fx.Node, seen: dict[fx.Node, dict[fx.Node, bool]], reader: fx.Node | None = None
    ) -> dict[fx.Node, bool]:
        """Nodes read by `node`, itself included, and whether each is a leaf; `reader`: who reads it here."""
        if node not in seen:
            seen[node] = self._read(node, seen, reader or node)
        return seen[node]

    def _read(self, node: fx.Node, seen: dict[fx.Node, dict[fx.Node, bool]], reader: fx.Node) -> dict[fx.Node, bool]:
        if node in self._known:
            return {node: True}
        if is_scalar(node):
            # Numbers end at the tensors whose sizes they are.
            below = [n for n in node.all_input_nodes if is_scalar(n)]
            return {node: False} | {n: leaf for b in below for n, leaf in self._visit(b, seen).items()}
        where = source_line(reader if node.op == "placeholder" else node)
        reason = NotUnderstood(f"it reads {spoken(node)}, which is no count of tokens a sequence, at {where}")
        if node.op == "get_attr" or is_understood(node):
            try:
                return {node: False} | {
                    n: leaf for o in operands(node) for n, leaf in self._visit(o, seen, node).items()
                }
            except NotUnderstood as error:
                reason = error
        if (self.is_count(node) or self.is_count(node, self._extra)) and not self._cuts_offsets(node):
            return {node: True}
        raise reason


def assignments(
    expression: Expression, batch_size: Any, max_seq_len: Any, num_heads: Any, longest: int | None = None
) -> list[Symbols]:
    """Sizes to read a mask with. The first is long enough to show every edge; then the captured ones; then a short one.

    longest: where buffers end that the mask is cut from; else it may have any length.
    No two symbols move in step, so that what holds for one of them only by coincidence doesn't hold in all.
    """
    nodes = [*expression.nodes, *expression.leaves]
    symbols = symbols_of(batch_size).union(*(symbols_of(node.meta.get("val")) for node in nodes))
    symbols |= symbols_of(max_seq_len) | symbols_of(num_heads)
    hints = symbol_hints(nodes[0].graph)
    captured = {symbol: hints.get(symbol, UNKNOWN_SIZE) for symbol in symbols}
    length, batch = _expression(max_seq_len), _expression(batch_size)
    free = symbols
    if not batch.free_symbols & length.free_symbols:
        captured |= solve(batch, 3, captured)
        free = symbols - batch.free_symbols
    if not free:
        return [captured]
    moved = captured | {symbol: captured[symbol] + 3 + 2 * k for k, symbol in enumerate(sorted(free, key=str))}
    largest = max([*expression.numbers, *(moved[symbol] for symbol in free)])
    long = moved | solve(length, longest or max(4 * largest + 16, MANY), moved)
    least = max([0, *(number for number in expression.numbers if number < length.xreplace(captured))])
    few = FEW if least < FEW // 2 else least + FEW
    short = moved | solve(length, few if longest is None else min(few, longest - 1), moved)
    return [long, captured, short]


def solve(size: Any, wanted: int, values: Symbols) -> Symbols:
    """One of the size's symbols, moved so that it becomes `wanted`; none, if it is no sum."""
    size = _expression(size)
    for symbol in sorted(size.free_symbols, key=str):
        others = size.xreplace({s: sympy.Integer(v) for s, v in values.items() if s != symbol}) - symbol
        if others.is_Integer and wanted > others:
            return {symbol: int(wanted - others)}
    return {}
