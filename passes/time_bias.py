"""Terms of the bias that look up a table by a step function of the time between row and column.

    term[b, h, i, j] = table[h, bucket(row_times[b, i] - col_times[b, j])]

The difference and the index of the lookup are found in the term's expression by what depends on them: nothing but the
table may reach the term beside the index, nor anything but numbers the index beside the difference. Then the bucket is
asked for its steps (`steps`), and the table read once for each.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hstu_compile.passes.attention_scores import SUBTRACT
from hstu_compile.passes.bias_terms import Cell, Term, whole
from hstu_compile.passes.dependence import (
    RANGES,
    Invented,
    assigned,
    expression,
    first_difference,
    reads_only,
    scattered,
)
from hstu_compile.passes.graph import argument, insert_constant, is_call, is_tensor, shape, value
from hstu_compile.passes.index_space import IndexSpace, symbols_of
from hstu_compile.passes.index_space_ops import ZERO, Coords, NotUnderstood, broadcast_coords
from hstu_compile.passes.position_bias import heads_of
from hstu_compile.passes.relocate import MakeSpace, relocated
from hstu_compile.passes.steps import DTYPES, Steps, steps
from hstu_compile.passes.table_lookup import Lookup, as_lookup


@dataclass(frozen=True)
class Difference:
    """row(b, i) - col(b, j), or its negative."""

    node: fx.Node
    row: fx.Node
    col: fx.Node
    negated: bool
    by_batch: bool


@dataclass(frozen=True)
class TimeTerm:
    """A term that is a table, looked up by a step function of a difference."""

    term: Term
    lookup: Lookup
    difference: Difference
    steps: Steps
    row_times: fx.Node  # [B|1, N], as col_times
    col_times: fx.Node

    def goes_with(self, other: "TimeTerm") -> bool:
        """Whether one call of the op can take both."""
        mine, others = self.difference, other.difference
        same = (mine.row, mine.col) == (others.row, others.col)
        return same and self.steps.symmetric == other.steps.symmetric


def read(term: Term, before: fx.Node) -> TimeTerm:
    """The term as a bias by time. Raises NotUnderstood: it is none, and why."""
    whole_term = expression(term)
    lookup = _lookup(term, [found for node in whole_term.nodes if (found := as_lookup(node)) is not None])
    index = expression(replace(term, node=lookup.index))
    difference = _difference(term, list(index.nodes))
    device, dtype = value(difference.node).device, value(difference.node).dtype
    if device != value(before).device:
        raise NotUnderstood(f"the times are on {device}")

    symbols = assigned(term, whole_term)[0]

    def at(differences: Tensor) -> Tensor:
        given = -differences if difference.negated else differences
        space = _OfNumbers(symbols, {difference.node: lambda coords: given}, rank=1)
        found = space.value(lookup.index, (ZERO,) * len(shape(lookup.index)))
        return found.expand(differences.shape).long()

    try:
        with torch.device(device):
            bucketed = steps(at, dtype, device)
    except (RuntimeError, AssertionError) as error:  # there may be no such device where the graph is compiled
        raise NotUnderstood(f"its bucket can't be evaluated on {device}: {error}") from error
    rows, columns = (
        _times(term, difference, part, axis, before) for part, axis in ((difference.row, "i"), (difference.col, "j"))
    )
    return TimeTerm(term, lookup, difference, bucketed, rows, columns)


def _times(term: Term, difference: Difference, part: fx.Node, axis: str, before: fx.Node) -> fx.Node:
    """[B|1, N], an operand of the difference, in its dtype."""
    node, by_batch = difference.node, difference.by_batch
    inside, device, dtype = expression(term, part, cut={node}), value(part).device, value(node).dtype

    def build(space: MakeSpace, given: Sequence[Tensor]) -> Tensor:
        here = space({})
        sizes = here.scalar(term.sizes["b"]) if by_batch else 1, here.scalar(term.sizes["i"])
        cell = {**dict.fromkeys("bhij", ZERO), axis: whole(sizes[1], 1, 2, device)}
        if by_batch:
            cell["b"] = whole(sizes[0], 0, 2, device)
        return _operand(term, node, part, here, space, cell).detach().to(dtype).expand(sizes)

    return relocated(inside, (), build, device, before, part)


def _operand(
    term: Term, node: fx.Node, part: fx.Node, inside: IndexSpace, around: Callable[..., IndexSpace], cell: Cell
) -> Tensor:
    """An operand of the difference `node`, where the term reads it for a cell."""
    places: list[Coords] = []

    def seen(coords: Coords) -> Tensor:
        places.append(coords)
        return torch.zeros((), dtype=value(node).dtype)

    term.value(around({node: seen}), cell)
    return inside.value(part, broadcast_coords(inside.shape(part), places[0]))


def boundaries(found: Sequence[TimeTerm]) -> Tensor:
    """Where any of these terms steps."""
    return torch.cat([term.steps.boundaries for term in found]).unique()


def table(found: TimeTerm, boundaries: Tensor, before: fx.Node) -> fx.Node:
    """[H|1, K + 1]: the term in each bucket. NaN where the code as written stops, its index being out of the table."""
    term, lookup = found.term, found.lookup
    least = -lookup.entries if lookup.may_be_negative else 0
    known = found.steps.values_between(boundaries)
    inside = (known >= least) & (known < lookup.entries)
    index = insert_constant(before, torch.where(inside, known, 0).to(value(lookup.index).dtype).view(1, -1))
    fits = () if inside.all() else (insert_constant(before, inside.view(1, -1)),)

    def build(space: MakeSpace, given: Sequence[Tensor]) -> Tensor:
        heads, cell = space({}).scalar(heads_of(term)), dict.fromkeys("bhij", ZERO)
        if heads is not None:
            cell["h"] = whole(heads, 0, 2, given[0].device)
        result = term.value(space({lookup.index: lambda coords: given[0]}), cell)
        for valid in given[1:]:
            result = torch.where(valid, result, float("nan"))
        return result.expand(1 if heads is None else heads, len(known))

    inside_term = expression(term, cut={lookup.index})
    return relocated(inside_term, (index, *fits), build, value(term.node).device, before, term.node)


class _OfNumbers(IndexSpace):
    """The index space in which shapes are known, and no size may be read as a number."""

    def sizes(self, shape: Iterable[Any]) -> tuple[int, ...]:
        return tuple(super(_OfNumbers, self).scalar(size) for size in shape)

    def scalar(self, value: Any) -> Any:
        if symbols_of(value.meta.get("val") if isinstance(value, fx.Node) else value):
            raise NotUnderstood("its bucket depends on a size")
        return super().scalar(value)


def _lookup(term: Term, found: Sequence[Lookup]) -> Lookup:
    """The one lookup through which the term depends on its cell."""
    reason = "it is no lookup in a table"
    for lookup in found:
        misfit = reads_only(term, lookup.index)
        if misfit is None and not isinstance(lookup.entries, int):
            misfit = f"the table {lookup.table.name} has a size that is not known"
        if misfit is None:
            return lookup
        reason = misfit
    raise NotUnderstood(reason)


def _difference(term: Term, nodes: Sequence[fx.Node]) -> Difference:
    reason = "its index is no function of a difference"
    for node in nodes:
        if not is_call(node, *SUBTRACT) or not all(map(is_tensor, node.args[:2])) or value(node).dtype not in DTYPES:
            continue
        if argument(node, 2, "alpha", 1) != 1:
            continue
        misfit = reads_only(term, node)
        if misfit is not None:
            reason = misfit
            continue
        found = _by_row_and_column(term, node)
        if found is not None:
            return found
        reason = f"{node.name} is no difference of a row and a column"
    raise NotUnderstood(reason)


def _by_row_and_column(term: Term, node: fx.Node) -> Difference | None:
    first, second = node.args[:2]
    assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
    moves = [{axis for axis in "bij" if _moves_with(term, node, part, axis)} for part in (first, second)]
    batch = "b" in moves[0] | moves[1]
    if "j" not in moves[0] and "i" not in moves[1]:
        return Difference(node, first, second, negated=False, by_batch=batch)
    if "i" not in moves[0] and "j" not in moves[1]:
        return Difference(node, second, first, negated=True, by_batch=batch)
    return None


def _moves_with(term: Term, node: fx.Node, part: fx.Node, axis: str) -> bool:
    """Whether an operand of a difference is another one in another row, column or sequence."""
    inside, dice = expression(replace(term, node=part)), torch.Generator().manual_seed(0)
    around = expression(term, cut={node})
    for symbols, draw in itertools.product(assigned(term, around), range(len(RANGES))):
        makes = partial(Invented, around, symbols, draw)
        for cell in scattered(makes(), term, dice, all_cells=False):
            here, there = (
                _operand(term, node, part, Invented(inside, symbols, draw), makes, at)
                for at in (cell, {**cell, axis: ZERO})
            )
            if first_difference(here, there, cell) is not None:
                return True
    return False
