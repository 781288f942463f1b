"""Inputs of a step's graph with room for more tokens and sequences than a request has."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from hstu_compile.passes.batch_sizes import BatchSizes, Kind
from hstu_compile.passes.graph import shape, value
from hstu_compile.serving.staging import array


class Rows(NamedTuple):
    """The new rows, of which some may be there twice: those of an input are selected where it is."""

    host: Tensor
    device: Tensor

    def of(self, x: Tensor) -> Tensor:
        """Zeros, where it has no rows at all."""
        if x.shape[0] == 0:
            return x.new_zeros(self.host.shape[0], *x.shape[1:])
        return x.index_select(0, self._beside(x))

    def write(self, x: Tensor, room: Tensor) -> None:
        """The same, to where there is room for it, on the host or the device."""
        if x.shape[0] and x.device == room.device:
            torch.index_select(x, 0, self._beside(x), out=room)
        else:
            room.copy_(self.of(x), non_blocking=True)

    def _beside(self, x: Tensor) -> Tensor:
        return self.device.to(x.device) if x.is_cuda else self.host


class Padding:
    """Of inputs, by which of their sizes are those of a batch.

    The last sequence holds the tokens that are added: a token of no sequence is more than models reckon with. Those
    between are empty.
    """

    def __init__(self, inputs: Sequence[fx.Node], sizes: BatchSizes, picked: Collection[fx.Node]) -> None:
        """picked: inputs that have the new rows only in the graph, and all tokens in a request."""
        self._varying: list[list[tuple[int, Kind]]] = []  # the other dims of each input that are of a batch
        self._is_picked: list[bool] = [node in picked for node in inputs]
        self._numbers: list[Kind | None] = []  # what each input is that is a number
        self._constants: list[int] = []  # positions of numbers that the graph reads, and are not of a batch
        self._sizes: list[tuple[int, int, bool]] = []  # but new rows: position, dim, whether it is of a batch
        for position, node in enumerate(inputs):
            is_tensor = isinstance(value(node), Tensor)
            dims = list(enumerate(shape(node)))[node in picked :] if is_tensor else []
            kinds = [(dim, sizes.kind(size)) for dim, size in dims]
            self._varying.append([(dim, kind) for dim, kind in kinds if kind is not None])
            self._sizes += [(position, dim, kind is not None) for dim, kind in kinds]
            self._numbers.append(None if is_tensor else sizes.kind(value(node)))
            if not is_tensor and node.users and self._numbers[-1] is None:
                self._constants.append(position)

    def at_rows(self, inputs: Sequence[Any], rows: Rows) -> list[Any]:
        """The inputs of a request, as the graph has them."""
        pairs = zip(inputs, self._is_picked, strict=True)
        return [rows.of(x) if is_picked else x for x, is_picked in pairs]

    def pad(self, inputs: Sequence[Any], rows: Rows, tokens: int, sequences: int) -> list[Any]:
        """Those, with so many tokens and sequences: fewer sequences where it has fewer tokens."""
        sizes: dict[Kind, int] = {"tokens": tokens, "sequences": sequences, "offsets": sequences + 1}
        padded = []
        for given, varying, number in zip(self.at_rows(inputs, rows), self._varying, self._numbers, strict=True):
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

    def fill(self, position: int, room: Tensor, given: Tensor, rows: Rows, tokens: int) -> None:
        """Copy the input at this position to where there is room for more, of so many tokens."""
        if self._is_picked[position]:
            rows.write(given, room)
        else:
            _fill(room, given, self._varying[position], tokens)

    def fill_host(self, position: int, room: np.ndarray, given: Tensor, rows: Rows, tokens: int) -> None:
        """Like `fill`, to a `staging.array`."""
        if self._is_picked[position]:
            rows.write(given, torch.from_numpy(room).view(given.dtype))
        else:
            _fill(room, array(given), self._varying[position], tokens)


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
