"""A captured model over a paged cache: what a request is to it, and the graph that computes its new rows."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, fx, nn

from hstu_compile.capture import placeholders
from hstu_compile.passes import cacheable, paged_attention, silu_in_place
from hstu_compile.passes.batch_sizes import BatchSizes, expression
from hstu_compile.passes.evaluate import Evaluation
from hstu_compile.passes.graph import argument, shape, value
from hstu_compile.passes.report import source_line
from hstu_compile.passes.row_wise import MixesRows
from hstu_compile.serving.captured_call import CapturedCall
from hstu_compile.serving.padding import Padding


class NotServable(RuntimeError):
    """The model can't be computed from a cache; the message names the call, its line and why."""


class OneToken(RuntimeError):
    """A call of one token can't be captured for any number of them."""


@dataclass
class Request:
    """The sequences of a request, as its arguments say."""

    inputs: list[Any]  # of the graph
    symbols: dict[sympy.Symbol, int]  # sizes and numbers of the graph, in this request
    offsets: np.ndarray  # [B + 1]
    targets: np.ndarray  # [B]
    first_read: np.ndarray  # [B]: the first position that is read of the result

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @functools.cached_property
    def histories(self) -> np.ndarray:
        return self.lengths - self.targets


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
        self._numbers: dict[str, Any] = {}  # the caller's that must not change

    def page(self, pools: Sequence[Tensor], max_pages: int) -> None:
        """Rewrite the graph for these pools.

        Raises:
            NotServable
        """
        assert self.sizes is not None and self._offsets is not None
        self.inputs = placeholders(self.graph)
        self._names = self._call.names
        try:
            paged = paged_attention.run(self.graph, pools, max_pages)
            fixed = self._fixed | cacheable.check_rows(self.graph, self.sizes, self._offsets, self._targets)
        except MixesRows as error:
            raise NotServable(f"serve: the model can't be computed for new tokens alone: {error}") from error
        except cacheable.NotCacheable as error:
            raise NotServable(f"serve: keys and values can't be cached: {error}") from error
        silu_in_place.run(self.graph.graph)
        self.fixed_numbers = [node.name for node in self.inputs if node in fixed]
        alive = set(self.graph.graph.nodes)
        reads = [node for node in dict.fromkeys(paged.reads) if node in alive]
        counts = [] if self._targets is None else [self._targets]
        self._sequences = Evaluation([self._offsets, *counts, *reads], self.inputs)
        self.computed_whole = [node for node in paged.computed_whole if node in alive]
        self.graph = fx.GraphModule(self.graph, self.graph.graph)  # Dynamo does not enter the lazy one of make_fx
        (output,) = self.graph.graph.find_nodes(op="output")
        self._outputs = [value(node) for node in output.args[0]]
        self.rows = next(n for n in placeholders(self.graph) if n.name == "hstu_compile_rows")
        self.padding = Padding(self.inputs, self.sizes)

    def words(self) -> list[str]:
        """What is computed, and how."""
        lines = str(self._call.report).splitlines()
        lines += [f"computed for all rows: {node.name} at {source_line(node)}" for node in self.computed_whole]
        lines += [f"must be the same in every request: {self._names[name]}" for name in self.fixed_numbers]
        return lines

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Request:
        """What a request asks for.

        Raises:
            ValueError: an argument is not as when the model was captured.
        """
        inputs = self._call.inputs(args, kwargs)
        symbols = self._check(inputs)
        offsets, *others = self._read(inputs)
        targets = others.pop(0) if self._targets is not None else np.zeros(len(offsets) - 1, dtype=np.int64)
        first_read = np.diff(offsets)
        for rows in others:
            rows = rows[(rows >= 0) & (rows < offsets[-1])]
            sequence = np.searchsorted(offsets, rows, side="right") - 1
            np.minimum.at(first_read, sequence, rows - offsets[sequence])
        return Request(inputs, symbols, offsets, targets, first_read)

    def offsets(self, inputs: Sequence[Any]) -> np.ndarray:
        """[B + 1], of a request with these inputs."""
        return self._read(inputs)[0]

    def _read(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """Offsets, counts of candidates where there are some, and rows that are read of the result."""
        read = [(n, x) for n, x in zip(self.inputs, inputs, strict=True) if n in self._sequences.reads]
        given = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in read}
        return [x.long().reshape(-1).numpy() for x in self._sequences(given)]

    def _check(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """The symbols of sizes and numbers in these inputs."""
        symbols: dict[sympy.Symbol, int] = {}
        numbers = []
        for node, given in zip(self.inputs, inputs, strict=True):
            known = value(node)
            if not isinstance(known, Tensor):
                if node.name in self.fixed_numbers and self._numbers.setdefault(node.name, given) != given:
                    before = self._numbers[node.name]
                    raise ValueError(
                        f"serve: {self._names[node.name]} is {given}, expected {before} as before: "
                        "keys and values of cached tokens depend on it"
                    )
                numbers.append((known, given))
                continue
            if not isinstance(given, Tensor) or (given.dtype, given.dim()) != (known.dtype, known.dim()):
                found = (given.dtype, tuple(given.shape)) if isinstance(given, Tensor) else given
                raise ValueError(
                    f"serve: {self._names[node.name]} is {found}, expected {known.dtype}, {known.dim()} dims"
                )
            for size, actual in zip(known.shape, given.shape, strict=True):
                _agree(self._names[node.name], size, actual, symbols)
        for known, given in numbers:
            if expression(known).is_Symbol:
                symbols.setdefault(expression(known), given)
        return symbols

    def cut(self, outputs: Sequence[Any], request: Request, rows: int) -> list[Any]:
        """Outputs of padded inputs without what was added."""
        symbols = request.symbols | {expression(shape(self.rows)[0]): rows}
        return [_cut(x, known, symbols) for x, known in zip(outputs, self._outputs, strict=True)]

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


def _agree(name: str, size: Any, actual: int, symbols: dict[sympy.Symbol, int]) -> None:
    """Sizes of this call's inputs that were equal, or constant, when the model was captured must be so again."""
    known = expression(size)
    symbol, rest = _linear(known)
    if symbol is not None:
        if symbols.setdefault(symbol, actual - rest) != actual - rest:
            raise ValueError(f"serve: a size of {name} is {actual}, expected {symbols[symbol] + rest} as in the others")
        return
    known = known.xreplace({s: sympy.Integer(n) for s, n in symbols.items()})
    if known.is_Integer and int(known) != actual:
        raise ValueError(f"serve: a size of {name} is {actual}, expected {known}")


def _cut(x: Any, known: Any, symbols: Mapping[sympy.Symbol, int]) -> Any:
    if not isinstance(x, Tensor):
        return x
    for dim, size in enumerate(known.shape):
        symbol, rest = _linear(expression(size))
        if symbol in symbols:
            x = x.narrow(dim, 0, symbols[symbol] + rest)
        elif not isinstance(size, int) and expression(size).free_symbols <= symbols.keys():
            x = x.narrow(dim, 0, int(expression(size).xreplace({s: sympy.Integer(n) for s, n in symbols.items()})))
    return x


@functools.cache
def _linear(size: sympy.Expr) -> tuple[sympy.Symbol | None, int]:
    """(symbol, n) of a size symbol + n."""
    if len(size.free_symbols) == 1:
        (symbol,) = size.free_symbols
        if (size - symbol).is_Integer:
            return symbol, int(size - symbol)
    return None, 0
