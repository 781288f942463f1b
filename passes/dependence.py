"""What a tensor of the graph depends on: its expression is evaluated with inputs that nothing else could give.

Every input's value at a coordinate is a number of its own, so that two cells agree only where they read the same.
"""

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from hstu_compile.passes.bias_terms import Cell, Term
from hstu_compile.passes.graph import aten, is_call, is_floating, is_tensor, number, value
from hstu_compile.passes.index_space import IndexSpace, arguments, is_understood, op_name, operands
from hstu_compile.passes.index_space_ops import VIEWS, ZERO, Coords
from hstu_compile.passes.mask_inputs import Expression, assignments

ALL_CELLS = 1 << 22  # up to so many all cells of a table are looked at
ROWS = 64  # of a sequence, where a sample will do
RANGES = ((0.25, 1.75), (-1.0, 1.0), None)  # of floating-point inputs, one after the other; None: `spread`
LARGEST = 1 << 40  # of whole-number inputs
# What only moves numbers, or gives other ones for others.
KEEPING = {
    *VIEWS,
    *("pad", "constant_pad_nd", "cat", "concat", "concatenate", "stack", "where", "masked_fill"),
    *("index", "index_select", "embedding", "gather", "add", "sub", "subtract", "rsub", "mul", "multiply"),
    *("div", "divide", "true_divide", "neg", "negative", "tanh", "sigmoid", "exp"),
}


class _Unread:
    """Nodes at which an expression ends: inputs, and what is not understood."""

    def __init__(self, cut: Collection[fx.Node]) -> None:
        self._cut = cut

    def __contains__(self, node: object) -> bool:
        assert isinstance(node, fx.Node)
        if node in self._cut or not is_understood(node):
            return True
        return node.op == "get_attr" and is_floating(node) and number(node) is None


def expression(term: Term, *more: fx.Node, cut: Collection[fx.Node] = ()) -> Expression:
    """The part of the graph that computes a term (and more); it ends at `cut`, and wherever it can't be followed."""
    batch = term.sizes["b"]
    return Expression([term.node, *more], batch, _Unread({*cut, *followed(term.node, batch)[1]}))


def followed(root: fx.Node, batch: Any) -> tuple[set[fx.Node], set[fx.Node]]:
    """The calls through which a term's numbers come from inputs, and those at which they can't be followed further:
    a function in which they may get lost, as one that saturates does, or one with a gradient of its own."""
    through, ends = set[fx.Node](), set[fx.Node]()
    unread, seen, todo = _Unread(()), {root}, [root]
    while todo:
        node = todo.pop()
        if not is_floating(node) or node in unread:
            continue
        if (op_name(node) in KEEPING and not _has_own_gradient(node)) or node.target is operator.getitem:
            through.add(node)
            new = [operand for operand in operands(node) if operand not in seen]
            seen.update(new)
            todo += new
        elif Expression([node], batch, unread).leaves:
            ends.add(node)
    return through, ends


def _has_own_gradient(node: fx.Node) -> bool:
    """Whether the gradient is not that of the same numbers read one by one."""
    if is_call(node, aten.embedding.default):
        named = arguments(node)
        return named["padding_idx"] != -1 or named["scale_grad_by_freq"] or named["sparse"]
    return is_call(node, aten.detach.default, aten.detach_.default)


def data(term: Term, read: Expression) -> list[fx.Node]:
    """The inputs from which whole numbers and truth values are computed: which they are is not known."""
    whole_numbers = [node for node in (*read.nodes, *read.leaves) if is_tensor(node) and not is_floating(node)]
    inside = Expression(whole_numbers, term.sizes["b"], _Unread(set(read.leaves))) if whole_numbers else None
    return [leaf for leaf in inside.leaves if is_tensor(leaf)] if inside is not None else []


def assigned(term: Term, read: Expression) -> list[dict[sympy.Symbol, int]]:
    """Sizes to evaluate the term with."""
    sizes = term.sizes
    return assignments(read, sizes["b"], sizes["i"], sizes["h"])


def distinct(node: fx.Node, draw: int, seed: int) -> Callable[[Coords], Tensor]:
    """An input whose value at every coordinate is another one."""
    floating = is_floating(node)

    def leaf(coords: Coords) -> Tensor:
        if not floating or RANGES[draw] is None:
            return spread(coords, seed).to(torch.float64 if floating else value(node).dtype)
        low, high = RANGES[draw]  # type: ignore[misc]
        return _bits(coords, seed).remainder(1 << 32).double() / (1 << 32) * (high - low) + low

    return leaf


def spread(coords: Coords, seed: int) -> Tensor:
    """Whole numbers of either sign and of all orders of magnitude, the same for the same coordinates."""
    bits = _bits(coords, seed)
    size = bits.remainder(LARGEST) >> (bits >> 20).remainder(LARGEST.bit_length())
    return torch.where(bits % 2 == 0, size, -size)


