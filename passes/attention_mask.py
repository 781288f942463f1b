"""Which member of the mask family a captured mask is, decided by what it evaluates to, not by how it is written.

The mask's expression is read at many rows and columns of many batches, whose lengths and counts are ours to choose. The
edges seen there suggest the parameters, and the family's own formula with these must agree with every cell.
"""

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor, fx

from hstu_compile.ops.attention_mask import attention_mask
from hstu_compile.passes.index_space import IndexSpace
from hstu_compile.passes.index_space_ops import Coords, NotUnderstood
from hstu_compile.passes.mask_inputs import Expression, assignments
from hstu_compile.passes.mask_meaning import MaskMeaning, MaskTerm, Opaque, Scalar, silu_of_fill_is_zero
from hstu_compile.passes.mask_samples import Counts, Samples, all_cells, sample, sample_counts

__all__ = ["MaskMeaning", "MaskTerm", "Opaque", "Scalar", "identify", "silu_of_fill_is_zero"]

Symbols = dict[sympy.Symbol, int]
Roles = dict[fx.Node, str]  # which count an input is: "lengths", "offsets", "targets", "contextual"
ROLES = ("targets", "contextual", "lengths")
LARGEST_TABLE = 2048  # the longest mask from a constant tensor that is compared cell by cell


@dataclass(frozen=True)
class _Parameters:
    """The family's numbers, under one choice of sizes or (as SymInt nodes) for all."""

    causal: bool
    contextual_seq_len: Scalar
    max_attn_len: Scalar
    min_full_attn_seq_len: Scalar
    target_group_size: Scalar
    targets_share_position: bool


@dataclass(frozen=True)
class _Observed:
    """What the mask is at the sampled cells (all [P, R, C]); `matters` where that can be seen in the result."""

    live: Tensor
    matters: Tensor


@dataclass(frozen=True)
class _Question:
    terms: Sequence[MaskTerm]
    batch_size: int | torch.SymInt
    num_heads: int | torch.SymInt
    max_seq_len: int | torch.SymInt
    seq_offsets: fx.Node | None
    padding_matters: bool
    expression: Expression
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def samples(
        self, symbols: Symbols, roles: Roles, contextual_seq_len: int = 0, counts: list[Counts] | None = None
    ) -> Samples:
        space = IndexSpace(symbols, {}, rank=3)
        length = space.scalar(self.max_seq_len)
        if counts is None:
            counts = sample_counts(
                self.rng,
                length,
                jagged=self.seq_offsets is not None or "lengths" in roles.values(),
                targets="targets" in roles.values(),
                contextual="contextual" in roles.values(),
                contextual_seq_len=contextual_seq_len,
            )
        sizes = {"batch_size": space.scalar(self.batch_size), "num_heads": space.scalar(self.num_heads)}
        return sample(self.rng, counts, **sizes, length=length, constants=self.expression.numbers())

    def observe(self, symbols: Symbols, roles: Roles, samples: Samples) -> _Observed:
        ends = samples.lengths.cumsum(1)
        tables = {
            "lengths": samples.lengths,
            "offsets": torch.cat([torch.zeros_like(ends[:, :1]), ends], 1),
            "targets": samples.targets,
            "contextual": samples.contextual,
        }
        leaves = {}
        for node, role in roles.items():
            sizes = node.meta["val"].shape
            axis = next((k for k, size in enumerate(sizes) if not isinstance(size, int) or size != 1), 0)
            leaves[node] = samples.leaf(tables[role].to(node.meta["val"].dtype), axis)
        space = IndexSpace(symbols, leaves, rank=3)

        lengths = samples.of_sequence(samples.lengths)
        if self.seq_offsets is not None:
            begin, end = (space.value(self.seq_offsets, (samples.batch + k,)) for k in (0, 1))
            if not torch.equal((end - begin).expand_as(lengths).long(), lengths):
                raise NotUnderstood(f"the offsets {self.seq_offsets.name} don't follow from the lengths")
        cells = torch.broadcast_shapes(lengths.shape, samples.rows.shape, samples.cols.shape)
        matters = torch.ones((), dtype=torch.bool).expand(cells)
        if not self.padding_matters:
            matters = (samples.rows < lengths) & (samples.cols < lengths)
        live = torch.ones((), dtype=torch.bool).expand(cells)
        for term in self.terms:
            live = live & _live(term, space.value(term.node, self._coords(space, term, samples)), matters)
        return _Observed(live, matters)

    def _coords(self, space: IndexSpace, term: MaskTerm, samples: Samples) -> Coords:
        letters = {"b": samples.batch, "h": samples.head, "i": samples.rows, "j": samples.cols}
        length = space.scalar(self.max_seq_len)
        sizes = {"b": space.scalar(self.batch_size), "h": space.scalar(self.num_heads), "i": length, "j": length}
        shape, coords = space.shape(term.node), []
        for size, name in zip(reversed(shape), reversed(term.layout), strict=False):
            at, whole = torch.zeros((), dtype=torch.int64), 1
            for letter in name:
                at, whole = at * sizes[letter] + letters[letter], whole * sizes[letter]
            if size not in (1, whole):
                raise NotUnderstood(f"its shape {list(shape)} isn't that of scores over {'*'.join(name)}")
            coords.append(at if size != 1 else torch.zeros((), dtype=torch.int64))
        if len(shape) > len(term.layout):
            raise NotUnderstood(f"it has {len(shape)} dimensions, the scores {len(term.layout)}")
        return tuple(reversed(coords))


