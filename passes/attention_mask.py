"""Which member of the mask family a captured mask is, decided by what it evaluates to, not by how it is written.

The mask's expression is read at many rows and columns of many batches, whose lengths and counts are ours to choose. The
edges seen there suggest the parameters, and the family's own formula with these must agree with every cell.
"""

import itertools
import weakref
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from hstu_compile.passes.alike import Alike
from hstu_compile.passes.contents import assume
from hstu_compile.passes.index_space_views import NotUnderstood
from hstu_compile.passes.mask_fit import Parameters, difference, fit
from hstu_compile.passes.mask_inputs import Expression, Symbols, assignments
from hstu_compile.passes.mask_meaning import MaskMeaning, MaskTerm, Opaque, Scalar, silu_of_fill_is_zero
from hstu_compile.passes.mask_reading import Reading, Region, Roles
from hstu_compile.passes.mask_samples import all_cells
from hstu_compile.passes.report import spoken

__all__ = ["MaskMeaning", "MaskTerm", "Opaque", "Scalar", "identify", "silu_of_fill_is_zero"]

ROLES = ("targets", "contextual", "lengths")
FAMILY = "leave it as it is; known are causal or full, padding, a window, contextual rows, targets, and these together"
LONGEST_TABLE = 2048  # a mask made from a constant tensor is compared cell by cell up to this length


def identify(
    terms: Sequence[MaskTerm],
    *,
    batch_size: int | torch.SymInt,
    num_heads: int | torch.SymInt,
    max_seq_len: int | torch.SymInt,
    seq_offsets: fx.Node | None,
    padding_matters: bool,
) -> MaskMeaning | Opaque:
    """Find the member of the mask family that equals the product of `terms`.

    batch_size, num_heads, max_seq_len: sizes of the scores (ints or SymInts, as in `meta["val"].shape`).
    seq_offsets: the [B + 1] offsets of a jagged region, None for a dense one.
    padding_matters: False where cells with row or column >= length can't be seen in the result (a jagged region);
        True compares all max_seq_len x max_seq_len cells with what the op does there.
    No terms: every cell is live.

    Values are computed here: not to be called under a FakeTensorMode.
    Equal means: wherever 0 <= contextual and 0 <= targets <= length, also where both don't fit into the length.
    """
    if not terms:
        return MaskMeaning(causal=False)
    region = Region(terms, batch_size, num_heads, max_seq_len, seq_offsets, padding_matters)
    known = _known.setdefault(terms[0].node.graph, _Known())
    key = known.key(region)
    if key not in known.meanings:
        known.meanings[key] = _read(region)
    return known.meanings[key]


class _Known:
    """What masks of a graph mean: its layers have the same one, each in a view of its own."""

    def __init__(self) -> None:
        self.meanings: dict[Hashable, MaskMeaning | Opaque] = {}
        self._alike = Alike()

    def key(self, region: Region) -> Hashable:
        terms = tuple((self._alike.number(term.node), term.layout, term.role) for term in region.terms)
        sizes = map(str, (region.batch_size, region.num_heads, region.max_seq_len))
        return terms, *sizes, region.seq_offsets, region.padding_matters


_known: weakref.WeakKeyDictionary[fx.Graph, _Known] = weakref.WeakKeyDictionary()


def _read(region: Region) -> MaskMeaning | Opaque:
    # What is evaluated here is small, and must not go where the model's tensors go.
    with torch.no_grad(), torch.device("cpu"):
        try:
            return _identify(region)
        except NotUnderstood as error:
            return Opaque(str(error))


def _identify(region: Region) -> MaskMeaning | Opaque:
    """Try the inputs in all roles that they may have."""
    known = _offsets_role(region)
    expression = Expression([term.node for term in region.terms], region.batch_size, known)
    free = [leaf for leaf in expression.leaves if leaf not in known]
    if len(free) > len(ROLES):
        return Opaque(
            f"it reads {len(free)} counts a sequence, {', '.join(map(spoken, free))}, and at most {len(ROLES)} fit"
        )
    sizes = _sizes(region, expression, known | dict(zip(free, ROLES, strict=False)))
    # A jagged region's lengths are known from its offsets: other lengths come last there, first in a dense one.
    jagged = region.seq_offsets is not None
    orders = sorted(itertools.permutations(ROLES, len(free)), key=lambda names: ("lengths" in names) == jagged)
    trials = [
        dict(zip(places, names, strict=True))
        for names in orders
        for places in itertools.product(*map(expression.cuts, free))
    ]
    near = []
    for trial in trials:
        search = _Search(region, expression, known | trial, sizes)
        found = search.run()
        if isinstance(found, Parameters):
            for buffer in expression.buffers:
                assume(buffer)
            return _meaning(region, trial, found)
        near.append((found, search))
    closest, search = max(near, key=lambda pair: pair[0].cells)
    return Opaque(search.mismatch(closest.parameters), FAMILY)


