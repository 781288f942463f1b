"""A tensor of the graph at coordinates of one's choice, as new nodes: the large tensor itself is never made.

What is read where is worked out by the very handlers with which the expression was understood (`index_space`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from hstu_compile.passes.contents import assume
from hstu_compile.passes.graph import aten, insert_call, is_tensor, own, value
from hstu_compile.passes.index_space import IndexSpace, is_scalar, symbols_of
from hstu_compile.passes.index_space_ops import Coords, NotUnderstood
from hstu_compile.passes.mask_inputs import Expression

Leaves = Mapping[fx.Node, Callable[[Coords], Tensor]]


class Symbolic(IndexSpace):
    """The index space in which sizes stay what they are in the graph: arithmetic on its symbols."""

    def __init__(self, symbols: dict[Any, Any], leaves: Leaves) -> None:
        super().__init__({}, leaves, rank=2)
        self._sizes = symbols

    def scalar(self, value: Any) -> Any:
        value = value.meta["val"] if isinstance(value, fx.Node) else value
        if isinstance(value, Tensor):
            raise NotUnderstood("a number that is read from a tensor")
        if not symbols_of(value):
            return super().scalar(value)
        return sympy_interp(PythonReferenceAnalysis, self._sizes, value.node.expr)


MakeSpace = Callable[[Leaves], Symbolic]


def relocated(
    read: Expression,
    given: Sequence[fx.Node],
    build: Callable[[MakeSpace, Sequence[Tensor]], Tensor],
    device: torch.device,
    before: fx.Node,
    like: fx.Node,
) -> fx.Node:
    """A node inserted before `before`, on the source line of `like`, that holds what `build` computes.

    read: the expression that is evaluated; it ends at its leaves, which are read at coordinates.
    build(space, tensors): gets a function that makes the space for it, and the tensors of the nodes in `given`.
    """
    known = [node for node in read.nodes if is_tensor(node) and node.op in ("placeholder", "get_attr")]
    leaves = list(dict.fromkeys([*(leaf for leaf in read.leaves if is_tensor(leaf)), *known]))
    symbols = _symbols(before)
    inputs = [*leaves, *given, *symbols.values()]

    def traced(*held: Any) -> Tensor:
        own = iter(held)
        readers = {leaf: _reader(tensor) for leaf, tensor in zip(leaves, own, strict=False)}
        others = [next(own) for _ in given]
        sizes = dict(zip(symbols, own, strict=True))
        return build(lambda more: Symbolic(sizes, {**readers, **more}), others)

    mode = value(before).fake_mode
    with mode, torch.device(device), _real_constants(mode):
        try:
            gm = make_fx(traced, pre_dispatch=True)(*map(value, inputs))
        except (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
            raise NotUnderstood(f"{like.name} can't be read elsewhere: {error}") from error
    gm.graph.eliminate_dead_code()
    for buffer in read.buffers:
        assume(buffer)
    return _copied(gm, inputs, device, before, like)


def _symbols(before: fx.Node) -> dict[sympy.Symbol, fx.Node]:
    """A node for every symbol of the graph that is known there."""
    found: dict[sympy.Symbol, fx.Node] = {}

    for node in list(before.graph.nodes):
        if node is before:
            break
        if is_scalar(node) and _symbol(value(node)) not in (None, *found):
            found[value(node).node.expr] = node
        for dim, size in enumerate(value(node).shape if is_tensor(node) else ()):
            if _symbol(size) not in (None, *found):
                call = aten.sym_size.int
                found[size.node.expr] = insert_call(before.graph, before, call, (node, dim), like=before)
    return found


def _symbol(size: Any) -> sympy.Symbol | None:
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression if isinstance(expression, sympy.Symbol) else None


class _real_constants:
    """In it, a fake mode takes the numbers that handlers bring with them."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._before, self._mode.allow_non_fake_inputs = self._mode.allow_non_fake_inputs, True

    def __exit__(self, *error: object) -> None:
        self._mode.allow_non_fake_inputs = self._before


def _reader(tensor: Tensor) -> Callable[[Coords], Tensor]:
    """The values of a tensor at coordinates, of which some are numbers that are known here."""

    def read(coords: Coords) -> Tensor:
        result, at = tensor, []
        for coord in coords:
            if isinstance(coord, FakeTensor):
                at.append(coord if coord.device == tensor.device else coord.to(tensor.device))
            else:
                result = result.select(len(at), int(coord))
        return torch.ops.aten.index.Tensor(result, at) if at else result

    return read


def _copied(
    gm: fx.GraphModule, inputs: Sequence[fx.Node], device: torch.device, before: fx.Node, like: fx.Node
) -> fx.Node:
    graph = before.graph
    nodes = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(before):
        for node in gm.graph.nodes:
            if node.op == "output":
                return nodes[node.args[0]]
            if node.op == "placeholder":
                continue
            held = getattr(gm, str(node.target)) if node.op == "get_attr" else None
            if held is not None and held.dim() == 0:
                kwargs = {"dtype": held.dtype, "device": device}
                nodes[node] = insert_call(graph, before, aten.full.default, ([], held.item()), kwargs, like=like)
                continue
            new = nodes[node] = graph.node_copy(node, nodes.__getitem__)
            if held is not None:
                new.target = own(graph, held)
            new.meta = {"val": node.meta["val"]}
            for key in ("stack_trace", "nn_module_stack", "seq_nr", "recompute", "ac_graph_id"):
                if key in like.meta:
                    new.meta[key] = like.meta[key]
    raise AssertionError("a graph without an output")