def _live(term: MaskTerm, value: Tensor, matters: Tensor) -> Tensor:
    if value.dtype == torch.bool and term.role != "adds":
        return ~value if term.role == "drops" else value
    if term.role == "adds":
        fills = {fill: fill != 0 and silu_of_fill_is_zero(fill, value.dtype) for fill in value.unique().tolist()}
        dead = torch.isin(value, torch.tensor([fill for fill, zero in fills.items() if zero], dtype=value.dtype))
        live = value == 0
    else:
        dead, live = (value == 0, value == 1) if term.role == "keeps" else (value == 1, value == 0)
    strange = ~(dead | live) & matters
    if strange.any():
        raise NotUnderstood(f"it takes the value {value.expand_as(strange)[strange][0].item()}, neither dead nor live")
    return live


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
    """
    if not terms:
        return MaskMeaning(causal=False)
    # The values read here are small, and must not go where the model's tensors go.
    with torch.no_grad(), torch.device("cpu"):
        try:
            expression = Expression([term.node for term in terms], batch_size)
            question = _Question(terms, batch_size, num_heads, max_seq_len, seq_offsets, padding_matters, expression)
            return _identify(question)
        except NotUnderstood as error:
            return Opaque(str(error))


def _identify(question: _Question) -> MaskMeaning | Opaque:
    """Try the inputs in all roles that they may have."""
    expression, roles = question.expression, _offsets_role(question)
    given = expression.leaves.keys() - roles.keys()
    free = [leaf for leaf in expression.leaves if leaf in given]
    if len(free) > 3:
        return Opaque(f"it reads {len(free)} counts: {', '.join(leaf.name for leaf in free)}")
    graph = question.terms[0].node.graph
    sizes = assignments(graph, expression, question.batch_size, question.max_seq_len, [question.num_heads])
    closest = None
    # A jagged region's lengths are known from its offsets: other lengths come last there, first in a dense one.
    jagged = question.seq_offsets is not None
    for names in sorted(itertools.permutations(ROLES, len(free)), key=lambda names: ("lengths" in names) == jagged):
        for places in itertools.product(*map(expression.cuts, free)):
            trial = roles | dict(zip(places, names, strict=True))
            found = _search(question, sizes, trial)
            if isinstance(found, _Parameters):
                return _meaning(question, trial, roles, found)
            if closest is None or found.cells > closest.cells:
                closest = found
    assert closest is not None
    mismatch = _only_columns(question, sizes, roles, free) or closest.mismatch(question, sizes)
    return Opaque(mismatch)


def _offsets_role(question: _Question) -> Roles:
    """The input from which a jagged region's offsets follow: its lengths, or the offsets themselves."""
    if question.seq_offsets is None:
        return {}
    try:
        expression = Expression([question.seq_offsets], question.batch_size)
        (leaf,) = expression.leaves
        return {leaf: "lengths" if expression.is_count(leaf) else "offsets"}
    except (NotUnderstood, ValueError):
        return {question.seq_offsets: "offsets"}