def _sizes(region: Region, expression: Expression, roles: Roles) -> list[Symbols]:
    """Sizes to read the masks with: no longer than the buffers that they are cut from, and up to their very end."""

    def choice(longest: int | None = None) -> list[Symbols]:
        return assignments(expression, region.batch_size, region.max_seq_len, region.num_heads, longest)

    def can_be_read(longest: int | None = None) -> bool:
        reading = Reading(region, expression, choice(longest)[0], roles)
        try:
            reading.observe(reading.samples())
        except NotUnderstood:
            return False
        return True

    if expression.buffers and not can_be_read():
        ends = {size for buffer in expression.buffers for size in buffer.meta["val"].shape}
        for end in sorted(ends, reverse=True):
            if end > 1 and can_be_read(end) and not can_be_read(end + 1):
                return choice(end)
    return choice()


def _offsets_role(region: Region) -> Roles:
    """The input from which a jagged region's offsets follow: its lengths, or the offsets themselves."""
    if region.seq_offsets is None:
        return {}
    try:
        expression = Expression([region.seq_offsets], region.batch_size, {}, extra=1)
    except NotUnderstood:
        return {region.seq_offsets: "offsets"}
    if len(expression.leaves) != 1:
        return {region.seq_offsets: "offsets"}
    for buffer in expression.buffers:
        assume(buffer)
    (leaf,) = expression.leaves
    return {leaf: "lengths" if expression.is_count(leaf) else "offsets"}


def _meaning(region: Region, trial: Roles, found: Parameters) -> MaskMeaning | Opaque:
    inputs = {role: node for node, role in trial.items()}
    if region.seq_offsets is not None and "lengths" in inputs:
        return Opaque(
            f"it takes {spoken(inputs['lengths'])} for the lengths, which doesn't follow from the region's offsets, "
            f"{spoken(region.seq_offsets)}"
        )
    return MaskMeaning(
        seq_lengths=inputs.get("lengths"),
        num_targets=inputs.get("targets"),
        num_contextuals=inputs.get("contextual"),
        **vars(found),
    )


@dataclass(frozen=True)
class _Near:
    """The parameters that agreed with the most cells."""

    parameters: Parameters
    cells: int


@dataclass(frozen=True)
class _Search:
    """For parameters, with the inputs in given roles."""

    region: Region
    expression: Expression
    roles: Roles
    sizes: list[Symbols]

    def run(self) -> Parameters | _Near:
        sieved = fit(self._reading(self.sizes[0]))
        if sieved.all_agree:
            for candidate in itertools.islice(itertools.chain(*map(self._with_nodes, sieved.parameters)), 16):
                if not any(self._differences(candidate)):
                    return candidate
        return _Near(sieved.parameters[0], sieved.cells)

    def mismatch(self, parameters: Parameters) -> str:
        cell = next(filter(None, self._differences(parameters)), "not everywhere")
        return f"it has no closed form: closest is {parameters.words}, but {cell}"

    def _reading(self, symbols: Symbols) -> Reading:
        return Reading(self.region, self.expression, symbols, self.roles)

    def _with_nodes(self, parameters: Parameters) -> Iterator[Parameters]:
        """The parameters as ints, and with the graph's own sizes that have these values."""
        sizes = self._reading(self.sizes[0]).sizes
        choices = {
            name: [value, *(node for node in self.expression.scalars if value > 0 and sizes.scalar(node) == value)]
            for name, value in vars(parameters).items()
            if not isinstance(value, (bool, str))
        }
        for chosen in itertools.product(*choices.values()):
            yield replace(parameters, **dict(zip(choices, chosen, strict=True)))

    def _differences(self, parameters: Parameters) -> Iterator[str | None]:
        for symbols in self.sizes:
            reading = self._reading(symbols)
            contextual_seq_len = reading.sizes.scalar(parameters.contextual_seq_len)
            if contextual_seq_len <= reading.length:
                yield difference(reading, parameters, reading.samples(contextual_seq_len))
                if self.expression.has_table:
                    yield self._whole_difference(reading, parameters)

    def _whole_difference(self, reading: Reading, parameters: Parameters) -> str | None:
        """Of all cells of one sequence: in a constant tensor anything may be anywhere."""
        n = reading.length
        if n > LONGEST_TABLE:
            raise NotUnderstood(f"it reads a constant tensor, and {n} positions are too many to compare them all")
        return difference(reading, parameters, all_cells(reading.at([(n, 0, 0)]), torch.arange(n), torch.arange(n)))
