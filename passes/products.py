"""Batched products of two tensors, however they are called, with a label for every dimension."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from hstu_compile.passes.graph import aten, is_call, same, shape

Labels = tuple[str | None, ...]  # None: a dimension of size 1 that is broadcast


@dataclass(frozen=True)
class Product:
    """node = sum over the labels that are not in `out` of left * right; baddbmm has an addend too."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_labels: Labels
    right_labels: Labels
    out_labels: tuple[str, ...]
    alpha: float = 1.0
    addend: fx.Node | None = None
    beta: float = 1.0

    @property
    def contracted(self) -> str:
        return next(label for label in self.left_labels if label and label not in self.out_labels)


def as_product(node: fx.Node) -> Product | None:
    """The product behind a call; None for other calls, and for einsums that sum over anything but one shared label."""
    if is_call(node, aten.einsum.default):
        operands: Any = node.args[1]
        if len(operands) != 2:
            return None
        left, right = operands
        labels = _equation_labels(str(node.args[0]), len(shape(left)), len(shape(right)))
    elif is_call(node, aten.matmul.default, aten.bmm.default, aten.mm.default):
        operands = node.args[:2]
        left, right = operands
        labels = _matmul_labels(len(shape(left)), len(shape(right)))
    elif is_call(node, aten.baddbmm.default):
        operands = node.args[1:3]
        left, right = operands
        labels = _matmul_labels(3, 3)
    else:
        return None
    if labels is None or len(labels[2]) != len(shape(node)):
        return None
    left_labels, right_labels, out_labels = labels
    sizes = dict(zip(out_labels, shape(node), strict=True))
    left_labels, right_labels = (
        tuple(
            None if label in sizes and same(size, 1) and not same(sizes[label], 1) else label
            for label, size in zip(names, shape(operand), strict=True)
        )
        for names, operand in ((left_labels, left), (right_labels, right))
    )
    summed = (set(left_labels) | set(right_labels)) - set(out_labels) - {None}
    if len(summed) != 1 or not summed <= set(left_labels) & set(right_labels):
        return None
    if is_call(node, aten.baddbmm.default):
        addend: Any = node.args[0]
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
            return None
        return Product(node, left, right, left_labels, right_labels, out_labels, alpha, addend, beta)
    return Product(node, left, right, left_labels, right_labels, out_labels)


def _equation_labels(equation: str, left_rank: int, right_rank: int):
    equation = equation.replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    left, _, right = inputs.partition(",")
    if not arrow:
        letters = (left + right).replace(".", "")
        out = "..." * ("..." in inputs) + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    widths = [
        rank - len(term.replace("...", "")) for term, rank in ((left, left_rank), (right, right_rank)) if "..." in term
    ]
    width = max(widths, default=0)

    def expand(term: str, rank: int | None) -> tuple[str, ...] | None:
        head, dots, tail = term.partition("...")
        count = 0 if not dots else width if rank is None else rank - len(head) - len(tail)
        labels = (*head, *(f"...{i}" for i in range(width - count, width)), *tail)
        return labels if len(set(labels)) == len(labels) and rank in (None, len(labels)) else None

    terms = expand(left, left_rank), expand(right, right_rank), expand(out, None)
    return None if None in terms else terms


def _matmul_labels(left_rank: int, right_rank: int):
    if left_rank < 2 or right_rank < 2:
        return None
    width = max(left_rank, right_rank) - 2
    batch = tuple(f"batch{i}" for i in range(width))
    left, right = batch[width - (left_rank - 2) :], batch[width - (right_rank - 2) :]
    return (*left, "row", "inner"), (*right, "inner", "column"), (*batch, "row", "column")
