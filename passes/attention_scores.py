"""From the second product back to the first: the pointwise chain that turns scores into attention weights.

    weights = silu(alpha * q kT * factors + biases) * weight factors / divisors

The chain is read call by call from the weights upwards; what the factors and biases mean is decided later.
"""

from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import torch
from torch import fx

from hstu_compile.passes import report
from hstu_compile.passes.activation import as_activation
from hstu_compile.passes.attention_mask import silu_of_fill_is_zero
from hstu_compile.passes.axes import LAYOUT, Axes, Dims, aligned
from hstu_compile.passes.graph import (
    argument,
    aten,
    insert_call,
    is_call,
    is_cast,
    is_floating,
    is_tensor,
    look_through,
    number,
    reads_only_metadata,
    same_shape,
    shape,
    value,
)
from hstu_compile.passes.products import Product, as_product
from hstu_compile.passes.report import UNKNOWN, source_line, spoken
from hstu_compile.passes.zero_one import is_zero_or_one

LONGEST_CHAIN = 64
ALONE = "only what is made of weights @ v; to look at the {}, compute them outside the compiled model (same numbers)"

MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar}
DIVIDE = {
    aten.div.Tensor,
    aten.div.Scalar,
    aten.divide.Tensor,
    aten.divide.Scalar,
    aten.true_divide.Tensor,
    aten.true_divide.Scalar,
}
ADD = {aten.add.Tensor, aten.add.Scalar}
SUBTRACT = {aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar}
FILL = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
TRIANGLE = {aten.tril.default, aten.triu.default}


class Misfit(report.Misfit):
    """The first thing that did not fit: the node, why, and what would."""

    def __init__(self, node: fx.Node, reason: str, change: str | None = None):
        super().__init__(reason, change)
        self.node = node


@dataclass(frozen=True)
class Term:
    """A factor of the weights or the scores: a symbolic scalar, or a tensor that broadcasts against `dims`.

    role: "multiplies", "divides", or as a mask "keeps" (zero where false), "drops" (zero where true).
    """

    node: fx.Node
    dims: Dims  # of the node itself
    role: Literal["multiplies", "divides", "keeps", "drops"]
    around: Dims = ()  # of what it is applied to


@dataclass(frozen=True)
class Bias:
    """Added to the scores: scale * node * the factors."""

    node: fx.Node
    dims: Dims
    around: Dims
    scale: float
    factors: tuple[Term, ...]


@dataclass
class Scores:
    """What was read between the two products."""

    product: Product
    dims: Dims = ()  # of the product
    alpha: float = 1.0
    factors: list[Term] = field(default_factory=list)  # of the scores, before silu
    biases: list[Bias] = field(default_factory=list)
    masks: list[Term] = field(default_factory=list)  # "keeps" or "drops": zero in scores before silu, or in weights
    weights: list[Term] = field(default_factory=list)  # factors of the weights, after silu; also "keeps" and "drops"
    multiplier: float = 1
    divisor: float = 1
    dims_of: dict[fx.Node, Dims] = field(default_factory=dict)  # of every node that disappears
    silu: fx.Node | None = None


def find_chain(weights: fx.Node) -> list[fx.Node] | None:
    """The calls from `weights` up to a product, each the main input of the one before; preferably through a silu."""
    best: dict[fx.Node, list[fx.Node] | None] = {}

    def search(node: fx.Node, depth: int) -> list[fx.Node] | None:
        if node in best:
            return best[node]
        best[node] = None
        if node.op != "call_function" or depth > LONGEST_CHAIN or not is_floating(node):
            return None
        if as_product(node):
            best[node] = [node]
            return best[node]
        found = [chain for parent in _main_inputs(node) if (chain := search(parent, depth + 1))]
        found.sort(key=lambda chain: not any(is_silu(n) for n in chain))
        best[node] = [node, *found[0]] if found else None
        return best[node]

    return search(weights, 0)


def _main_inputs(node: fx.Node) -> list[fx.Node]:
    if is_call(node, *LAYOUT) or is_cast(node):
        return node.all_input_nodes[:1]
    gated = _silu_argument(node)
    if gated is not None:
        return [gated]
    return [n for n in node.all_input_nodes if is_floating(n) and same_shape(shape(n), shape(node))]


