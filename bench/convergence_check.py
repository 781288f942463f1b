"""Whether a compiled model learns as the eager one: its loss, step by step, beside that of eager runs.

Two runs of one seed see the same data and differ by roundings alone, so they should stay much nearer to one another
than two seeds do. The band between the least and the greatest of the seeds' curves would be the wrong yardstick: the
same seed's curve is an edge of it most of the time, and one that is right would leave it every other step.

Seeds differ by much, so that a wrong gradient can hide in their spread. The error budget sees more: how far the loss is
from the float32 run of the same seed, which should be no further than eager is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Comparison(NamedTuple):
    """Each has a value for each window of steps."""

    same_seed: Tensor  # eager, smoothed
    run: Tensor  # what is compared with it, smoothed
    spread: Tensor  # the greatest distance of two seeds' smoothed curves, within a window's reach

    @property
    def relative(self) -> Tensor:
        """Distance of the run from the same seed's eager curve; 1 is the spread of the seeds."""
        return (self.run - self.same_seed).abs() / self.spread

    @property
    def passes(self) -> bool:
        return bool((self.relative <= 1).all())  # false for NaN


def in_eager_errors(run: Sequence[float], eager: Sequence[float], exact: Sequence[float]) -> float:
    """mean|run - exact| / mean|eager - exact| over the steps, all of one seed."""
    values, reference = torch.tensor([run, eager], dtype=torch.float64), torch.tensor(exact, dtype=torch.float64)
    error, budget = (values - reference).abs().mean(1).tolist()
    return error / budget


def window(steps: int) -> int:
    return max(steps // 20, 1)


def smoothed(curve: Sequence[float]) -> Tensor:
    """The mean of each window of steps, float64: the first value is that of the first window."""
    return torch.tensor(curve, dtype=torch.float64).unfold(0, window(len(curve)), 1).mean(-1)


def compare(eager: Sequence[Sequence[float]], run: Sequence[float]) -> Comparison:
    """Losses of every step; eager: of several seeds, the first one that of the run."""
    seeds = torch.stack([smoothed(curve) for curve in eager])
    reach = window(len(run))
    pointwise = seeds.amax(0) - seeds.amin(0)
    spread = F.max_pool1d(pointwise[None], 2 * reach - 1, stride=1, padding=reach - 1)[0]
    return Comparison(seeds[0], smoothed(run), spread)
