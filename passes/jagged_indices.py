"""Jagged [T, ...] <-> padded [B, N, ...], known by what moves where: fbgemm's calls, or indices of the model's own.

A gather or scatter by indices is evaluated for batches of made-up sequences, whose tokens carry marks: it is a change
of layout if every mark is found where it belongs, and 0 where no token is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.contents import assume
from hstu_compile.passes.graph import (
    Size,
    aten,
    copied_before,
    insert_call,
    is_call,
    is_cast,
    is_floating,
    same,
    shape,
    value,
)
from hstu_compile.passes.index_space import IndexSpace, is_scalar, symbol_hints, symbols_of
from hstu_compile.passes.index_space_views import Coords, NotUnderstood
from hstu_compile.passes.jagged import Padded, Unpadded, padded_by_call, unpadded_by_call
from hstu_compile.passes.mask_inputs import UNKNOWN_SIZE, Expression, Symbols, solve
from hstu_compile.passes.mask_samples import leaf_of

BATCHES = 24  # of made-up sequences
PLACES = 64  # looked at, of each
TRIED = ((5, 11, 0.7), (3, 17, 0.4))  # batch size, longest sequence, how full of tokens; where they are free

_GATHERS = {aten.index.Tensor, aten.index_select.default, aten.gather.default}
_SCATTERS = {aten.index_put.default}
_KEEPS = {aten.mul.Tensor, aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar, aten.masked_fill.Tensor}


def as_padded(node: fx.Node) -> Padded | None:
    """What makes a jagged tensor padded, of which the node is the result."""
    return padded_by_call(node) or _padded_by_index(node)


def as_unpadded(node: fx.Node, dense: fx.Node, batch: Size, seq_len: Size) -> Unpadded | None:
    """What makes `dense` jagged again: [batch, seq_len, ...], by index also [batch * seq_len, ...]."""
    return unpadded_by_call(node) or _unpadded_by_index(node, dense, batch, seq_len)


def _padded_by_index(node: fx.Node) -> Padded | None:
    values = _moved(node)
    if values is None or len(shape(node)) != len(shape(values)) + 1:
        return None
    batch, seq_len = shape(node)[:2]
    found = _Change.of(node, values, batch, seq_len, shape(values)[0])
    if found is None or not found.pads():
        return None
    longest, offsets = found.number(seq_len), found.offsets()
    return None if longest is None or offsets is None else Padded(node, values, offsets, longest, padding=0)


def _moved(node: fx.Node) -> fx.Node | None:
    """The floating tensor that is gathered or scattered to make the node, and then kept in places, if that is all."""
    while True:
        if is_call(node, *_GATHERS):
            return node.args[0]  # type: ignore[return-value]
        if is_call(node, *_SCATTERS):
            return node.args[2]  # type: ignore[return-value]
        if not (is_call(node, *_KEEPS, *RESHAPES) or is_cast(node)):
            return None
        sources = [n for n in node.all_input_nodes if is_floating(n) and same(value(n).numel(), value(node).numel())]
        if not sources:
            return None
        node = sources[0]


def _unpadded_by_index(node: fx.Node, dense: fx.Node, batch: Size, seq_len: Size) -> Unpadded | None:
    if not is_call(node, aten.index.Tensor, aten.index_select.default) or node.args[0] is not dense:
        return None
    folded = len(shape(node)) == len(shape(dense))
    found = _Change.of(node, dense, batch, seq_len, shape(node)[0])
    if found is None or not found.unpads(folded) or (offsets := found.offsets()) is None:
        return None

    def again(other: fx.Node, total: int | fx.Node, before: fx.Node) -> fx.Node:
        if folded:
            other = insert_call(node.graph, before, aten.flatten.using_ints, (other, 0, 1), like=before)
        where = fx.map_arg(node.args[1:], lambda index: copied_before(index, before))
        return insert_call(node.graph, before, node.target, (other, *where), dict(node.kwargs), like=before)  # type: ignore

    return Unpadded(node, node, dense, offsets, again)


class _Change:
    """A node that holds what another one holds, read with sequences of our choice."""

    def __init__(self, node: fx.Node, moved: fx.Node, sizes: Sequence[Size], expression: Expression) -> None:
        self.node, self.moved, self.sizes, self.expression = node, moved, sizes, expression
        self._nodes = (*expression.nodes, *expression.leaves)
        self._counts = [leaf for leaf in expression.leaves if leaf is not moved]
        self._offsets = [n for n in self._nodes if expression.is_count(n, 1) and value(n).dim() == 1]

    @classmethod
    def of(cls, node: fx.Node, moved: fx.Node, batch: Size, seq_len: Size, tokens: Size) -> "_Change | None":
        """None where anything but the lengths or offsets of sequences decides what moves."""
        try:
            expression = Expression([node], batch, {moved}, extra=1)
        except NotUnderstood:
            return None
        change = cls(node, moved, (batch, seq_len, tokens), expression)
        nothing = any(same(size, 0) for size in (batch, seq_len))
        return change if len(change._counts) == 1 and not nothing else None

    def offsets(self) -> fx.Node | None:
        """The node that holds them, which is relied on from here on."""
        for buffer in self.expression.buffers if self._offsets else ():
            assume(buffer)
        return next(iter(self._offsets), None)

    def number(self, size: Size) -> int | fx.Node | None:
        """A size, or the node that holds it."""
        numbers = (n for n in self.expression.nodes if is_scalar(n) and same(value(n), size))
        return size if isinstance(size, int) else next(numbers, None)

    def pads(self) -> bool:
        """Whether [b, n] holds token n of sequence b, and 0 from its end on."""
        return all(map(self._pads, self._tried()))

    def unpads(self, folded: bool) -> bool:
        """Whether [t] holds what [b, n], or [b * N + n], holds for token n of sequence b, which is t of all."""
        return all(self._unpads(symbols, folded) for symbols in self._tried())

    def _pads(self, symbols: Symbols) -> bool:
        made = self._made(symbols)
        if made is None:
            return False
        b, n = made.some(made.batch), made.some(made.seq_len)
        begin, end = made.offset(b), made.offset(b + 1)
        rest = self._features(shape(self.node)[2:], symbols)
        expected = torch.where(n < end - begin, _mark(begin + n, *rest), 0.0)
        return self._gives(expected, (b, n, *rest), made, symbols, _mark)

    def _unpads(self, symbols: Symbols, folded: bool) -> bool:
        made = self._made(symbols)
        if made is None or made.tokens == 0:
            return False
        t = made.some(made.tokens)
        b = torch.searchsorted(made.offsets, t[..., 0], right=True)[..., None] - 1
        rest = self._features(shape(self.node)[1:], symbols)

        def mark(first: Tensor, *others: Tensor) -> Tensor:
            return _mark(first // made.seq_len, first % made.seq_len, *others) if folded else _mark(first, *others)

        return self._gives(_mark(b, t - made.offset(b), *rest), (t, *rest), made, symbols, mark)

    def _tried(self) -> list[Symbols]:
        """Values for the symbols of all sizes."""
        symbols = set[Any]().union(*(symbols_of(n.meta.get("val")) for n in self._nodes), *map(symbols_of, self.sizes))
        hints = symbol_hints(self.node.graph)
        tried: list[Symbols] = []
        batch, seq_len, tokens = self.sizes
        given = tokens if isinstance(tokens, int) else 0
        for sequences, longest, full in TRIED:
            chosen = {symbol: hints.get(symbol, UNKNOWN_SIZE) for symbol in symbols}
            # Sizes that are fixed may be any: the others give place to as many tokens.
            chosen |= solve(batch, sequences, chosen)
            chosen |= solve(seq_len, max(longest, math.ceil(given / full / _number(batch, chosen))), chosen)
            chosen |= solve(batch, max(sequences, math.ceil(given / full / _number(seq_len, chosen))), chosen)
            chosen |= solve(tokens, max(1, int(full * _number(batch, chosen) * _number(seq_len, chosen))), chosen)
            tried += [chosen] * (chosen not in tried)
        return tried

    def _made(self, symbols: Symbols) -> "_Sequences | None":
        return _Sequences.make(*IndexSpace(symbols, {}, rank=3).sizes(self.sizes))

    def _features(self, sizes: Sequence[Size], symbols: Symbols) -> list[Tensor]:
        """Some places of the dimensions that stay."""
        dice = torch.Generator().manual_seed(len(sizes))
        known = IndexSpace(symbols, {}, rank=3).sizes(sizes)
        return [torch.randint(max(size, 1), (1, 1, 4), generator=dice) for size in known]

    def _gives(
        self, expected: Tensor, coords: Coords, made: "_Sequences", symbols: Symbols, mark: Callable[..., Tensor]
    ) -> bool:
        """Whether the node holds that; candidates for offsets that are none are dropped."""
        (count,) = self._counts
        table = made.offsets.diff(dim=1) if self.expression.is_count(count) else made.offsets
        space = IndexSpace(symbols, {self.moved: lambda at: mark(*at), count: leaf_of(table, count)}, rank=3)
        each = (torch.arange(made.batch + 1).view(1, 1, -1),)
        try:
            given = space.value(self.node, coords)
            read = {n: space.value(n, each).expand(BATCHES, 1, -1)[:, 0] for n in self._offsets}
        except NotUnderstood:
            return False
        self._offsets = [n for n, found in read.items() if torch.equal(found.long(), made.offsets)]
        both = torch.broadcast_tensors(given.double(), expected.double())
        return torch.equal(*both)


@dataclass(frozen=True)
class _Sequences:
    """BATCHES times so many tokens in sequences; offsets [BATCHES, batch + 1]."""

    batch: int
    seq_len: int
    tokens: int
    offsets: Tensor
    dice: torch.Generator

    @classmethod
    def make(cls, batch: int, seq_len: int, tokens: int) -> "_Sequences | None":
        """None where that many tokens don't fit."""
        if tokens > batch * seq_len or batch == 0:
            return None
        dice = torch.Generator().manual_seed(0)
        # Each token takes a place in a sequence; sequences attract them differently, so that lengths do differ.
        attraction = torch.rand(BATCHES, batch, generator=dice) ** 4 + 1e-6
        places = attraction.repeat_interleave(seq_len, 1)
        chosen = torch.rand(places.shape, generator=dice).log_().div_(places).topk(tokens).indices // seq_len
        lengths = torch.zeros(BATCHES, batch, dtype=torch.int64).scatter_add_(1, chosen, torch.ones_like(chosen))
        return cls(batch, seq_len, tokens, F.pad(lengths.cumsum(1), (1, 0)), dice)

    def some(self, size: int) -> Tensor:
        """[BATCHES, PLACES, 1] below a size."""
        return torch.randint(size, (BATCHES, PLACES, 1), generator=self.dice)

    def offset(self, b: Tensor) -> Tensor:
        """Of sequence b [BATCHES, PLACES, 1]."""
        return self.offsets.gather(1, b[..., 0])[..., None]


def _number(size: Size, symbols: Symbols) -> int:
    return IndexSpace(symbols, {}, rank=3).scalar(size)


def _mark(*at: Tensor) -> Tensor:
    """What a token holds: a number that every floating dtype has."""
    mixed = sum(c * prime for c, prime in zip(at, (7919, 104_729, 1_299_709, 611_953, 15_485_863), strict=False))
    return (torch.as_tensor(mixed) % 127 - 63) / 4
