"""Inputs that a graph reads at chosen rows only become inputs of these rows: who calls it selects them.

index(x, [rows])      ->      x, which is [R, ...]
"""

from collections.abc import Iterable

from torch import fx

from hstu_compile.passes.graph import aten, is_call, shape, value


def run(inputs: Iterable[fx.Node], rows: fx.Node) -> set[fx.Node]:
    """Rewrite the graph of these inputs in place; which of them are of chosen rows now.

    Args:
        inputs: whose first dimension is that of the rows; those that nothing reads are among the result.
        rows: [R], another input.
    """
    picked = {x for x in inputs if all(is_call(u, aten.index.Tensor) and u.args == (x, [rows]) for u in x.users)}
    for x in picked:
        for user in list(x.users):
            user.replace_all_uses_with(x)
            x.graph.erase_node(user)
        x.meta["val"] = value(x).new_empty(shape(rows)[0], *shape(x)[1:])
    return picked
