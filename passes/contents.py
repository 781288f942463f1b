"""What a tensor of the model holds, as a formula, where that is known while the model is compiled.

A causal mask registered as a buffer is an input of the graph. The backend, which has the real tensor at hand, `offer`s
it; a pass reads it with `content`, and says with `assume` if its rewriting takes it for granted; the backend then
`withdraw`s what was offered, and checks at each call what was assumed (`hstu_compile/assumptions.py`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

MOST_PIECES = 4  # a triangle has two, a band three

_OFFER = "hstu_compile_content"


@dataclass(frozen=True)
class Content:
    """A tensor of which all values follow from one index: that of its only dimension, or column - row of its two
    (dimensions of size 1 aside). From each of `begins` on they are `first`, `first + step`, ...
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    begins: tuple[int, ...]
    first: tuple[float, ...]
    step: tuple[float, ...]

    def at(self, coords: tuple[Tensor, ...]) -> Tensor:
        """The values at coordinates; IndexError where there are none."""
        for dim in self.dims:
            if (coords[dim] < 0).any() or (coords[dim] >= self.shape[dim]).any():
                raise IndexError(f"beyond the {self.shape[dim]} entries of a buffer")
        index = torch.zeros((), dtype=torch.int64)
        for dim in self.dims:
            index = coords[dim] - index
        begins, first, step = map(torch.tensor, (self.begins, self.first, self.step))
        piece = torch.bucketize(index, begins, right=True) - 1
        return first[piece] + step[piece] * (index - begins[piece])

    @property
    def numbers(self) -> set[int]:
        """The whole numbers that are written in it."""
        return {int(abs(x)) for x in (*self.begins, *self.first) if abs(x) < 1 << 24}

    @property
    def is_zero_or_one(self) -> bool:
        return set(self.first) <= {0, 1} and set(self.step) <= {0}


def content_of(tensor: Tensor) -> Content | None:
    """The formula that gives every value of a tensor exactly; None if that takes more than a few pieces."""
    dims = tuple(dim for dim, size in enumerate(tensor.shape) if size != 1)
    if len(dims) > 2 or 0 in tensor.shape:
        return None
    values, origin = tensor.detach().squeeze(), 0
    if len(dims) == 2:
        if not torch.equal(values[1:, 1:], values[:-1, :-1]):
            return None
        origin = len(values) - 1
        values = torch.cat([values[:, 0].flip(0), values[0, 1:]])
    values = values.reshape(-1).to("cpu")
    values = values.double() if values.is_floating_point() else values.long()
    pieces: list[tuple[int, float, float]] = []
    begin = 0
    while begin < len(values):
        if len(pieces) == MOST_PIECES:
            return None
        rest = values[begin:]
        slope = (rest[1] - rest[0]).item() if len(rest) > 1 else 0
        other = (rest != rest[0] + slope * torch.arange(len(rest))).nonzero()
        pieces.append((begin - origin, rest[0].item(), slope))
        begin += int(other[0]) if len(other) else len(rest)
        if pieces[-1][1] != pieces[-1][1]:  # NaN
            return None
    begins, first, step = zip(*pieces, strict=True)
    return Content(tuple(tensor.shape), dims, begins, first, step)


@dataclass
class _Offer:
    tensor: Tensor
    assumed: bool = False

    @cached_property
    def content(self) -> Content | None:
        return content_of(self.tensor)


def offer(node: fx.Node, tensor: Tensor) -> None:
    """Say what an input of the graph holds now, and as long as `assume` is heeded."""
    node.meta[_OFFER] = _Offer(tensor)


def is_offered(node: fx.Node) -> bool:
    return _OFFER in node.meta


def cancel(node: fx.Node) -> None:
    """Nothing is known of this input, nor wherever it was passed on to."""
    node.meta[_OFFER].content = None


def pass_on(source: fx.Node, node: fx.Node) -> None:
    """An input of a region's body holds what an input of the graph around it holds."""
    node.meta[_OFFER] = source.meta[_OFFER]


def content(node: fx.Node) -> Content | None:
    """What an input holds, if that was offered and is a formula."""
    offered: _Offer | None = node.meta.get(_OFFER)
    if offered is None or not all(isinstance(size, int) for size in node.meta["val"].shape):
        return None  # of symbolic sizes another tensor may be longer
    return offered.content


def assume(node: fx.Node) -> None:
    """From here on the graph is only right while this input holds its `content`."""
    node.meta[_OFFER].assumed = True


def withdraw(graphs: Iterable[fx.Graph]) -> dict[int, Content]:
    """End all offers; returns what was assumed of the inputs of the first graph, by their positions."""
    offers = [[node.meta.pop(_OFFER, None) for node in graph.find_nodes(op="placeholder")] for graph in graphs]
    return {k: found.content for k, found in enumerate(offers[0]) if found is not None and found.assumed}
