"""Where a mask is looked at: batches of lengths and counts, and the rows and columns at which something may change."""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from hstu_compile.passes.index_space import Leaf

SEQUENCES = 64  # sampled sequences, each in a batch of its own
POINTS = 80  # sampled rows (and columns) of a sequence that is too long for all of them
ALL_POINTS = 96  # up to this length all cells are looked at
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


def leaf_of(table: Tensor, node: fx.Node) -> Leaf:
    """The input `node`, of one dimension (others are 1), with the rows of a [P, ...] table for the P batches."""
    sizes = node.meta["val"].shape
    axis = next((k for k, size in enumerate(sizes) if not isinstance(size, int) or size != 1), 0)
    world, table = torch.arange(len(table)).view(-1, 1, 1), table.to(node.meta["val"].dtype)
    return lambda coords: table[world, coords[axis]]


def sample_counts(
    rng: random.Random, length: int, *, varying: bool, targets: bool, contextual: bool, contextual_seq_len: int
) -> list[Counts]:
    """Sequences of up to `length` tokens: all of them if these are few, else edge cases first, the rest at random.

    0 <= targets <= length, 0 <= contextual; one in four may have no room for its contextual tokens and its targets.
    varying: lengths vary. targets, contextual: these counts vary. contextual_seq_len: what they leave free.
    """
    if length <= ALL_SEQUENCES:
        lengths = range(length + 1) if varying else [length]
        return [
            (n, t, c)
            for n in lengths
            for t in range(n + 1 if targets else 1)
            for c in range(length + 2 if contextual else 1)
        ]
    edges = [0, 1, 2, 3, 5, length // 2, length - 1, length]
    counts: list[Counts] = []
    while len(counts) < SEQUENCES:
        k = len(counts)
        fits = k % 4 != 3
        n = length if not varying or k % 4 == 0 else edges[k // 2 % 8] if k < 16 else rng.randint(0, length)
        if contextual_seq_len and varying and not fits:
            n = rng.randint(0, min(2 * contextual_seq_len, length))
        elif n < contextual_seq_len:
            n = 0 if varying and k % 2 else rng.randint(contextual_seq_len, length)
        room = max(n - contextual_seq_len, 0) if fits else n
        t = _count(rng, room) if targets and k % 2 else 0
        c = _count(rng, n - t if fits else length) if contextual and rng.random() < 0.7 else 0
        counts.append((n, t, c))
    return counts


def _count(rng: random.Random, most: int) -> int:
    return min(
        most,
        rng.choice([0, 1, 2, 3, 4, 5, 6, 7, rng.randint(0, 40), rng.randint(0, most), most - 1, most]) % (most + 1),
    )


def sample(
    rng: random.Random, counts: list[Counts], *, batch_size: int, num_heads: int, length: int, steps: Iterable[int]
) -> Samples:
    """Put each of `counts` into a batch of others, and choose its rows and columns.

    steps: something may happen so far from a boundary.
    """
    dice = torch.Generator(device="cpu").manual_seed(rng.randrange(1 << 30))
    own, many = torch.tensor(counts), len(counts)
    batch = torch.randint(batch_size, (many, 1), generator=dice)
    head = torch.randint(num_heads, (many, 1, 1), generator=dice)
    table = own[torch.randint(many, (many, batch_size), generator=dice)]
    table[torch.arange(many), batch[:, 0]] = own
    if length <= ALL_POINTS:
        rows = cols = torch.arange(length).expand(many, -1)
    else:
        far = torch.tensor(sorted({0, *steps}))
        rows = _points(dice, own, length, far)
        near_rows = _step(dice, rows, far, POINTS // 3).clamp(0, length - 1)
        cols = torch.cat([near_rows, _points(dice, own, length, far)[:, : POINTS - near_rows.shape[1]]], 1)
    lengths, targets, contextual = table.unbind(2)
    return Samples(
        lengths, targets, contextual, batch.unsqueeze(2), head, rows=rows.unsqueeze(2), cols=cols.unsqueeze(1)
    )


def _points(dice: torch.Generator, own: Tensor, length: int, steps: Tensor) -> Tensor:
    """[P, POINTS] indices of each sequence: at its boundaries, one or two steps from them, in a run and at random."""
    n, t, c = own.unbind(1)
    boundaries = torch.stack([torch.zeros_like(n), c, n - t, n, torch.full_like(n, length - 1)], 1)
    run = torch.randint(length, (len(own), 1), generator=dice) + torch.arange(8)
    near = (boundaries.unsqueeze(2) + torch.arange(-2, 2)).flatten(1)
    anywhere = torch.randint(length, (len(own), POINTS // 8), generator=dice)
    once = _step(dice, boundaries, steps, POINTS // 4)
    known = torch.cat([near, once, run, anywhere], 1)
    points = torch.cat([known, _step(dice, once, steps, POINTS - known.shape[1])], 1).clamp(0, length - 1)
    return points.gather(1, torch.rand(points.shape, generator=dice).argsort(1))


def _step(dice: torch.Generator, places: Tensor, steps: Tensor, count: int) -> Tensor:
    """`count` places a step to the left or right of one of `places`, give or take one."""
    chosen = places.gather(1, torch.randint(places.shape[1], (len(places), count), generator=dice))
    step = steps[torch.randint(len(steps), chosen.shape, generator=dice)]
    sign = torch.randint(2, chosen.shape, generator=dice) * 2 - 1
    return chosen + sign * step + torch.randint(-1, 2, chosen.shape, generator=dice)


def all_cells(samples: Samples, rows: Tensor, cols: Tensor) -> Samples:
    """The same sequences, at other rows [R] and columns [C]."""
    count = len(samples.lengths)
    return replace(
        samples,
        rows=rows.view(1, -1, 1).expand(count, -1, 1),
        cols=cols.view(1, 1, -1).expand(count, 1, -1),
    )
