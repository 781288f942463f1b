"""What stands around silu, as arguments of the op: mask, bias, divisor, and factors that move to q, k, v or the output.

out_i = sum_j c_j * silu(r_i * s_ij) * w_i * v_j   =   w_i * sum_j silu((r_i q_i) k_j) * (c_j v_j)
"""

from dataclasses import dataclass, field, replace

import torch
from torch import fx

from hstu_compile.passes.attention_mask import MaskMeaning, MaskTerm, Opaque, identify
from hstu_compile.passes.attention_operands import Layout, Region
from hstu_compile.passes.attention_scores import Bias, Misfit, Term
from hstu_compile.passes.axes import Axis, Dims, flat
from hstu_compile.passes.graph import aten, insert_call, is_tensor, may_require_grad, value


@dataclass
class Weights:
    """Everything the op needs beside q, k and v, still in terms of captured nodes."""

    meaning: MaskMeaning | Opaque = MaskMeaning(causal=False)
    masks: list[Term] = field(default_factory=list)  # what the op's mask operand is made of, if the mask is opaque
    biases: list[Bias] = field(default_factory=list)
    of_q: list[Term] = field(default_factory=list)
    of_k: list[Term] = field(default_factory=list)
    of_v: list[Term] = field(default_factory=list)
    of_output: list[Term] = field(default_factory=list)
    scaling_seq_len: int | float | fx.Node = 1


def read_weights(layout: Layout) -> Weights:
    """Give every factor and bias its place; raises Misfit where one has none."""
    region, scores, weights = layout.region, layout.region.scores, Weights()
    binary: list[Term] = []  # multiply the scores before silu: the same as after it, if they are 0 or 1
    for term in scores.factors:
        by_row, by_column = _varies(region, term)
        if by_row and by_column:
            binary.append(term)
        else:
            (weights.of_k if by_column else weights.of_q).append(term)

    cells: list[Term] = []  # mask candidates, by what they vary over
    rows: list[Term] = []
    columns: list[Term] = []
    for term in scores.masks + scores.weights + binary:
        by_row, by_column = _varies(region, term)
        is_mask = is_tensor(term.node) and term.role != "divides" and not may_require_grad(term.node)
        if by_row and by_column:
            if not is_mask:
                divides = term.role == "divides"
                why = "a divisor" if divides else "a factor that needs a gradient"
                reason = f"the attention weights have {why} of its own for each (query, key) pair"
                fused = f"{'divide' if divides else 'multiply'} by one number per {_fitting(region, term)}"
                raise Misfit(term.node, reason, f"leave it as it is, not fused; or {fused} (another model)")
            cells.append(term)
        elif is_mask and (by_row or by_column):
            (columns if by_column else rows).append(term)
        else:
            (weights.of_v if by_column else weights.of_output).append(term)
    _identify(layout, weights, cells, rows, columns)
    for term in binary:
        if term in weights.masks or any(term not in bias.factors for bias in scores.biases):
            change = "a 0/1 mask fits after silu: F.silu(scores) * mask (another model)"
            raise Misfit(term.node, "the scores are multiplied by a tensor over rows and columns before silu", change)
    weights.biases = [replace(b, factors=tuple(f for f in b.factors if f not in binary)) for b in weights.biases]
    _normalise(weights, scores.multiplier, scores.divisor)
    return weights


def _varies(region: Region, term: Term) -> tuple[bool, bool]:
    held = flat(region.axes.resolve(term.dims))
    rows, columns = region.axes.resolve(((region.row,), (region.column,)))
    return any(axis in held for axis in rows), any(axis in held for axis in columns)


def _fitting(region: Region, term: Term) -> str:
    """What factors that are fused vary over, and their shapes where this one stands."""
    names = _names(region, term.around)
    shapes = []
    for what, letter, size in (("query", "i", "N"), ("key", "j", "N"), ("head", "h", "H")):
        if letter in names:
            ones = ["1"] * len(names[names.index(letter) + 1 :])
            shapes.append(f"{what} [{', '.join([size, *ones])}]")
    return " or ".join(shapes)


