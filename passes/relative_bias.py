"""The relative bias of HSTU, a table by position and a table by time, as arguments of the attention op.

The bias is a sum of terms. One that depends on row - column becomes `position_bias`; one that is a step function of
the time between row and column `time_bias`; both are a few numbers, and no [B, N, N] tensor is made. The rest is
summed up as it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from hstu_compile.passes import position_bias, time_bias
from hstu_compile.passes.attention_operands import Layout
from hstu_compile.passes.attention_scores import Bias
from hstu_compile.passes.attention_weights import names
from hstu_compile.passes.bias_terms import Term, split
from hstu_compile.passes.dependence import expression, followed
from hstu_compile.passes.graph import aten, erase_dead, grad_modes, insert_call, insert_constant
from hstu_compile.passes.index_space_ops import NotUnderstood
from hstu_compile.passes.position_bias import heads_of, tables
from hstu_compile.passes.time_bias import TimeTerm

Arguments = tuple[fx.Node | bool | None, ...]


@dataclass
class RelativeBias:
    """The terms of a bias."""

    arguments: Arguments = (None, None, None, None, None, False)  # in the order of the op
    rest: list[Bias] = field(default_factory=list)
    words: list[str] = field(default_factory=list)  # for the report: what each term is


def read(layout: Layout, biases: Sequence[Bias]) -> RelativeBias:
    """What each term of the biases is, and the nodes that hold it."""
    reading = _Reading(layout)
    with torch.no_grad(), torch.device("cpu"):
        for bias in biases:
            for part in split(layout.region, bias):
                reading.place(part)
    return reading.result(list(biases))


class _Reading:
    def __init__(self, layout: Layout) -> None:
        region = layout.region
        batch = 1 if region.batch is None else region.batch.size
        heads = 1 if region.head is None else region.head.size
        self.region, self.before = region, region.before
        self.sizes = {"b": batch, "h": heads, "i": region.row.size, "j": region.column.size}
        self.modes = grad_modes(self.before.graph)
        self.positions: list[tuple[fx.Node, float]] = []  # with what they are multiplied by
        self.times: list[tuple[TimeTerm, fx.Node, float]] = []  # with their tables
        self.rest: list[Bias] = []
        self.words: list[str] = []

    def place(self, part: Bias) -> None:
        """Put a term where it belongs."""
        term = Term(part.node, names(self.region, part.dims), self.sizes)
        reasons = []
        if part.factors:
            reasons.append(f"it is multiplied by {part.factors[0].node.name}")
        elif any(self.modes[node] != self.modes[self.before] for node in followed(part.node, term.sizes["b"])[0]):
            reasons.append("it is computed in another grad mode than the attention")
        for attempt in () if reasons else (self._by_position, self._by_time):
            try:
                self.words.append(attempt(term, part.scale))
                return
            except NotUnderstood as error:
                reasons.append(str(error))
        self.rest.append(part)
        self.words.append(f"bias tensor {part.node.name}: {'; and '.join(reasons)}")

    def _by_position(self, term: Term, scale: float) -> str:
        self.positions.append((position_bias.read(term, self.before), scale))
        return f"position bias from {_tables(term)}"

    def _by_time(self, term: Term, scale: float) -> str:
        found = time_bias.read(term, self.before)
        if self.times and not found.goes_with(self.times[0][0]):
            raise NotUnderstood("it is a second bias by time, of other differences")
        table = time_bias.table(found, found.steps.boundaries, self.before)
        self.times.append((found, table, scale))
        size = "|{}|" if found.steps.symmetric else "{}"
        apart = size.format(found.difference.node.name)
        return f"time bias of {len(found.steps.values)} buckets of {apart} from {_tables(term)}"

    def result(self, biases: list[Bias]) -> RelativeBias:
        if not self.positions and not self.times:
            return RelativeBias(rest=biases, words=self.words)
        before = self.before
        position = _sum(self.positions, before)
        arguments: Arguments = (position, None, None, None, None, False)
        if self.times:
            first, boundaries = self.times[0][0], self.times[0][0].steps.boundaries
            tables = [(table, scale) for _, table, scale in self.times]
            if len(tables) > 1:
                erase_dead(table for table, _ in tables)
                boundaries = time_bias.boundaries([term for term, _, _ in self.times])
                tables = [(time_bias.table(term, boundaries, before), scale) for term, _, scale in self.times]
            arguments = (
                *(position, _sum(tables, before), first.row_times, first.col_times),
                *(insert_constant(before, boundaries), first.steps.symmetric),
            )
        return RelativeBias(arguments, self.rest, self.words)


def _sum(terms: Sequence[tuple[fx.Node, float]], before: fx.Node) -> fx.Node | None:
    result = None
    for node, scale in terms:
        if scale != 1:
            node = insert_call(before.graph, before, aten.mul.Tensor, (node, scale), like=node)
        if result is not None:
            node = insert_call(before.graph, before, aten.add.Tensor, (result, node), like=node)
        result = node
    return result


def _tables(term: Term) -> str:
    shared = ", shared by heads" if heads_of(term) is None else ""
    return tables(expression(term)) + shared
