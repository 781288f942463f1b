"""Terms of the bias that depend on row - column: all there is of them are their values at the 2N - 1 differences.

However a table comes to lie along the diagonals (looked up by an index, padded, repeated and reshaped, cut from a
buffer): the term is evaluated with inputs of which no two values are the same, and must hold the same one wherever
row - column is the same. In the graph it is then evaluated at one cell of each difference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from hstu_compile.passes.bias_terms import Term, whole
from hstu_compile.passes.dependence import RANGES, Invented, assigned, data, expression, first_difference, scattered
from hstu_compile.passes.graph import Size, is_tensor, shape, value
from hstu_compile.passes.index_space import symbols_of
from hstu_compile.passes.index_space_ops import ZERO, NotUnderstood
from hstu_compile.passes.mask_inputs import Expression
from hstu_compile.passes.relocate import MakeSpace, relocated

LONGEST_TABLE = 2048  # a term made from a constant tensor is compared cell by cell up to this length


def read(term: Term, before: fx.Node) -> fx.Node:
    """[H|1, 2N - 1], inserted before `before`: entry N - 1 + d for row - column = d. Raises NotUnderstood."""
    reason = misfit(term)
    if reason is not None:
        raise NotUnderstood(reason)
    inside, device = expression(term), value(term.node).device

    def build(space: MakeSpace, given: Sequence[Tensor]) -> Tensor:
        here = space({})
        n, heads = here.scalar(term.sizes["i"]), here.scalar(heads_of(term))
        difference = whole(2 * n - 1, 1, 2, device) - (n - 1)
        cell = {"b": ZERO, "i": difference.clamp(min=0), "j": (-difference).clamp(min=0)}
        cell["h"] = whole(heads, 0, 2, device) if heads is not None else ZERO
        return term.value(here, cell).expand(1 if heads is None else heads, 2 * n - 1)

    return relocated(inside, (), build, device, before, term.node)


def misfit(term: Term) -> str | None:
    """Why a term is not the same along the diagonals, for every size that the graph may be called with."""
    read, dice = expression(term), torch.Generator().manual_seed(0)
    inputs = data(term, read)
    if inputs:
        return f"it depends on {inputs[0].name}"
    for symbols in assigned(term, read):
        for draw in range(len(RANGES)):
            space = Invented(read, symbols, draw)
            n = space.scalar(term.sizes["i"])
            if read.has_table and n > LONGEST_TABLE:
                return f"it reads a constant tensor, and {n} positions are too many to compare them all"
            for cell in scattered(space, term, dice, all_cells=draw == 0):
                space = Invented(read, symbols, draw)  # which keeps all that it computes
                i, j = cell["i"], cell["j"]
                first = {"b": ZERO, "h": cell["h"], "i": (i - j).clamp(min=0), "j": (j - i).clamp(min=0)}
                at = first_difference(term.value(space, cell), term.value(space, first), cell)
                if at is not None:
                    ends = [leaf.name for leaf in read.leaves if leaf.op == "call_function" and is_tensor(leaf)]
                    unseen = f" (what {', '.join(ends)} is made of is not followed)" if ends else ""
                    return f"it is not the same along the diagonals: row {at[0]}, column {at[1]} differs{unseen}"
    return None


def heads_of(term: Term) -> Size | None:
    """The number of heads, if the term has a value for each."""
    return term.sizes["h"] if any("h" in name for name in term.names) else None


def tables(read: Expression) -> str:
    """The floating-point inputs, for the report."""
    found = [leaf for leaf in read.leaves if is_tensor(leaf) and value(leaf).dtype.is_floating_point]
    return ", ".join(f"{leaf.name} {[int(s) if not symbols_of(s) else str(s) for s in shape(leaf)]}" for leaf in found)