def _bits(coords: Coords, seed: int) -> Tensor:
    mixed = torch.full((), seed * 7919 + 12345, dtype=torch.int64)
    for coord in coords:
        mixed = (mixed ^ (coord + 0x9E3779B9)) * 0x5851F42D4C957F2D
        mixed = mixed ^ (mixed >> 29)
    return (mixed * 0x2545F4914F6CDD1D) >> 16


class Invented(IndexSpace):
    """The index space of a term whose inputs are `distinct`; floating-point values are computed in float64."""

    def __init__(
        self,
        read: Expression,
        symbols: Mapping[sympy.Symbol, int],
        draw: int = 0,
        given: Mapping[fx.Node, Callable[[Coords], Tensor]] | None = None,
    ) -> None:
        leaves = {node: distinct(node, draw, seed) for seed, node in enumerate(read.leaves)}
        super().__init__(symbols, {**leaves, **(given or {})}, rank=2)

    def held(self, node: fx.Node, value: Tensor) -> Tensor:
        return value.double() if is_floating(node) else super().held(node, value)


def scattered(space: IndexSpace, term: Term, dice: torch.Generator, *, all_cells: bool) -> list[dict[str, Tensor]]:
    """Cells [R, 1] x [1, C] of random sequences and heads: all of a sequence in portions, or some rows and columns."""
    size = {axis: space.scalar(term.sizes[axis]) for axis in "bhij"}
    n = size["i"]
    if all_cells:
        picked = torch.arange(n) if n * n <= ALL_CELLS else some(n, ALL_CELLS // n, dice)
        portions, columns = picked.split(max(1, (ALL_CELLS >> 2) // n)), torch.arange(n)
    else:
        portions, columns = (some(n, ROWS, dice),), some(n, ROWS, dice)
    cells = []
    for rows in portions:
        cell = {axis: torch.randint(size[axis], (len(rows), 1), generator=dice) for axis in "bh"}
        cells.append(cell | {"i": rows.view(-1, 1), "j": columns.view(1, -1)})
    return cells


def some(n: int, count: int, dice: torch.Generator) -> Tensor:
    """The first and last few of 0..n-1, and others at random."""
    edges = torch.tensor([0, 1, 2, 3, n // 2, n - 4, n - 3, n - 2, n - 1]).clamp(0, n - 1)
    return torch.cat([edges, torch.randint(n, (count,), generator=dice)]).unique()


def first_difference(a: Tensor, b: Tensor, cell: Cell) -> tuple[int, int] | None:
    """The row and column of the first cell in which two terms are not the same."""
    same = (a == b) | (a.isnan() & b.isnan())
    shape = torch.broadcast_shapes(cell["i"].shape, cell["j"].shape)
    wrong = (~same).expand(shape).nonzero()
    if not len(wrong):
        return None
    at = tuple(wrong[0].tolist())
    return int(cell["i"].expand(shape)[at]), int(cell["j"].expand(shape)[at])


def reads_only(term: Term, node: fx.Node) -> str | None:
    """Why a term is no function of its head and of one value of `node` for each cell; None if it is."""
    read, dice = expression(term, cut={node}), torch.Generator().manual_seed(0)
    if node not in read.leaves:
        return f"{node.name} is not read"
    others = [leaf for leaf in data(term, read) if leaf is not node]
    if others:
        return f"beside {node.name} it reads {others[0].name}"
    for symbols in assigned(term, read):
        for draw in range(len(RANGES)):
            places: list[Coords] = []

            def seen(coords: Coords, places: list[Coords] = places, draw: int = draw) -> Tensor:
                places.append(coords)
                return spread(coords, draw).to(_dtype(node))

            space = Invented(read, symbols, draw, {node: seen})
            for cell in scattered(space, term, dice, all_cells=False):
                places.clear()
                found = term.value(space, cell)
                if any(not _same_place(at, places[0]) for at in places):
                    return f"it reads {node.name} at several places for one cell"
                held = spread(places[0], draw).to(_dtype(node))
                alone = Invented(read, symbols, draw, {node: _always(held)})
                at = first_difference(found, term.value(alone, {**dict.fromkeys("bij", ZERO), "h": cell["h"]}), cell)
                if at is not None:
                    return f"at row {at[0]}, column {at[1]} it depends on more than {node.name}"
    return None


def _dtype(node: fx.Node) -> torch.dtype:
    return torch.float64 if is_floating(node) else value(node).dtype


def _always(held: Tensor) -> Callable[[Coords], Tensor]:
    return lambda coords: held


def _same_place(a: Coords, b: Coords) -> bool:
    return all(x is y or torch.equal(*torch.broadcast_tensors(x, y)) for x, y in zip(a, b, strict=True))
