"""Layer norm and RMS norm over the last dimension, written out.

    y / sqrt(mean(y * y) + eps)        RMS norm of y; where y = x - mean(x), layer norm of x
    y / sqrt(var(x) + eps)             layer norm of x

The root is that of a product or a quotient, a power, its own reciprocal; the mean square of y or the variance of x,
together with x's mean or apart from it. Casts may stand anywhere.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx

from hstu_compile.passes.graph import argument, aten, is_call, is_cast, is_tensor, look_through, number, shape, value

_SQUARES = (aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.square.default)
_ADDS = (aten.add.Tensor, aten.add.Scalar)
_VARIANCES = (aten.var.dim, aten.var.correction, aten.var_mean.dim, aten.var_mean.correction)


@dataclass
class WrittenNorm:
    """norm(x), without an affine; interior: every call from its last up to x."""

    x: fx.Node
    eps: float
    rms: bool
    interior: list[fx.Node] = field(default_factory=list)


def as_written(node: fx.Node) -> WrittenNorm | None:
    """The normalisation that ends in this product or quotient."""
    for y, radicand, passed in _quotients(node):
        found = _norm(y, radicand, passed)
        if found is not None and isinstance(shape(node)[-1], int):
            found.interior = list(dict.fromkeys([node, *passed]))
            return found
    return None


def _norm(y: fx.Node, radicand: fx.Node, passed: list[fx.Node]) -> WrittenNorm | None:
    add = _behind_casts(radicand, passed)
    eps = number(add.args[1]) if is_call(add, *_ADDS) else None
    if eps is None:
        return None
    passed.append(add)
    statistic = _behind_casts(add.args[0], passed)  # type: ignore[arg-type]
    centred = _centred(y, passed)
    variance_of = _statistic(statistic, "variance", passed)
    if variance_of is not None:
        fits = centred is not None and look_through(centred) is look_through(variance_of)
        return WrittenNorm(centred, float(eps), False) if fits else None  # type: ignore[arg-type]
    square = _behind_casts(mean_of, passed) if (mean_of := _statistic(statistic, "mean", passed)) is not None else None
    if square is None or not is_call(square, *_SQUARES):
        return None
    passed.append(square)
    factors = [square.args[0]] if square.args[1:] in ((), (2,)) else list(square.args)
    if not all(isinstance(factor, fx.Node) for factor in factors):
        return None
    if all(look_through(factor) is look_through(y) for factor in factors):  # type: ignore[arg-type]
        return WrittenNorm(y if centred is None else centred, float(eps), centred is None)
    again = [_centred(factor, passed) for factor in factors]  # type: ignore[arg-type]
    if centred is None or any(x is None or look_through(x) is not look_through(centred) for x in again):
        return None
    return WrittenNorm(centred, float(eps), False)


def _quotients(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, list[fx.Node]]]:
    """(y, s, calls passed) where the node may be y / sqrt(s)."""
    if len(node.args) != 2 or not all(isinstance(arg, fx.Node) and is_tensor(arg) for arg in node.args):
        return
    one, other = node.args
    if is_call(node, aten.mul.Tensor):
        for y, scale in ((one, other), (other, one)):
            passed: list[fx.Node] = []
            radicand = _root(scale, -0.5, passed)  # type: ignore[arg-type]
            if radicand is not None:
                yield y, radicand, passed  # type: ignore[misc]
    elif is_call(node, aten.div.Tensor):
        passed = []
        radicand = _root(other, 0.5, passed)  # type: ignore[arg-type]
        if radicand is not None:
            yield one, radicand, passed  # type: ignore[misc]


def _root(node: fx.Node, exponent: float, passed: list[fx.Node]) -> fx.Node | None:
    """s where the node is s ** exponent, of 0.5 and -0.5."""
    node = _behind_casts(node, passed)
    passed.append(node)
    if is_call(node, aten.pow.Tensor_Scalar) and node.args[1] == exponent:
        return node.args[0]  # type: ignore[return-value]
    if is_call(node, aten.sqrt.default if exponent > 0 else aten.rsqrt.default):
        return node.args[0]  # type: ignore[return-value]
    if is_call(node, aten.reciprocal.default):
        return _root(node.args[0], -exponent, passed)  # type: ignore[arg-type]
    return None


def _behind_casts(node: fx.Node, passed: list[fx.Node]) -> fx.Node:
    while is_cast(node):
        passed.append(node)
        node = node.all_input_nodes[0]
    return node


def _centred(node: fx.Node, passed: list[fx.Node]) -> fx.Node | None:
    """x where the node is x - mean(x)."""
    calls: list[fx.Node] = []
    node = _behind_casts(node, calls)
    if not is_call(node, aten.sub.Tensor) or node.kwargs or len(node.args) != 2:
        return None
    x, mean = node.args
    if not isinstance(x, fx.Node) or not isinstance(mean, fx.Node):
        return None
    calls.append(node)
    of = _statistic(_behind_casts(mean, calls), "mean", calls)
    if of is None or look_through(of) is not look_through(x):
        return None
    passed += calls
    return x


def _statistic(node: fx.Node, name: str, passed: list[fx.Node]) -> fx.Node | None:
    """x where the node is its mean, or its variance (not Bessel's), over the last dimension, which is kept."""
    calls, place = [node], None
    if is_call(node, operator.getitem):
        node, place = node.args  # type: ignore[assignment]
        calls.append(node)
        if not is_call(node, aten.var_mean.dim, aten.var_mean.correction) or place != {"variance": 0, "mean": 1}[name]:
            return None
    elif not is_call(node, *(_VARIANCES[:2] if name == "variance" else (aten.mean.dim,))):
        return None
    x, dims = node.args[0], argument(node, 1, "dim")
    if is_call(node, aten.mean.dim):
        keepdim, biased = argument(node, 2, "keepdim", False), True
    elif is_call(node, aten.var.dim, aten.var_mean.dim):
        biased, keepdim = not argument(node, 2, "unbiased", True), argument(node, 3, "keepdim", False)
    else:
        biased, keepdim = argument(node, 2, "correction", 1) == 0, argument(node, 3, "keepdim", False)
    if not (isinstance(x, fx.Node) and keepdim and (biased or name == "mean")):
        return None
    if dims is None or len(dims) != 1 or dims[0] not in (-1, value(x).dim() - 1):
        return None
    passed += calls
    return x