def _meaning(question: _Question, trial: Roles, given: Roles, found: _Parameters) -> MaskMeaning | Opaque:
    inputs = {role: node for node, role in trial.items() if node not in given}
    if question.seq_offsets is not None and "lengths" in inputs:
        return Opaque(
            f"it takes {inputs['lengths'].name} for the lengths, which doesn't follow from the offsets "
            f"{question.seq_offsets.name} of the region"
        )
    return MaskMeaning(
        causal=found.causal,
        seq_lengths=inputs.get("lengths"),
        num_targets=inputs.get("targets"),
        num_contextuals=inputs.get("contextual"),
        contextual_seq_len=found.contextual_seq_len,
        target_group_size=found.target_group_size,
        max_attn_len=found.max_attn_len,
        min_full_attn_seq_len=found.min_full_attn_seq_len,
        targets_share_position=found.targets_share_position,
    )


@dataclass(frozen=True)
class _Near:
    """The parameters that agreed with the most cells."""

    parameters: _Parameters
    roles: Roles
    cells: int

    def mismatch(self, question: _Question, sizes: list[Symbols]) -> str:
        cell = next(
            filter(None, (_mismatch(question, s, self.roles, self.parameters) for s in sizes)), "not everywhere"
        )
        return f"it is none of the family: closest is {MaskMeaning(**vars(self.parameters)).words}, but {cell}"


def _search(question: _Question, sizes: list[Symbols], roles: Roles) -> _Parameters | _Near:
    """The parameters that fit with inputs in these roles, or those that come near."""
    suggested = _edges(question, sizes[0], roles)
    samples = question.samples(sizes[0], roles)
    observed = question.observe(sizes[0], roles, samples)
    alike, cells, all_agree = _fitting(question, samples, observed, suggested)
    for parameters in alike[:8] if all_agree else ():
        for candidate in _with_nodes(question, sizes[0], parameters):
            if not any(_mismatch(question, symbols, roles, candidate) for symbols in sizes):
                return candidate
    return _Near(alike[0], roles, cells)


