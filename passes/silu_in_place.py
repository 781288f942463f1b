"""silu of a whole projection, where it stands: its parts are what attention, pages and gate read, without a copy.

silu(x @ w).split(...)      ->      x @ w, silu_ of it; split(...)
"""

import torch
from torch import fx

from hstu_compile.passes.graph import aten, erase_dead, insert_call, is_call, same_shape, value
from hstu_compile.passes.uvqk import MOVES, PROJECTIONS, SLICES, SPLITS

SILU = torch.ops.hstu_compile.silu_.default


def run(graph: fx.Graph) -> int:
    """Rewrite a graph that has no gradient, in place; how many times."""
    count = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.silu.default)):
        (projection,) = node.all_input_nodes
        alone = is_call(projection, *PROJECTIONS) and set(projection.users) == {node}
        if alone and is_cut(node) and same_shape(value(projection).stride(), value(node).stride()):
            insert_call(graph, node, SILU, (projection,), like=node)
            projection.meta["val"] = value(node)  # which its parts are views of
            node.replace_all_uses_with(projection)
            erase_dead([node])
            count += 1
    return count


def is_cut(node: fx.Node) -> bool:
    """Whether more than one part of it is read."""
    users = list(node.users)
    while len(users) == 1 and is_call(users[0], *MOVES):
        users = list(users[0].users)
    slices = [user for user in users if is_call(user, *SLICES)]
    return any(is_call(user, *SPLITS) for user in users) or len(slices) > 1
