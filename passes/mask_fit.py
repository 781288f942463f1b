"""From what is seen of a mask to the numbers of the family: read off its edges, and sieved cell by cell."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from hstu_compile.passes.mask_meaning import MaskMeaning, Padding, Scalar
from hstu_compile.passes.mask_reading import Observed, Reading
from hstu_compile.passes.mask_samples import Counts, Samples, all_cells

SIEVED_CELLS = 4096
MOST_EDGES = 24  # of one kind: a mask of the family has a few


@dataclass(frozen=True)
class Parameters:
    """The family's numbers: under one choice of sizes, or (SymInt nodes) under all."""

    padding: Padding
    causal: bool
    contextual_seq_len: Scalar
    max_attn_len: Scalar
    min_full_attn_seq_len: Scalar
    target_group_size: Scalar
    targets_share_position: bool

    @property
    def words(self) -> str:
        return MaskMeaning(**vars(self)).words


@dataclass(frozen=True)
class Sieved:
    """The parameters that agree with the most cells, the simplest first; whether they do with all."""

    parameters: list[Parameters]
    cells: int
    all_agree: bool


def fit(reading: Reading) -> Sieved:
    samples = reading.samples()
    observed = reading.observe(samples)
    return _sieve(reading, samples, observed, _padding(reading, samples, observed), _edges(reading))


def _padding(reading: Reading, samples: Samples, observed: Observed) -> Padding:
    """What the mask does beyond the lengths of a dense region."""
    if reading.region.seq_offsets is None and reading.has("lengths"):
        lengths = samples.of_sequence(samples.lengths)
        if (observed.live & (samples.cols >= lengths)).any():
            return "live"
        if (observed.live & (samples.rows >= lengths)).any():
            return "dead keys"
    return "dead"


def difference(reading: Reading, parameters: Parameters, samples: Samples) -> str | None:
    """The first cell in which the mask is not what the parameters say, in words."""
    observed = reading.observe(samples)
    numbers: dict[str, Any] = {name: reading.sizes.scalar(value) for name, value in vars(parameters).items()}
    contextual_seq_len = numbers.pop("contextual_seq_len")
    lengths, targets, contextual = map(samples.of_sequence, (samples.lengths, samples.targets, samples.contextual))
    expected = reading.family(
        samples.rows,
        samples.cols,
        lengths,
        targets,
        contextual=contextual if reading.has("contextual") else contextual_seq_len,
        **numbers,
    )
    wrong = (expected != observed.live) & observed.matters
    if not wrong.any():
        return None
    p, r, c = wrong.nonzero()[0].tolist()
    counts = {"targets": int(targets[p]), "contextual": int(contextual[p])}
    told = "".join(f", {count} {name}" for name, count in counts.items() if count)
    cell = f"row {int(samples.rows[p, r])}, column {int(samples.cols[p, 0, c])}"
    return f"{cell} of a sequence of {int(lengths[p])}{told} is {'kept' if observed.live[p, r, c] else 'masked'}"


def _edges(reading: Reading) -> dict[str, list[int]]:
    """Values for the family's numbers, read off where single rows and columns of the mask change."""
    n = reading.length

    def changes(counts: Counts, *, rows: Iterable[int] = (), cols: Iterable[int] = ()) -> list[tuple[int, int]]:
        """(row, column) of the first and last changes along each of these rows, or (column, row) along columns."""
        picked = torch.tensor(sorted({k for k in (*rows, *cols) if 0 <= k < n}))
        at, along = ((picked, torch.arange(n)), 1) if rows else ((torch.arange(n), picked), 0)
        changed = reading.observe(all_cells(reading.at([counts]), *at)).live[0].diff(dim=along)
        result = []
        for line, values in zip(picked.tolist(), changed.unbind(1 - along), strict=True):
            places = values.nonzero().flatten().add(1).tolist()
            result += [(line, place) for place in {*places[:3], *places[-3:]}]
        return result

    history = (n, 0, 0)
    contextual = {place for _, place in changes(history, cols=[n - 1])}
    columns = changes(history, cols=[0, n // 4, *contextual])
    rows = changes(history, rows=[n // 3, n // 2, n - 1])
    # Without a window nothing in a full mask tells contextual rows; then their count is one of the numbers.
    numbers = {number for number in reading.expression.numbers if number < n // 4}
    edges = {
        "contextual_seq_len": set() if reading.has("contextual") else contextual | numbers,
        "max_attn_len": {place - column - 1 for column, place in columns} | {row - place for row, place in rows},
        "min_full_attn_seq_len": {n - place for _, place in columns},
        "target_group_size": set(),
    }
    if reading.has("targets"):
        half = n // 2
        targets = [half, *(half + (1 << k) for k in range(half.bit_length()))]
        edges["target_group_size"] = {place - half for _, place in changes((n, n - half, 0), rows=targets)}
    return {name: sorted(v for v in values if 0 < v < n - 1)[:MOST_EDGES] for name, values in edges.items()}


def _sieve(
    reading: Reading, samples: Samples, observed: Observed, padding: Padding, suggested: dict[str, list[int]]
) -> Sieved:
    """Drop the combinations of suggested values that disagree with a cell, on growing handfuls of cells."""
    contextual_seq_len, max_attn_len, min_full, group_size = (torch.tensor([0, *v]) for v in suggested.values())
    numbers = torch.cartesian_prod(contextual_seq_len, max_attn_len, min_full, group_size.clamp(min=1).unique())
    numbers = numbers[(numbers[:, 1] > 0) | (numbers[:, 2] == 0)]
    shares = (True, False) if reading.has("targets") or padding != "dead" else (True,)
    left = [(causal, share, numbers) for causal in (True, False) for share in shares]

    cells = observed.matters.nonzero()
    cells = cells[torch.tensor(reading.rng.sample(range(len(cells)), min(len(cells), SIEVED_CELLS)), dtype=torch.int64)]
    at, shape = tuple(cells.unbind(1)), observed.live.shape
    own = map(samples.of_sequence, (samples.lengths, samples.targets, samples.contextual))
    picked = torch.stack([table.expand(shape)[at] for table in (*own, samples.rows, samples.cols, observed.live)])

    agreed, size = 0, 16
    while agreed < len(cells):
        n, t, c, i, j, live = picked[:, agreed : agreed + size]
        remaining = []
        for causal, share, numbers in left:
            contextual, window, full, group = numbers.unsqueeze(-1).unbind(1)
            if reading.has("contextual"):
                contextual = c
            expected = reading.family(
                i,
                j,
                n,
                t,
                padding=padding,
                causal=causal,
                contextual=contextual,
                target_group_size=group,
                max_attn_len=window,
                min_full_attn_seq_len=full,
                targets_share_position=share,
            )
            fitting = (expected == live).all(1)
            if fitting.any():
                remaining.append((causal, share, numbers[fitting]))
        if not remaining:
            break
        left, agreed, size = remaining, min(agreed + size, len(cells)), size * 4
    by_features = [(causal, share, row) for causal, share, rows in left for row in rows.tolist()]
    by_features.sort(key=lambda found: sum(value > 0 for value in found[2]))
    found = [Parameters(padding, causal, c, w, m, g, share) for causal, share, (c, w, m, g) in by_features[:16]]
    return Sieved(found, agreed, agreed == len(cells))