def _identify(layout: Layout, weights: Weights, cells: list[Term], rows: list[Term], columns: list[Term]) -> None:
    """Find a member of the mask family; row and column masks, and biases, may be part of it or stay outside."""
    region = layout.region
    biases = region.scores.biases
    adds = [b for b in biases if b.scale == 1 and not b.factors and not may_require_grad(b.node)]
    tried = []
    for outer in (rows + columns, []):
        for added in (adds, []):
            if (outer, added) in tried:
                continue
            tried.append((outer, added))
            terms = [_mask_term(region, term) for term in cells + outer]
            terms += [MaskTerm(bias.node, _names(region, bias.around), "adds") for bias in added]
            weights.meaning = identify(
                terms,
                batch_size=1 if region.batch is None else region.batch.size,
                num_heads=1 if region.head is None else region.head.size,
                max_seq_len=region.row.size,
                seq_offsets=layout.seq_offsets,
                padding_matters=layout.seq_offsets is None,
            )
            if isinstance(weights.meaning, MaskMeaning):
                weights.biases = [b for b in biases if b not in added]
                weights.of_output += [term for term in rows if term not in outer]
                weights.of_v += [term for term in columns if term not in outer]
                return
    weights.masks, weights.biases = cells, biases
    weights.of_output += rows
    weights.of_v += columns


def _mask_term(region: Region, term: Term) -> MaskTerm:
    return MaskTerm(term.node, _names(region, term.around), "drops" if term.role == "drops" else "keeps")


def _names(region: Region, dims: Dims) -> tuple[str, ...]:
    """("b", "h", "i", "j"), in whatever order and folding these dimensions are; "" for a dimension of size 1."""
    letters: dict[Axis | None, str] = {region.row: "i", region.column: "j", region.batch: "b", region.head: "h"}
    return tuple("".join(letters.get(axis, "") for axis in group) for group in region.axes.resolve(dims))


def _normalise(weights: Weights, multiplier: float, divisor: float) -> None:
    """The divisor: a number, or the one SymInt that the code divides by. Other symbolic scalars scale the output."""
    weights.scaling_seq_len = divisor if multiplier == 1 else divisor / multiplier
    symbols = [t for t in weights.of_output if t.role == "divides" and isinstance(value(t.node), torch.SymInt)]
    if symbols and weights.scaling_seq_len == 1:
        weights.scaling_seq_len = symbols[0].node
        weights.of_output.remove(symbols[0])


def attn_mask(layout: Layout, masks: list[Term]) -> fx.Node | None:
    """The product of the masks as [B|1, H|1, N, N], a view where there is one."""
    region, before, result = layout.region, layout.region.before, None
    for term in masks:
        node = _cells(layout, term.node, term.dims)
        if term.role == "drops":
            node = insert_call(before.graph, before, aten.logical_not.default, (node,), like=before)
        if result is not None:
            node = insert_call(before.graph, before, aten.mul.Tensor, (result, node), like=before)
        result = node
    return None if result is None else region.axes.expand(result, ((), (), (region.row,), (region.column,)), before)


def attn_bias(layout: Layout, biases: list[Bias]) -> fx.Node | None:
    """The sum of the biases as [B|1, H|1, N, N]."""
    region, before, result = layout.region, layout.region.before, None
    for bias in biases:
        node = _cells(layout, bias.node, bias.dims)
        for term in bias.factors:
            other = _cells(layout, term.node, term.dims) if is_tensor(term.node) else term.node
            target = aten.div.Tensor if term.role == "divides" else aten.mul.Tensor
            node = insert_call(before.graph, before, target, (node, other), like=before)
        if bias.scale != 1:
            node = insert_call(before.graph, before, aten.mul.Tensor, (node, bias.scale), like=before)
        if result is not None:
            node = insert_call(before.graph, before, aten.add.Tensor, (result, node), like=before)
        result = node
    return None if result is None else region.axes.expand(result, ((), (), (region.row,), (region.column,)), before)


def _cells(layout: Layout, node: fx.Node, dims: Dims) -> fx.Node:
    region = layout.region
    wanted = (layout.batch, layout.head, (region.row,), (region.column,))
    return region.axes.arrange(node, dims, wanted, region.before)