def _silu_argument(node: fx.Node) -> fx.Node | None:
    """x, if the call is silu(x) or x * sigmoid(x)."""
    found = as_activation(node)
    return found[1] if found is not None and found[0] == "silu" else None


def is_silu(node: fx.Node) -> bool:
    return _silu_argument(node) is not None


def nonlinearity(chain: list[fx.Node]) -> fx.Node | None:
    """The first call of a chain that is neither linear nor layout: the silu, or what stands in its place."""
    linear = LAYOUT | MULTIPLY | DIVIDE | ADD | SUBTRACT | FILL | WHERE | TRIANGLE
    linear |= {aten.dropout.default, aten.neg.default}
    strange = [n for n in chain[:-1] if is_silu(n) or not (is_call(n, *linear) or is_cast(n))]
    return next(iter(sorted(strange, key=lambda n: not is_silu(n))), None)


def read_chain(chain: list[fx.Node], dims: Dims, axes: Axes) -> Scores:
    """Interpret the chain, whose first node holds `dims`. Raises Misfit at the first call that is not understood."""
    product = as_product(chain[-1])
    assert product is not None
    scores = Scores(product)
    for node, main in zip(chain[:-1], chain[1:], strict=True):
        scores.dims_of[node] = dims
        if is_call(node, *LAYOUT):
            earlier = axes.before(node, dims)
            if earlier is None:
                raise Misfit(
                    node,
                    "a change of shape that mixes the axes of the scores",
                    "keep batch, head, query and key in dimensions of their own",
                )
            dims = earlier
        elif is_cast(node):
            pass
        elif is_call(node, aten.dropout.default):
            p, train = argument(node, 1, "p"), argument(node, 2, "train")
            if train and number(p) != 0:
                raise Misfit(
                    node,
                    "dropout on the attention weights",
                    "leave it out; dropout after norm and gate is fused (another model in training, the same in eval)",
                )
        elif is_silu(node):
            if scores.silu is not None:
                raise Misfit(node, "a second silu between scores and weights")
            scores.silu = node
            for gate in node.all_input_nodes:  # the sigmoid, and casts beside the chain, belong to it
                while gate not in (main, look_through(main)):
                    scores.dims_of[gate] = dims
                    (gate,) = gate.all_input_nodes[:1]
        else:
            _read_call(node, main, dims, scores)
    scores.dims_of[product.node] = scores.dims = dims
    if product.addend is not None:
        _add(product.addend, product.beta, dims, scores)
    scores.alpha *= product.alpha
    return scores


def _read_call(node: fx.Node, main: fx.Node, dims: Dims, scores: Scores) -> None:
    before_silu = scores.silu is not None  # the chain is read backwards
    selected = selection(node, main)
    scaled = scaling(node, main)
    added = addition(node, main)
    if selected is not None:
        mask, fill, acts = selected
        if fill is None:
            raise Misfit(
                node, "fills with a value that is not known to be constant", "fill with the number 0, after silu"
            )
        if before_silu:
            fill *= scores.alpha
            scaled_later = fill and scores.factors
            if scores.biases or scaled_later or not _vanishes(fill, node):
                raise Misfit(
                    node,
                    f"masked with {fill:g} before silu, which gives {'not exactly 0' if isfinite(fill) else 'NaN'}",
                    "mask after silu, with 0: F.silu(scores).masked_fill(~mask, 0), or F.silu(scores) * mask "
                    "(same numbers in rows that have no NaN now)",
                )
        elif fill != 0:
            raise Misfit(node, f"masked with {fill:g}, not 0, after silu", "fill with 0")
        (scores.masks if before_silu else scores.weights).append(Term(mask, aligned(mask, dims), acts, dims))
    elif scaled is not None:
        other, role = scaled
        constant = number(other)
        if constant is not None:
            if constant == 0:
                raise Misfit(node, "multiplies or divides by 0")
            if before_silu:
                scores.alpha = scores.alpha * constant if role == "multiplies" else scores.alpha / constant
            elif role == "multiplies":
                scores.multiplier *= constant
            else:
                scores.divisor *= constant
            return
        term = Term(other, aligned(other, dims) if is_tensor(other) else (), role, dims)
        if not before_silu:
            scores.weights.append(term)
        elif role == "multiplies" and is_tensor(other) and is_zero_or_one(other) and not scores.biases:
            scores.masks.append(Term(other, term.dims, "keeps", dims))  # silu(0) = 0
        else:
            scores.factors.append(term)
    elif added is not None and before_silu:
        _add(*added, dims, scores)
    elif added is not None:
        raise Misfit(
            node,
            "something is added to the attention weights after silu",
            "add it to the scores, before silu (another model)",
        )
    else:
        change = "scale, bias and mask are what fits beside silu (another model)"
        raise Misfit(node, f"{spoken(node)} on the attention {'scores' if before_silu else 'weights'}", change)


