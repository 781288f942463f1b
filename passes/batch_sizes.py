"""Which sizes of a jagged graph's inputs are the number of tokens, and which that of sequences."""

from typing import Any, Literal

import sympy
import torch
from torch import Tensor, fx

from hstu_compile.passes.graph import Size, is_tensor, shape, value
from hstu_compile.passes.index_space import is_scalar, symbols_of

Kind = Literal["tokens", "sequences", "offsets"]


def expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class BatchSizes:
    """Of a graph with `tokens` rows in sequences that begin and end at `offsets`.

    An input that is never combined with others has sizes of its own. One of each is told by what it was when the graph
    was captured: the first that was as large as the batch. More are chance, such as two columns and two sequences.
    """

    def __init__(self, graph: fx.Graph, tokens: Size, offsets: fx.Node) -> None:
        self._inputs = list(graph.find_nodes(op="placeholder"))
        self._tokens, self._offsets = expression(tokens), expression(shape(offsets)[0])
        self._kinds: dict[sympy.Expr, Kind | None] = {}
        self._hints = {self._hint(tokens): "tokens", self._hint(shape(offsets)[0]) - 1: "sequences"}
        self._told = {symbol for node in self._inputs for symbol in self._told_by_hint(node)}

    @staticmethod
    def _hint(size: Any) -> int:
        return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)  # SymNode.hint: torch 2.11, 2.13

    def _told_by_hint(self, node: fx.Node) -> list[sympy.Expr]:
        """The size of an input that is told by its hint, if there is one."""
        sizes = shape(node) if is_tensor(node) else ()
        if any(self._known(expression(size)) for size in sizes):
            return []
        return [expression(size) for size in sizes if self._hint(size) in self._hints][:1]

    def kind(self, size: Any) -> Kind | None:
        if isinstance(size, int):
            return None
        if expression(size) not in self._kinds:
            self._kinds[expression(size)] = self._kind(size)
        return self._kinds[expression(size)]

    def _kind(self, size: Any) -> Kind | None:
        found = expression(size)
        if (known := self._known(found)) is not None:
            return known
        if (
            found not in self._told
            or not found.is_Symbol
            or symbols_of(size) & (self._tokens.free_symbols | self._offsets.free_symbols)
        ):
            return None
        if found in self.numbers.values():
            return None
        return self._hints.get(self._hint(size))  # type: ignore[return-value]

    def _known(self, size: sympy.Expr) -> Kind | None:
        for kind, known in (("tokens", self._tokens), ("offsets", self._offsets), ("sequences", self._offsets - 1)):
            if sympy.simplify(size - known) == 0:
                return kind  # type: ignore[return-value]
        return None

    def is_of_tokens(self, node: fx.Node) -> bool:
        """Whether a node has a row for each token, and no other size of a batch."""
        kinds = [self.kind(size) for size in shape(node)] if is_tensor(node) else []
        return kinds[:1] == ["tokens"] and not any(kinds[1:])

    @property
    def numbers(self) -> dict[fx.Node, sympy.Expr]:
        """The inputs that are numbers of the caller's, not sizes of tensors."""
        sizes: set[sympy.Symbol] = set()
        for node in self._inputs:
            if isinstance(value(node), Tensor):
                sizes |= symbols_of(value(node))
        scalars = {node: expression(value(node)) for node in self._inputs if is_scalar(node)}
        return {node: found for node, found in scalars.items() if found.free_symbols and not found.free_symbols & sizes}
