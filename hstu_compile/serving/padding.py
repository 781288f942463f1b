"""Inputs of a step's graph with room for more tokens and sequences than a request has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hstu_compile.passes.batch_sizes import BatchSizes, Kind
from hstu_compile.passes.graph import shape, value


class Padding:
    """Of inputs, by which of their sizes are those of a batch.

    The last sequence holds the tokens that are added: a token of no sequence is more than models reckon with. Those
    between are empty.
    """

    def __init__(self, inputs: Sequence[fx.Node], sizes: BatchSizes) -> None:
        self._varying: list[list[tuple[int, Kind]]] = []  # the dims of each input that are of a batch
        self._numbers: list[Kind | None] = []  # what each input is that is a number
        self._is_read = [bool(node.users) for node in inputs]
        for node in inputs:
            is_tensor = isinstance(value(node), Tensor)
            kinds = [(dim, sizes.kind(size)) for dim, size in enumerate(shape(node))] if is_tensor else []
            self._varying.append([(dim, kind) for dim, kind in kinds if kind is not None])
            self._numbers.append(None if is_tensor else sizes.kind(value(node)))

    def pad(self, inputs: Sequence[Any], tokens: int, sequences: int) -> list[Any]:
        """The inputs of a request with so many tokens and sequences: fewer sequences where it has fewer tokens."""
        sizes: dict[Kind, int] = {"tokens": tokens, "sequences": sequences, "offsets": sequences + 1}
        padded = []
        for given, varying, number in zip(inputs, self._varying, self._numbers, strict=True):
            if not isinstance(given, Tensor):
                padded.append(given if number is None else sizes[number])
                continue
            more = list(given.shape)
            for dim, kind in varying:
                more[dim] = max(more[dim], sizes[kind])
            if more != list(given.shape):
                room = given.new_zeros(more)
                _fill(room, given, varying, tokens)
                given = room
            padded.append(given)
        return padded

    def blank(self, inputs: Sequence[Any]) -> list[Any]:
        """Inputs with addresses of their own: offsets as they are, all other tensors 0."""

        def blank(x: Any, varying: list[tuple[int, Kind]]) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.clone() if any(kind == "offsets" for _, kind in varying) else torch.zeros_like(x)

        return [blank(x, varying) for x, varying in zip(inputs, self._varying, strict=True)]

    def fits(self, room: Sequence[Any], inputs: Sequence[Any]) -> bool:
        """Whether inputs can be padded to others."""
        cases = zip(room, inputs, self._varying, self._numbers, self._is_read, strict=True)
        for has, given, varying, number, is_read in cases:
            if not isinstance(given, Tensor):
                if is_read and number is None and given != has:
                    return False
            elif given.shape != has.shape:
                dims = {dim for dim, _ in varying}
                for dim, (n, most) in enumerate(zip(given.shape, has.shape, strict=True)):
                    if n > most or (n < most and dim not in dims):
                        return False
        return True

    def fill(self, position: int, room: Tensor, given: Tensor, tokens: int) -> None:
        """Copy the input at this position to where there is room for more, of so many tokens."""
        _fill(room, given, self._varying[position], tokens)


def _fill(room: Tensor, given: Tensor, varying: Sequence[tuple[int, Kind]], tokens: int) -> None:
    """What is left behind the tokens given stays as it is: those tokens are nobody's."""
    if room.shape == given.shape:
        room.copy_(given, non_blocking=True)
        return
    own = room
    for dim, _ in varying:
        own = own.narrow(dim, 0, given.shape[dim])
    own.copy_(given, non_blocking=True)
    for dim, kind in varying:
        actual = given.shape[dim]
        if kind == "tokens" or actual == room.shape[dim]:
            continue
        rest = room.narrow(dim, actual, room.shape[dim] - actual)
        if kind == "sequences":
            rest.zero_()
        else:
            rest.copy_(room.narrow(dim, actual - 1, 1).expand_as(rest))
            rest.narrow(dim, -1, 1).fill_(tokens)
