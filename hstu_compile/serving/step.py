"""A captured model over a paged cache: what a request is to it, and the graph that computes its new rows."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from hstu_compile.capture import placeholders
from hstu_compile.passes import cacheable, paged_attention, paged_gate, picked_inputs, silu_append, silu_in_place
from hstu_compile.passes.batch_sizes import BatchSizes, expression
from hstu_compile.passes.evaluate import Evaluation
from hstu_compile.passes.graph import argument, is_tensor, shape, value
from hstu_compile.passes.report import source_line
from hstu_compile.passes.row_wise import MixesRows
from hstu_compile.serving.captured_call import CapturedCall
from hstu_compile.serving.padding import Padding
from hstu_compile.serving.sizes import Size


class NotServable(RuntimeError):
    """The model can't be computed from a cache; the message names the call, its line and why."""


class OneToken(RuntimeError):
    """A call of one token can't be captured for any number of them."""


@dataclass
class Request:
    """The sequences of a request, as its arguments say."""

    inputs: list[Any]  # of the graph
    symbols: dict[str, int]  # sizes and numbers of the graph, in this request
    offsets: list[int]  # [B + 1]
    lengths: list[int]  # [B]
    histories: list[int]  # [B]: lengths without candidates
    first_read: list[int]  # [B]: the first position that is read of the result


class _TensorInput(NamedTuple):
    position: int
    name: str  # the caller's
    dtype: torch.dtype
    sizes: list[Size]


class _NumberInput(NamedTuple):
    position: int
    name: str  # the caller's
    symbol: str | None
    is_fixed: bool  # keys and values depend on it


