"""Layer norm, group norm and RMS norm, as one call or written out, as statistics over runs of consecutive elements."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    argument,
    aten,
    is_call,
    is_cast,
    is_tensor,
    same,
    shape,
    value,
)
from hstu_compile.passes.written_norm import as_written


@dataclass(frozen=True)
class Norm:
    """node = norm(x) * weight + bias, in row-major order: statistics over each run of `run` elements.

    weight and bias repeat every `period` elements; there they have the shape `affine_shape`, which broadcasts against
    [period // run, run].
    """

    node: fx.Node
    x: fx.Node
    name: str
    run: int
    eps: float
    rms: bool
    interior: tuple[fx.Node, ...]  # every call from node up to x, x not included
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    period: int = 0
    affine_shape: tuple[int, ...] = ()

    @property
    def has_affine(self) -> bool:
        return self.weight is not None or self.bias is not None


def as_norm(node: fx.Node) -> Norm | None:
    """The normalisation that ends in this node, its affine included; None where it is none of the known spellings."""
    return _native(node) or _written(node) or _written_affine(node)


def _native(node: fx.Node) -> Norm | None:
    if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
        rms = node.target is aten.rms_norm.default
        x = node.all_input_nodes[0]
        run = _product(node.args[1])
        eps = argument(node, 4 - rms, "eps", None if rms else 1e-5)
        if eps is None:  # the default of rms_norm
            eps = torch.finfo(torch.promote_types(value(x).dtype, torch.float32)).eps
        weight, bias = argument(node, 2, "weight"), None if rms else argument(node, 3, "bias")
        if run is None or not isinstance(eps, float):
            return None
        name = "rms_norm" if rms else "layer_norm"
        return Norm(node, x, name, run, eps, rms, (node,), weight, bias, run, (run,))
    if is_call(node, aten.group_norm.default):
        x = node.all_input_nodes[0]
        groups, channel = node.args[1], _product(shape(x)[2:])
        channels = shape(x)[1]
        weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
        eps = argument(node, 4, "eps", 1e-5)
        if channel is None or not isinstance(channels, int) or not isinstance(groups, int) or channels % groups:
            return None
        run = channels // groups * channel
        affine = {run: (groups, 1), 1: (groups, run)}.get(channel)  # a number per group, or per element
        if affine is None and (weight is not None or bias is not None):
            return None
        name = f"group_norm ({groups} groups)"
        return Norm(node, x, name, run, eps, False, (node,), weight, bias, groups * run, affine or ())
    return None


def _product(sizes) -> int | None:
    return math.prod(sizes) if all(isinstance(n, int) for n in sizes) else None


def _written(node: fx.Node) -> Norm | None:
    found = as_written(node)
    if found is None:
        return None
    name = f"{'rms' if found.rms else 'layer'}_norm (written out)"
    run: int = shape(node)[-1]  # type: ignore[assignment]
    return Norm(node, found.x, name, run, found.eps, found.rms, tuple(found.interior), period=run)


def _written_affine(node: fx.Node) -> Norm | None:
    """norm * weight or norm + bias, with a vector along the last dimension."""
    scales = is_call(node, aten.mul.Tensor)
    if not (scales or is_call(node, aten.add.Tensor)) or len(node.args) != 2 or node.kwargs:
        return None
    sides: Any = (node.args, node.args[::-1])
    for inner, vector in sides:
        if not (is_tensor(inner) and isinstance(vector, fx.Node) and is_tensor(vector)) or len(shape(vector)) != 1:
            continue
        n, width, between = shape(vector)[0], shape(inner)[-1], []
        while is_cast(inner) or is_call(inner, *RESHAPES):
            between.append(inner)
            inner = inner.all_input_nodes[0]
        norm = as_norm(inner)
        if norm is None or norm.bias is not None or (scales and norm.weight is not None):
            continue
        if not isinstance(n, int) or not same(n, width) or n % norm.run:
            continue
        affine = (norm.run,) if n == norm.run else (n // norm.run, norm.run)
        if norm.has_affine and affine != norm.affine_shape:
            continue
        interior = (node, *between, *norm.interior)
        grown = replace(norm, node=node, interior=interior, period=n, affine_shape=affine)
        return replace(grown, weight=vector) if scales else replace(grown, bias=vector)
    return None
