"""Inputs of a step's graph with room for more tokens and sequences than a request has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from hstu_compile.passes.batch_sizes import BatchSizes, Kind
from hstu_compile.passes.graph import shape, value
from hstu_compile.serving.staging import array


class Padding:
    """Of inputs, by which of their sizes are those of a batch.

    The last sequence holds the tokens that are added: a token of no sequence is more than models reckon with. Those
    between are empty.
    """

    def __init__(self, inputs: Sequence[fx.Node], sizes: BatchSizes, rows: fx.Node) -> None:
        """rows: the new ones, an input of the graph too."""
        self._varying: list[list[tuple[int, Kind]]] = []  # the dims of each input that are of a batch
        self._is_picked: list[bool] = []  # whether each input has tokens, and is read at new rows only
        self._numbers: list[Kind | None] = []  # what each input is that is a number
        self._constants: list[int] = []  # positions of numbers that the graph reads, and are not of a batch
        self._sizes: list[tuple[int, int, bool]] = []  # of all inputs: position, dim, whether it is of a batch
        for position, node in enumerate(inputs):
            is_tensor = isinstance(value(node), Tensor)
            kinds = [(dim, sizes.kind(size)) for dim, size in enumerate(shape(node))] if is_tensor else []
            self._varying.append([(dim, kind) for dim, kind in kinds if kind is not None])
            of_tokens = self._varying[-1] == [(0, "tokens")]
            self._is_picked.append(of_tokens and all(_picks(user, node, rows) for user in node.users))
            self._sizes += [(position, dim, kind is not None) for dim, kind in kinds]
            self._numbers.append(None if is_tensor else sizes.kind(value(node)))
            if not is_tensor and node.users and self._numbers[-1] is None:
                self._constants.append(position)

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
        for i, dim, is_of_batch in self._sizes:
            n, most = inputs[i].shape[dim], room[i].shape[dim]
            if n > most or (n < most and not is_of_batch):
                return False
        for i in self._constants:
            if inputs[i] != room[i]:
                return False
        return True

    def fill(self, position: int, room: Tensor, given: Tensor, tokens: int) -> None:
        """Copy the input at this position to where there is room for more, of so many tokens."""
        _fill(room, given, self._varying[position], tokens)

    def fill_host(
        self, position: int, room: np.ndarray, given: Tensor, tokens: int, spans: Sequence[tuple[int, int]]
    ) -> None:
        """Like `fill`, to a `staging.array`; of an input that is read at new rows only these, spans of the request."""
        numbers = array(given)
        if not self._is_picked[position]:
            return _fill(room, numbers, self._varying[position], tokens)
        for first, last in spans:
            room[first:last] = numbers[first:last]
        return None


def _picks(user: fx.Node, node: fx.Node, rows: fx.Node) -> bool:
    return user.target is torch.ops.aten.index.Tensor and user.args == (node, [rows])


def _fill(room: Any, given: Any, varying: Sequence[tuple[int, Kind]], tokens: int) -> None:
    """What is left behind the tokens given stays as it is: those tokens are nobody's. Of tensors, or of arrays."""
    _write(room, (*map(slice, given.shape), ...), given)
    for dim, kind in varying:
        actual, before = given.shape[dim], (slice(None),) * dim
        if kind == "tokens" or actual == room.shape[dim]:
            continue
        rest = (*before, slice(actual, None))
        if kind == "sequences":
            _write(room, rest, 0)
        else:
            _write(room, rest, given[(*before, slice(-1, None))])
            _write(room, (*before, slice(-1, None)), tokens)


def _write(room: Any, index: tuple[Any, ...], what: Any) -> None:
    if not isinstance(room, Tensor):
        room[index] = what
    elif isinstance(what, Tensor):
        room[index].copy_(what, non_blocking=True)
    else:
        room[index].fill_(what)