@dataclass(frozen=True)
class Geometry:
    """Of the keys and values of all layers."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype


class Step:
    """`prepare` reads a request, `graph` computes it."""

    def __init__(self, call: CapturedCall) -> None:
        self._call = call
        self.graph = call.graph
        layers = paged_attention.attentions(self.graph)
        if not layers:
            raise NotServable(f"serve: no attention of the model was recognised, expected at least one\n{call.report}")
        if missed := call.report.missed("attention"):
            raise NotServable(f"serve: an attention of the model was not recognised\n{missed[0]}")
        if regions := self.graph.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast):
            where = source_line(next(iter(regions)))  # calls are moved, also into such a region
            raise NotServable(
                f"serve: the model enters autocast at {where}, expected autocast around the engine's calls"
            )
        self._tokens, self._offsets, self._targets = _sequences(layers[0])
        if isinstance(self._tokens, int):
            if self._tokens == 1:
                raise OneToken
            raise NotServable(f"serve: the model takes {self._tokens} tokens only, expected one for any number")
        try:
            self.sizes = BatchSizes(self.graph.graph, self._tokens, self._offsets) if self._offsets else None
            self._fixed = cacheable.check_attention(layers, self.sizes)  # type: ignore[arg-type]
        except cacheable.NotCacheable as error:
            raise NotServable(f"serve: keys and values can't be cached: {error}") from error
        heads, dim, _, dtype = paged_attention.geometry(layers[0])
        self.geometry = Geometry(len(layers), heads, dim, dtype)
        self.device = value(layers[0]).device
        self.offsets_dtype = value(self._offsets).dtype
        self._fixed_numbers: dict[str, Any] = {}  # of the caller's, what they were

    def page(self, pools: Sequence[Tensor], max_pages: int) -> None:
        """Rewrite the graph for these pools.

        Raises:
            NotServable
        """
        assert self.sizes is not None and self._offsets is not None
        self.inputs = placeholders(self.graph)
        try:
            paged = paged_attention.run(self.graph, pools, max_pages)
            fixed = self._fixed | cacheable.check_rows(self.graph, self.sizes, self._offsets, self._targets)
        except MixesRows as error:
            raise NotServable(f"serve: the model can't be computed for new tokens alone: {error}") from error
        except cacheable.NotCacheable as error:
            raise NotServable(f"serve: keys and values can't be cached: {error}") from error
        silu_in_place.run(self.graph.graph)
        silu_append.run(self.graph.graph)
        paged_gate.run(self.graph.graph)
        self._tensors, self._numbers = self._described(fixed)
        alive = set(self.graph.graph.nodes)
        reads = [node for node in dict.fromkeys(paged.reads) if node in alive]
        counts = [] if self._targets is None else [self._targets]
        self._sequences = Evaluation([self._offsets, *counts, *reads], self.inputs)
        self._is_read = [self.inputs.index(node) for node in self._sequences.reads]
        self.computed_whole = [node for node in paged.computed_whole if node in alive]
        self.rows = next(n for n in placeholders(self.graph) if n.name == "hstu_compile_rows")
        self._num_rows, self._num_tokens = expression(shape(self.rows)[0]).name, Size(self._tokens)
        of_tokens = [x for x in self.inputs if x not in self._sequences.reads and self.sizes.is_of_tokens(x)]
        self.padding = Padding(self.inputs, self.sizes, picked_inputs.run(of_tokens, self.rows))
        self.graph = fx.GraphModule(self.graph, self.graph.graph)  # Dynamo does not enter the lazy one of make_fx
        (output,) = self.graph.graph.find_nodes(op="output")
        self._outputs = [
            [(dim, Size(n)) for dim, n in enumerate(shape(node)) if not isinstance(n, int)] if is_tensor(node) else None
            for node in output.args[0]
        ]

    def words(self) -> list[str]:
        """What is computed, and how."""
        lines = str(self._call.report).splitlines()
        lines += [f"computed for all rows: {node.name} at {source_line(node)}" for node in self.computed_whole]
        lines += [f"must be the same in every request: {number.name}" for number in self._numbers if number.is_fixed]
        return lines

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        """What a request asks for.

        Raises:
            ValueError: an argument is not as when the model was captured.
        """
        inputs = self._call.inputs(args, kwargs)
        symbols = self._check(inputs)
        begins, *others = self._read(inputs)
        offsets = begins.tolist()
        if (tokens := self._num_tokens.of(symbols)) is not None and tokens < offsets[-1]:
            raise ValueError(
                f"serve: the last offset is {offsets[-1]}, expected at most {tokens}, the number of tokens"
            )
        lengths = histories = first_read = [end - begin for begin, end in itertools.pairwise(offsets)]
        if self._targets is not None:
            histories = [n - targets for n, targets in zip(lengths, others.pop(0).tolist(), strict=True)]
        if others:
            first_read = _first_read(offsets, lengths, [x.long().reshape(-1).numpy() for x in others])
        return Request(inputs, symbols, offsets, lengths, histories, first_read)

    def offsets(self, inputs: Sequence[Any]) -> list[int]:
        """[B + 1], of a request with these inputs."""
        return self._read(inputs)[0].tolist()

    def _read(self, inputs: Sequence[Any]) -> list[Tensor]:
        """Offsets, counts of candidates where there are some, and rows that are read of the result."""
        given = [inputs[i] for i in self._is_read]
        return self._sequences([x.cpu() if isinstance(x, Tensor) else x for x in given])

    def _described(self, fixed: Collection[fx.Node]) -> tuple[list[_TensorInput], list[_NumberInput]]:
        """The inputs, as `_check` wants them. fixed: numbers that must be the same in every request."""
        tensors, numbers, names = [], [], self._call.names
        for position, node in enumerate(self.inputs):
            name, known = names[node.name], value(node)
            if isinstance(known, Tensor):
                tensors.append(_TensorInput(position, name, known.dtype, [Size(n) for n in known.shape]))
            else:
                found = expression(known)
                numbers.append(_NumberInput(position, name, found.name if found.is_Symbol else None, node in fixed))
        return tensors, numbers

    def _check(self, inputs: Sequence[Any]) -> dict[str, int]:
        """The symbols of sizes and numbers in these inputs."""
        symbols: dict[str, int] = {}
        for position, name, dtype, sizes in self._tensors:
            given = inputs[position]
            if not isinstance(given, Tensor) or given.dtype != dtype or given.dim() != len(sizes):
                found = (given.dtype, tuple(given.shape)) if isinstance(given, Tensor) else given
                raise ValueError(f"serve: {name} is {found}, expected {dtype}, {len(sizes)} dims")
            for size, actual in zip(sizes, given.shape, strict=True):
                size.check(name, actual, symbols)
        for position, name, symbol, is_fixed in self._numbers:
            given = inputs[position]
            if is_fixed and (before := self._fixed_numbers.setdefault(name, given)) != given:
                raise ValueError(
                    f"serve: {name} is {given}, expected {before} as before: "
                    "keys and values of cached tokens depend on it"
                )
            if symbol is not None:
                symbols.setdefault(symbol, given)
        return symbols

    def cut(self, outputs: Sequence[Any], request: Request, rows: int) -> list[Any]:
        """Outputs of padded inputs without what was added."""
        symbols = request.symbols | {self._num_rows: rows}
        found = []
        for x, sizes in zip(outputs, self._outputs, strict=True):
            for dim, size in sizes or ():
                if (actual := size.of(symbols)) is not None:
                    x = x.narrow(dim, 0, actual)
            found.append(x)
        return found

    @property
    def rebuild(self) -> Callable[[Sequence[Any]], Any]:
        """What the model returns, of the graph's outputs."""
        return self._call.outputs

    def holds(self, model: nn.Module) -> bool:
        """Whether the model is made of the tensors that were captured."""
        return self._call.holds(model)


def _sequences(node: fx.Node) -> tuple[Any, fx.Node | None, fx.Node | None]:
    """The number of tokens, offsets and counts of candidates of an attention."""
    return shape(node)[0], argument(node, 3, "seq_offsets"), argument(node, 5, "num_targets")


def _first_read(offsets: list[int], lengths: list[int], read: Sequence[np.ndarray]) -> list[int]:
    """[B]: the first position of each sequence among these rows; its length where there is none."""
    begins, first = np.array(offsets), np.array(lengths)
    for rows in read:
        rows = rows[(rows >= 0) & (rows < offsets[-1])]
        sequence = begins.searchsorted(rows, side="right") - 1
        np.minimum.at(first, sequence, rows - begins[sequence])
    return first.tolist()
