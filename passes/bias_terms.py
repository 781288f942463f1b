"""The bias of the scores as a sum of terms, each a function of batch, head, row and column."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hstu_compile.passes.attention_operands import Region
from hstu_compile.passes.attention_scores import ADD, DIVIDE, MULTIPLY, SUBTRACT, Bias
from hstu_compile.passes.axes import LAYOUT, Dims, aligned
from hstu_compile.passes.graph import Size, argument, aten, is_call, is_cast, is_tensor, number, same, same_shape, shape
from hstu_compile.passes.index_space import IndexSpace
from hstu_compile.passes.index_space_ops import ZERO, Coords, NotUnderstood

REPEATS = {aten.repeat.default, aten.repeat_interleave.self_int}

Cell = Mapping[str, Tensor]  # coordinates "b", "h", "i" (row) and "j" (column), which broadcast against each other


def split(region: Region, bias: Bias) -> list[Bias]:
    """Terms that sum up to the bias: additions are looked for behind layout, casts and constant factors."""
    node, dims, scale = bias.node, bias.dims, bias.scale
    while True:
        args = node.args
        if is_call(node, *LAYOUT) or is_cast(node):
            earlier = region.axes.before(node, dims)
            if earlier is None:
                break
            node, dims = node.all_input_nodes[0], earlier
            region.axes.locate(node, dims)
            continue
        if is_call(node, aten.slice.Tensor) and same_shape(shape(node), shape(node.all_input_nodes[0])):
            node = node.all_input_nodes[0]  # x[:, None] slices first
            continue
        if is_call(node, *REPEATS):
            fewer = _unrepeated(node, region.axes.resolve(dims))
            if fewer is None:
                break
            node, dims = node.all_input_nodes[0], fewer
            continue
        if is_call(node, *ADD, *SUBTRACT) and all(map(is_tensor, args[:2])):
            alpha = argument(node, 2, "alpha", 1)
            if not isinstance(alpha, (int, float)):
                break
            scales = scale, alpha * (scale if is_call(node, *ADD) else -scale)
            parts = [_operand(bias, part, dims, by) for part, by in zip(args[:2], scales, strict=True)]  # type: ignore
            return [term for part in parts for term in split(region, part)]
        constants = [k for k in (0, 1) if number(args[k]) is not None] if is_call(node, *MULTIPLY) else []
        constants += [1] if is_call(node, *DIVIDE) and number(args[1]) else []
        if len(constants) != 1 or not isinstance(args[1 - constants[0]], fx.Node):
            break
        factor = number(args[constants[0]])
        assert factor is not None
        scale = scale / factor if is_call(node, *DIVIDE) else scale * factor
        node = args[1 - constants[0]]  # type: ignore[assignment]
        dims = aligned(node, dims)
    return [replace(bias, node=node, dims=dims, scale=scale)]


def _unrepeated(node: fx.Node, dims: Dims) -> Dims | None:
    """The Dims of what is repeated, where that only repeats it for axes of the result that it lacks."""
    sizes, inner = shape(node.all_input_nodes[0]), is_call(node, aten.repeat.default)
    result = []
    for size, group in zip(sizes, dims[len(dims) - len(sizes) :], strict=True):
        parts = [group[len(group) - k :] if inner else group[:k] for k in range(len(group) + 1)]
        held = [part for part in parts if same(math.prod(axis.size for axis in part), size)]
        if not held:
            return None
        result.append(held[0])
    return tuple(result)


def _operand(bias: Bias, node: fx.Node, dims: Dims, scale: float) -> Bias:
    return replace(bias, node=node, dims=aligned(node, dims), scale=scale)


@dataclass(frozen=True)
class Term:
    """A tensor that is added to the scores, and the sizes of what they are over.

    names: what its dimensions are, as in `attention_mask.MaskTerm.layout`.
    """

    node: fx.Node
    names: tuple[str, ...]
    sizes: Mapping[str, Size]

    def value(self, space: IndexSpace, cell: Cell) -> Tensor:
        """The term at cells, in whatever coordinates its own dimensions fold them."""
        return space.value(self.node, self._coords(space, cell))

    def _coords(self, space: IndexSpace, cell: Cell) -> Coords:
        coords = []
        for size, name in zip(shape(self.node), self.names, strict=True):
            at: Tensor = ZERO
            for k, axis in enumerate(name):
                at = cell[axis] if k == 0 else at * space.scalar(self.sizes[axis]) + cell[axis]
            coords.append(at)
            if not name and space.scalar(size) != 1:
                raise NotUnderstood(f"a dimension of {self.node.name} is none of batch, head, row and column")
        return tuple(coords)


def whole(size: Any, dim: int, ndim: int, device: torch.device) -> Tensor:
    """Coordinates 0..size-1 along one of `ndim` dimensions."""
    return torch.arange(size, device=device).view([size if k == dim else 1 for k in range(ndim)])