def _edges(question: _Question, symbols: Symbols, roles: Roles) -> dict[str, list[int]]:
    """Values for the family's numbers, read off where single rows and columns of the mask change."""
    n = IndexSpace(symbols, {}, rank=3).scalar(question.max_seq_len)

    def changes(counts: Counts, rows: Iterable[int], cols: Iterable[int], along: int) -> Iterable[tuple[int, int]]:
        """(line, place) of the first and last changes along these columns (along=0) or rows (along=1)."""
        picked = [k for k in (rows, cols)[1 - along] if 0 <= k < n]
        cells = all_cells(
            question.samples(symbols, roles, counts=[counts]), *((range(n), picked), (picked, range(n)))[along]
        )
        lines = question.observe(symbols, roles, cells).live.expand(1, len(cells.rows[0]), cells.cols.shape[2])[0]
        for line, values in zip(picked, lines.unbind(1 - along), strict=True):
            places = (values[1:] != values[:-1]).nonzero().flatten().add(1).tolist()
            yield from ((line, place) for place in {*places[:3], *places[-3:]})

    alone, everything = (n, 0, 0), range(n)
    contextual = {place for _, place in changes(alone, everything, [n - 1], along=0)}
    # Without a window, contextual rows of a full mask can't be told from others; then it is one of the numbers.
    numbers = {k for k in question.expression.numbers() if k < n // 4}
    edges: dict[str, set[int]] = {
        "contextual_seq_len": contextual | numbers if "contextual" not in roles.values() else set()
    }
    starts = {0, n // 4, *contextual}
    columns = list(changes(alone, everything, starts, along=0))
    rows = list(changes(alone, [n // 3, n // 2, n - 1], everything, along=1))
    edges["max_attn_len"] = {place - column - 1 for column, place in columns} | {row - place for row, place in rows}
    edges["min_full_attn_seq_len"] = {n - place for _, place in columns}
    edges["target_group_size"] = set()
    if "targets" in roles.values():
        h = n - n // 2
        targets = [h + (1 << k) for k in range(h.bit_length()) if h + (1 << k) < n]
        edges["target_group_size"] = {place - h for _, place in changes((n, n - h, 0), targets, everything, along=1)}
    return {name: sorted(value for value in values if 0 < value < n - 1)[:24] for name, values in edges.items()}


def _fitting(
    question: _Question, samples: Samples, observed: _Observed, suggested: dict[str, list[int]]
) -> tuple[list[_Parameters], int, bool]:
    """The combinations of suggested values that agree with the observed cells, the simplest first; if none does, those
    that agreed the longest. With the number of cells they agree with, and whether these were all."""
    options = [
        torch.tensor([0, *suggested[name]]) for name in ("contextual_seq_len", "max_attn_len", "min_full_attn_seq_len")
    ]
    options.append(torch.tensor([1, *(g for g in suggested["target_group_size"] if g > 1)]))
    combined = torch.cartesian_prod(*options)
    combined = combined[(combined[:, 1] > 0) | (combined[:, 2] == 0)]
    features = (combined[:, :3] > 0).sum(1) + (combined[:, 3] > 1)
    combined = combined[features.argsort(stable=True)]

    cells = observed.matters.expand(observed.live.shape).nonzero()
    cells = cells[torch.tensor(question.rng.sample(range(len(cells)), min(len(cells), 4096)), dtype=torch.int64)]
    at = tuple(cells.unbind(1))
    shape = observed.live.shape
    live = observed.live[at]
    n, t, c, i, j = (
        table.expand(shape)[at]
        for table in (
            *map(samples.of_sequence, (samples.lengths, samples.targets, samples.contextual)),
            samples.rows,
            samples.cols,
        )
    )
    varying = bool((samples.contextual > 0).any())
    alternatives = [
        (causal, share, combined)
        for causal in (True, False)
        for share in ((True, False) if bool((samples.targets > 0).any()) else (True,))
    ]
    agreed = 0
    for chunk in torch.arange(len(live)).split_with_sizes(_growing(len(live))):
        remaining = []
        for causal, share, numbers in alternatives:
            contextual, window, full, group = (column.unsqueeze(1) for column in numbers.unbind(1))
            contextual = c[chunk] if varying else contextual
            got = attention_mask(
                i[chunk],
                j[chunk],
                n[chunk],
                causal=causal,
                contextual=contextual,
                num_targets=t[chunk],
                target_group_size=group,
                max_attn_len=window,
                min_full_attn_seq_len=full,
                targets_share_position=share,
            )
            outside = (contextual + t[chunk] > n[chunk]) & (n[chunk] > 0)
            kept = ((got == live[chunk]) | outside).all(1)
            if kept.any():
                remaining.append((causal, share, numbers[kept]))
        if not remaining:
            break
        alternatives, agreed = remaining, agreed + len(chunk)
    found = [
        _Parameters(causal, *row[:3], row[3], share)
        for causal, share, numbers in alternatives
        for row in numbers[:8].tolist()
    ]
    found.sort(key=lambda p: (p.contextual_seq_len > 0) + (p.max_attn_len > 0) + (p.target_group_size > 1))
    return found, agreed, agreed == len(live)


def _growing(total: int) -> list[int]:
    sizes, size = [], 16
    while total:
        sizes.append(min(size, total))
        total, size = total - sizes[-1], size * 4
    return sizes


def _with_nodes(question: _Question, symbols: Symbols, parameters: _Parameters) -> Iterable[_Parameters]:
    """The parameters as ints, and with sizes of the graph that have these values."""
    space = IndexSpace(symbols, {}, rank=3)
    numbers = [(name, value) for name, value in vars(parameters).items() if not isinstance(value, bool)]
    choices = []
    for _, value in numbers:
        nodes = [node for node in question.expression.scalars() if value > 0 and space.scalar(node) == value]
        choices.append([value, *nodes])
    for chosen in itertools.islice(itertools.product(*choices), 16):
        yield _Parameters(**vars(parameters) | {name: x for (name, _), x in zip(numbers, chosen, strict=True)})


def _mismatch(question: _Question, symbols: Symbols, roles: Roles, parameters: _Parameters) -> str | None:
    """The first cell in which the mask is not what the parameters say, in words."""
    space = IndexSpace(symbols, {}, rank=3)
    numbers = {name: space.scalar(value) for name, value in vars(parameters).items()}
    length, fixed = space.scalar(question.max_seq_len), numbers.pop("contextual_seq_len")
    if fixed > length:
        return None
    samples = question.samples(symbols, roles, fixed)
    if question.expression.has_table():
        if length > LARGEST_TABLE:
            raise NotUnderstood(f"it reads a constant tensor, and {length} positions are too many to compare them all")
        whole = question.samples(symbols, roles, counts=[(length, 0, 0)])
        difference = _difference(
            question, symbols, roles, all_cells(whole, range(length), range(length)), fixed, numbers
        )
        if difference is not None:
            return difference
    return _difference(question, symbols, roles, samples, fixed, numbers)


def _difference(
    question: _Question, symbols: Symbols, roles: Roles, samples: Samples, contextual_seq_len: int, numbers: dict
) -> str | None:
    observed = question.observe(symbols, roles, samples)
    lengths, targets, contextual = map(samples.of_sequence, (samples.lengths, samples.targets, samples.contextual))
    expected = attention_mask(
        samples.rows,
        samples.cols,
        lengths,
        contextual=contextual if "contextual" in roles.values() else contextual_seq_len,
        num_targets=targets,
        **numbers,
    )
    wrong = (expected != observed.live) & observed.matters
    if not wrong.any():
        return None
    p, r, c = wrong.nonzero()[0].tolist()
    n, t = int(lengths[p]), int(targets[p])
    told = f" ({t} targets)" if t else ""
    state = "live" if observed.live.expand_as(wrong)[p, r, c] else "dead"
    return f"row {int(samples.rows[p, r])}, column {int(samples.cols[p, 0, c])} of a sequence of {n}{told} is {state}"


def _only_columns(question: _Question, sizes: list[Symbols], roles: Roles, free: list[fx.Node]) -> str | None:
    """The reason, if a dense mask pads columns and not rows: the op has no such mask."""
    if question.seq_offsets is not None or not question.padding_matters:
        return None
    for names in itertools.permutations(["lengths", "targets", "contextual"], len(free)):
        trial = roles | dict(zip(free, names, strict=True))
        if "lengths" in names:
            inside = _Question(**{**vars(question), "padding_matters": False})
            samples = inside.samples(sizes[0], trial)
            observed = question.observe(sizes[0], trial, samples)
            lengths = samples.of_sequence(samples.lengths)
            if not (observed.live & (samples.cols >= lengths)).any() and isinstance(
                _search(inside, sizes, trial), _Parameters
            ):
                return "columns beyond the length are masked, but rows beyond it are not"
    return None
