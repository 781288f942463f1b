"""Where a mask is looked at: batches of lengths and counts, and the rows and columns at which something may change."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SEQUENCES = 64  # sampled sequences, each in a batch of its own
POINTS = 80  # sampled rows (and columns) of a sequence that is too long for all of them
ALL_POINTS = 40  # up to this length all cells are looked at
ALL_SEQUENCES = 9  # up to this length all combinations of length and counts are

Counts = tuple[int, int, int]  # length, targets, contextual


@dataclass(frozen=True)
class Samples:
    """P sequences, each in its own batch of B, at R rows and C columns.

    lengths, targets, contextual: [P, B]; batch, head: [P, 1, 1], the place of the sampled sequence in its batch;
    rows: [P, R, 1], cols: [P, 1, C].
    """

    lengths: Tensor
    targets: Tensor
    contextual: Tensor
    batch: Tensor
    head: Tensor
    rows: Tensor
    cols: Tensor

    def of_sequence(self, table: Tensor) -> Tensor:
        """The sampled sequences' own entries of a [P, B] table, as [P, 1, 1]."""
        return table.gather(1, self.batch[:, :, 0]).unsqueeze(-1)

    def leaf(self, table: Tensor, axis: int):
        """An input whose values are the columns of a [P, ...] table, along its dimension `axis`."""
        world = torch.arange(len(table)).view(-1, 1, 1)
        return lambda coords: table[world, coords[axis]]


def sample_counts(
    rng: random.Random, length: int, *, jagged: bool, targets: bool, contextual: bool, contextual_seq_len: int = 0
) -> list[Counts]:
    """Sequences of up to `length` tokens: all of them if these are few, else edge cases first, the rest at random.

    0 <= contextual, 0 <= targets, contextual + targets <= length; or an empty sequence.
    jagged: lengths vary. targets, contextual: these counts vary. contextual_seq_len: what they leave free.
    """

    def fitting(n: int, t: int, c: int) -> bool:
        return n == 0 and t == c == 0 or c + t <= n and contextual_seq_len + t <= n

    if length <= ALL_SEQUENCES:
        lengths = range(length + 1) if jagged else [length]
        return [
            (n, t, c)
            for n in lengths
            for t in range(n + 1 if targets else 1)
            for c in range(n + 1 if contextual else 1)
            if fitting(n, t, c)
        ]
    edges = [0, 1, 2, 3, 5, length // 2, length - 1, length]
    counts: list[Counts] = []
    while len(counts) < SEQUENCES:
        k = len(counts)
        n = length if not jagged or k % 4 == 0 else edges[k // 2 % 8] if k < 16 else rng.randint(0, length)
        if contextual_seq_len and n < contextual_seq_len:
            n = 0 if jagged and k % 2 else rng.randint(contextual_seq_len, length)
        room = max(n - contextual_seq_len, 0)
        t = _count(rng, room) if targets and k % 2 else 0
        c = _count(rng, n - t) if contextual and rng.random() < 0.7 else 0
        counts.append((n, t, c))
    return counts


def _count(rng: random.Random, most: int) -> int:
    return min(
        most,
        rng.choice([0, 1, 2, 3, 4, 5, 6, 7, rng.randint(0, 40), rng.randint(0, most), most - 1, most]) % (most + 1),
    )


def sample(
    rng: random.Random, counts: list[Counts], *, batch_size: int, num_heads: int, length: int, constants: Iterable[int]
) -> Samples:
    """Put each of `counts` into a batch of others, and choose its rows and columns.

    constants: numbers in the mask's expression; something may happen so far from a boundary.
    """
    table = torch.tensor([[rng.choice(counts) for _ in range(batch_size)] for _ in counts]).view(-1, batch_size, 3)
    batch, rows, cols = [], [], []
    for k, own in enumerate(counts):
        batch.append(rng.randrange(batch_size))
        table[k, batch[-1]] = torch.tensor(own)
        if length <= ALL_POINTS:
            rows.append(list(range(length)))
            cols.append(list(range(length)))
        else:
            steps = sorted({0, *constants})
            rows.append(_points(rng, own, length, steps, POINTS))
            near_rows = [
                point + step for point in rng.sample(rows[-1], 8) for step in (0, rng.choice(steps), -rng.choice(steps))
            ]
            near_rows = [point + d for point in near_rows for d in (-1, 0, 1)]
            cols.append([min(max(j, 0), length - 1) for j in near_rows] + _points(rng, own, length, steps, POINTS - 24))
    heads = [rng.randrange(num_heads) for _ in counts]
    return Samples(
        *table.unbind(2),
        torch.tensor(batch).view(-1, 1, 1),
        torch.tensor(heads).view(-1, 1, 1),
        torch.tensor(rows).unsqueeze(2),
        torch.tensor(cols).unsqueeze(1),
    )


def _points(rng: random.Random, own: Counts, length: int, steps: list[int], count: int) -> list[int]:
    """Indices at the boundaries of a sequence, at steps from them, in a run and at random."""
    n, t, c = own
    boundaries = [0, c, n - t, n, length - 1]
    run = rng.randrange(length)
    points = {*range(4), *range(run, run + 8), length - 1}
    points |= {boundary + d for boundary in boundaries for d in (-2, -1, 0, 1)}
    while len(points) < count - 12:
        place = (
            rng.choice(boundaries) + rng.choice([-1, 1]) * rng.choice(steps) + rng.choice([-1, 1]) * rng.choice(steps)
        )
        points |= {place - 1, place, place + 1, rng.randrange(length)}
    inside = [point for point in points if 0 <= point < length]
    return (inside + [rng.randrange(length) for _ in range(count)])[:count]


def all_cells(samples: Samples, rows: Iterable[int], cols: Iterable[int]) -> Samples:
    """The same sequences, at other rows and columns."""
    count = len(samples.lengths)
    return replace(
        samples,
        rows=torch.tensor(list(rows)).view(1, -1, 1).expand(count, -1, 1),
        cols=torch.tensor(list(cols)).view(1, 1, -1).expand(count, 1, -1),
    )