def _vanishes(fill: float, node: fx.Node) -> bool:
    return fill == 0 or silu_of_fill_is_zero(fill, value(node).dtype)


def _add(other: Any, scale: float, dims: Dims, scores: Scores) -> None:
    constant, product = number(other), scores.product.node
    if constant == 0:
        return
    if constant is not None:
        kwargs = {"dtype": value(product).dtype, "device": value(product).device}
        other = insert_call(product.graph, product, aten.full.default, ([], constant), kwargs, like=product)
    if not isinstance(other, fx.Node) or not is_floating(other):
        raise Misfit(product, "the bias of the scores is not a floating-point tensor", "bias.to(scores.dtype)")
    bias = Bias(other, aligned(other, dims), dims, scale * scores.alpha, tuple(scores.factors))
    scores.biases.append(bias)


def scaling(node: fx.Node, main: fx.Node) -> tuple[Any, Literal["multiplies", "divides"]] | None:
    if is_call(node, aten.neg.default):
        return -1, "multiplies"
    if is_call(node, *MULTIPLY) and node.args[0] is not node.args[1]:
        return (node.args[1] if node.args[0] is main else node.args[0]), "multiplies"
    if is_call(node, *DIVIDE) and node.args[0] is main and node.args[1] is not main:
        return node.args[1], "divides"
    return None


def addition(node: fx.Node, main: fx.Node) -> tuple[Any, float] | None:
    if not is_call(node, *ADD, *SUBTRACT) or node.args[0] is node.args[1]:
        return None
    alpha = argument(node, 2, "alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    if node.args[0] is main:
        return node.args[1], (alpha if is_call(node, *ADD) else -alpha)
    return (node.args[0], 1) if is_call(node, *ADD) and alpha == 1 else None


def selection(node: fx.Node, main: fx.Node) -> tuple[fx.Node, float | None, Literal["keeps", "drops"]] | None:
    """The mask, the value of the cells that are not selected (None if unknown), and which cells those are."""
    args: tuple[Any, ...] = node.args
    if is_call(node, *FILL) and args[0] is main:
        return args[1], number(args[2]), "drops"
    if is_call(node, *WHERE):
        if args[1] is main and args[2] is not main:
            return args[0], number(args[2]), "keeps"
        if args[2] is main and args[1] is not main:
            return args[0], number(args[1]), "drops"
    if is_call(node, *TRIANGLE):
        ones = insert_call(node.graph, node, aten.ones_like.default, (main,), {"dtype": torch.bool}, like=node)
        return insert_call(node.graph, node, node.target, (ones, *args[1:]), like=node), 0, "keeps"  # type: ignore
    return None


def refuse_other_users(scores: Scores, second: fx.Node) -> None:
    """Raises Misfit if somebody outside the region reads the scores or the weights."""
    for node in scores.dims_of:
        for user in node.users:
            if user in scores.dims_of or user is second or reads_only_metadata(user):
                continue
            name = _name(scores, node)
            if user.op == "output":
                line = source_line(user)
                at = "" if line == UNKNOWN else f" at {line}"
                raise Misfit(node, f"the attention {name} leave the graph{at}", f"return {ALONE.format(name)}")
            raise Misfit(user, f"the attention {name} are used here too", f"use {ALONE.format(name)}")


def _name(scores: Scores, node: fx.Node) -> str:
    from_weights_on = list(scores.dims_of)
    return "weights" if node in from_weights_on[: from_weights_on.index(scores.silu) + 1] else "scores"  # type: ignore
