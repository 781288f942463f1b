"""A mask read at sampled cells: the captured expressions, with lengths, counts and sizes of our choice."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from hstu_compile.ops.attention_mask import attention_mask
from hstu_compile.passes.index_space import IndexSpace
from hstu_compile.passes.index_space_views import ZERO, Coords, NotUnderstood
from hstu_compile.passes.mask_inputs import Expression
from hstu_compile.passes.mask_meaning import MaskTerm, Padding, silu_of_fill_is_zero
from hstu_compile.passes.mask_samples import Counts, Samples, leaf_of, sample, sample_counts
from hstu_compile.passes.report import spoken

Roles = dict[fx.Node, str]  # what an input holds: "lengths", "offsets", "targets", "contextual"


@dataclass(frozen=True)
class Region:
    """The masks of one attention, and what the scores are that they act on (see `identify`)."""

    terms: Sequence[MaskTerm]
    batch_size: int | torch.SymInt
    num_heads: int | torch.SymInt
    max_seq_len: int | torch.SymInt
    seq_offsets: fx.Node | None
    padding_matters: bool


@dataclass(frozen=True)
class Observed:
    """Whether the mask is live at the sampled cells, and whether that can be seen in the result: [P, R, C] both."""

    live: Tensor
    matters: Tensor


@dataclass(frozen=True)
class Reading:
    """A region's masks under one choice of sizes, with the inputs in some roles."""

    region: Region
    expression: Expression
    symbols: dict[sympy.Symbol, int]
    roles: Roles
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    @cached_property
    def sizes(self) -> IndexSpace:
        return IndexSpace(self.symbols, {}, rank=3)

    @property
    def length(self) -> int:
        return self.sizes.scalar(self.region.max_seq_len)

    def has(self, role: str) -> bool:
        return role in self.roles.values()

    def samples(self, contextual_seq_len: int = 0) -> Samples:
        """Sequences of all kinds, most with room for so many contextual tokens."""
        return self.at(
            sample_counts(
                self.rng,
                self.length,
                varying=self.region.seq_offsets is not None or self.has("lengths"),
                targets=self.has("targets"),
                contextual=self.has("contextual"),
                contextual_seq_len=contextual_seq_len,
            )
        )

    def at(self, counts: list[Counts]) -> Samples:
        """These sequences, each in a batch."""
        batch_size, num_heads = map(self.sizes.scalar, (self.region.batch_size, self.region.num_heads))
        steps = self.expression.numbers
        return sample(self.rng, counts, batch_size=batch_size, num_heads=num_heads, length=self.length, steps=steps)

    def observe(self, samples: Samples) -> Observed:
        ends = samples.lengths.cumsum(1)
        tables = {
            "lengths": samples.lengths,
            "offsets": torch.cat([torch.zeros_like(ends[:, :1]), ends], 1),
            "targets": samples.targets,
            "contextual": samples.contextual,
        }
        space = IndexSpace(
            self.symbols, {node: leaf_of(tables[role], node) for node, role in self.roles.items()}, rank=3
        )
        lengths = samples.of_sequence(samples.lengths)
        if self.region.seq_offsets is not None:
            begin, end = (space.value(self.region.seq_offsets, (samples.batch + k,)) for k in (0, 1))
            if not torch.equal((end - begin).long().expand_as(lengths), lengths):
                raise NotUnderstood(f"the offsets {spoken(self.region.seq_offsets)} don't follow from the lengths")
        matters = torch.tensor(True)
        if not self.region.padding_matters:
            matters = (samples.rows < lengths) & (samples.cols < lengths)
        live = torch.tensor(True)
        for term in self.region.terms:
            live = live & _live(term, space.value(term.node, self._coords(term, samples)), matters)
        cells = torch.broadcast_shapes(lengths.shape, samples.rows.shape, samples.cols.shape)
        return Observed(live.expand(cells), matters.expand(cells))

    def family(
        self, rows: Tensor, cols: Tensor, lengths: Tensor, targets: Tensor, *, padding: Padding, **numbers: Any
    ) -> Tensor:
        """The mask that these numbers give: `attention_mask`, but for the padding."""
        if padding == "dead":
            return attention_mask(rows, cols, lengths, num_targets=targets, **numbers)
        whole = torch.tensor(self.length)
        live = attention_mask(rows, cols, whole, num_targets=whole - lengths + targets, **numbers)
        return live & (cols < lengths) if padding == "dead keys" else live

    def _coords(self, term: MaskTerm, samples: Samples) -> Coords:
        """Where the sampled cells are in the term's own dimensions."""
        region, scalar = self.region, self.sizes.scalar
        sizes = {"b": scalar(region.batch_size), "h": scalar(region.num_heads), "i": self.length, "j": self.length}
        places = {"b": samples.batch, "h": samples.head, "i": samples.rows, "j": samples.cols}
        shape = self.sizes.shape(term.node)
        if len(shape) > len(term.layout):
            raise NotUnderstood(f"it has {len(shape)} dimensions, the scores {len(term.layout)}")
        coords = []
        for size, axes in zip(shape, term.layout[len(term.layout) - len(shape) :], strict=True):
            at, whole = ZERO, 1
            for axis in axes:
                at, whole = at * sizes[axis] + places[axis], whole * sizes[axis]
            if size not in (1, whole):
                raise NotUnderstood(f"its shape {list(shape)} isn't that of the scores")
            coords.append(at if size != 1 else ZERO)
        return tuple(coords)


def _live(term: MaskTerm, value: Tensor, matters: Tensor) -> Tensor:
    if term.role == "adds":
        fills = [fill for fill in value.unique().tolist() if fill and silu_of_fill_is_zero(fill, value.dtype)]
        live, dead = value == 0, torch.isin(value, torch.tensor(fills, dtype=value.dtype))
    else:
        live, dead = (value == 1, value == 0) if term.role == "keeps" else (value == 0, value == 1)
    strange = ~(dead | live) & matters
    if strange.any():
        raise NotUnderstood(
            f"it takes the value {value.expand_as(strange)[strange][0].item()}, neither 0 nor 1, neither dead nor live"
        )
    return live
