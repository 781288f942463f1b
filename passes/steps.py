"""A step function of one number, found by asking for its values: where it steps, and what it is between.

Numbers are ordered by whole-number keys, from the least to the greatest of a dtype; on either side of 0 the function
must be monotone, so that between two places with one value there is no other, and bisection finds every step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_compile.passes.index_space_ops import NotUnderstood

DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
MOST = 4096  # steps
DENSE = 1 << 14  # small whole numbers that are all compared
NEAR = 64  # keys on either side of a step
RANDOM = 1 << 15
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Steps:
    """f(d) = values[#{k : boundaries[k] <= d}], of |d| if symmetric; NaN counts as less than all."""

    boundaries: Tensor
    values: Tensor
    symmetric: bool

    def at(self, numbers: Tensor) -> Tensor:
        numbers = numbers.abs() if self.symmetric else numbers
        found = torch.searchsorted(self.boundaries, numbers, right=True)
        return self.values[torch.where(numbers.isnan(), 0, found)]

    def values_between(self, boundaries: Tensor) -> Tensor:
        """The values before, between and after boundaries, of which its own are some."""
        found = torch.searchsorted(self.boundaries, boundaries, right=True)
        return self.values[torch.cat([found.new_zeros(1), found])]


def steps(function: Function, dtype: torch.dtype, device: torch.device) -> Steps:
    """The step function that `function`, of numbers in a 1-D tensor of a dtype, is. Raises NotUnderstood."""
    if dtype not in DTYPES:
        raise NotUnderstood(f"the differences are {dtype}")
    keys = _Keys(dtype, device)
    places, values = _bisected(lambda at: function(keys.number(at)), keys)
    negative = int((places <= 0).sum())
    even = Steps(keys.number(places[negative:]), values[negative:], symmetric=True)
    line = Steps(keys.number(places), values, symmetric=False)
    probes = keys.probes(places)
    expected = function(probes)
    for found in (even, line):
        found = _with_exceptions(found, function, keys)
        if torch.equal(found.at(probes), expected):
            if len(found.boundaries):
                return found
            raise NotUnderstood("the bucket is always the same")
    wrong = probes[line.at(probes) != expected][0].item()
    raise NotUnderstood(f"it is no step function of the difference: not monotone around {wrong}")


def _with_exceptions(found: Steps, function: Function, keys: "_Keys") -> Steps:
    """Numbers that count as less than all others, if the function has a value of its own for them, get a step."""
    odd = keys.odd(found.symmetric)
    if odd is None:
        return found
    value = function(odd)
    if torch.equal(found.at(odd), value):
        return found
    least = torch.zeros_like(odd) if found.symmetric else keys.number(keys.least)
    return Steps(torch.cat([least, found.boundaries]), torch.cat([value, found.values]), found.symmetric)


class _Keys:
    """The numbers of a dtype by whole numbers in their order; key 0 is the number 0."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        if dtype.is_floating_point:
            greatest = int(torch.tensor(float("inf"), dtype=dtype).view(BITS[dtype]))
            ends = (-greatest, greatest)
        else:
            ends = (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        self.least, self.greatest = (torch.tensor([end], device=device) for end in ends)

    def number(self, keys: Tensor) -> Tensor:
        if not self.dtype.is_floating_point:
            return keys.to(self.dtype)
        size = keys.abs().to(BITS[self.dtype]).view(self.dtype)
        return torch.where(keys < 0, -size, size)

    def key(self, numbers: Tensor) -> Tensor:
        if not self.dtype.is_floating_point:
            return numbers.long()
        size = numbers.abs().view(BITS[self.dtype]).long()
        return torch.where(numbers < 0, -size, size)

    def grid(self) -> Tensor:
        """Keys from the least to the greatest, 0 and -1 among them; close to each other where the numbers are small."""
        powers = 1 << torch.arange(int(self.greatest).bit_length(), device=self.device)
        near = torch.arange(1024, device=self.device)
        places = torch.cat([near, powers, powers + (powers >> 1), self.greatest])
        if self.dtype.is_floating_point:
            places = torch.cat([places, self.key(near.to(self.dtype))])
        places = torch.cat([places[(places >= 0) & (places <= self.greatest)], self.greatest - 1])
        return torch.cat([self.least, self.least + 1, -places[places > 0], places]).unique()

    def probes(self, steps: Tensor) -> Tensor:
        """Numbers at which to compare: all small ones, those around every step and its mirror image, and others."""
        dice = torch.Generator(device="cpu").manual_seed(0)
        near = torch.arange(-NEAR, NEAR + 1, device=self.device)
        around = torch.cat([steps, -steps]).view(-1, 1).clamp(self.least + NEAR, self.greatest - NEAR) + near
        top = int(self.greatest)
        anywhere = torch.randint(top, (RANDOM,), generator=dice, device="cpu")
        scales = torch.randint(top.bit_length(), (RANDOM,), generator=dice, device="cpu")
        anywhere = torch.cat([anywhere >> scales, -(anywhere >> scales), anywhere, -anywhere]).to(self.device)
        small = torch.arange(-DENSE, DENSE + 1, device=self.device)
        numbers = self.number(torch.cat([small, around.flatten(), anywhere, self.least, self.greatest]))
        if not self.dtype.is_floating_point:
            return numbers
        small = small.to(self.dtype)
        return torch.cat([numbers, small, small / 16, torch.tensor([-0.0, float("nan")]).to(numbers)])

    def odd(self, symmetric: bool) -> Tensor | None:
        """What compares less than all numbers of the domain: NaN, and the least integer as its own absolute value."""
        if self.dtype.is_floating_point:
            return torch.full((1,), float("nan"), dtype=self.dtype, device=self.device)
        return self.number(self.least) if symmetric else None


def _bisected(function: Function, keys: _Keys) -> tuple[Tensor, Tensor]:
    """The keys at which the function takes another value, in order; and its values before, between and after them."""
    places = keys.grid()
    values = function(places)
    ends = places[[0, -1]], values[[0, -1]]  # infinity, or what has no absolute value: they may be an exception
    places, values = places[1:-1], values[1:-1]
    least = values[:1]
    low, high, at_low, at_high = places[:-1], places[1:], values[:-1], values[1:]
    found, after = [], []
    while True:
        differ = at_low != at_high
        low, high, at_low, at_high = (t[differ] for t in (low, high, at_low, at_high))
        if len(low) > MOST:
            raise NotUnderstood(f"it has more than {MOST} steps")
        next_to = high - low == 1
        found.append(high[next_to])
        after.append(at_high[next_to])
        low, high, at_low, at_high = (t[~next_to] for t in (low, high, at_low, at_high))
        if not len(low):
            break
        middle = low + (high - low) // 2
        at = function(middle)
        low, high = torch.cat([low, middle]), torch.cat([middle, high])
        at_low, at_high = torch.cat([at_low, at]), torch.cat([at, at_high])
    if sum(map(len, found)) > MOST:
        raise NotUnderstood(f"it has more than {MOST} steps")
    order = torch.cat(found).argsort()
    places, values = torch.cat(found)[order], torch.cat([least, torch.cat(after)[order]])
    for side in (values[: int((places < 0).sum()) + 1], values[int((places < 0).sum()) + 1 :]):
        rises = side.diff()
        if (rises > 0).any() and (rises < 0).any():
            raise NotUnderstood("it is no step function of the difference that rises or falls throughout")
    if ends[1][0] != values[0]:
        places, values = torch.cat([ends[0][:1] + 1, places]), torch.cat([ends[1][:1], values])
    if ends[1][1] != values[-1]:
        places, values = torch.cat([places, ends[0][1:]]), torch.cat([values, ends[1][1:]])
    return places, values
