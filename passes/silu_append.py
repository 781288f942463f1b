"""silu of a projection where it stands, and its keys and values into the pages of a cache, as one call.

    silu_(x); append_kv(pool, k, v, ...)      ->      silu_append_kv(x, pool, ...)

k and v are slices of x. Between the two calls there are views of x, and nothing else that has to do with its memory:
silu may wait for the pages.
"""

from typing import Any

import torch
from torch import fx

from hstu_compile.ops.packed_slices import Slice
from hstu_compile.passes.graph import insert_call, is_call, reads_only_metadata, shape
from hstu_compile.passes.packed_columns import columns_of, is_view
from hstu_compile.passes.paged_attention import APPEND, WAIT
from hstu_compile.passes.report import Misfit
from hstu_compile.passes.silu_in_place import SILU

MERGED = torch.ops.hstu_compile.silu_append_kv.default


def run(graph: fx.Graph) -> int:
    """Rewrite a graph of new rows, behind `silu_in_place`; how many times."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sum([_merge(silu, order) for silu in list(graph.find_nodes(op="call_function", target=SILU))])


def _merge(silu: fx.Node, order: dict[fx.Node, int]) -> bool:
    (x,) = silu.all_input_nodes
    views = _with_views(x)
    later = [user for user in _users(views) if order[user] > order[silu]]
    append = min(later, key=order.__getitem__, default=silu)
    places = _places(append, x, views) if is_call(append, APPEND) else None
    if places is None:
        return False
    pool: Any = append.args[0]
    for wait in list(pool.users):
        if is_call(wait, WAIT) and order[silu] < order[wait] < order[append]:
            wait.args = *wait.args[:2], x  # pages may be loaded while x is computed
    insert_call(silu.graph, append, MERGED, (x, pool, *places, *append.args[3:]), like=append)
    for node in (append, silu):
        silu.graph.erase_node(node)
    return True


def _with_views(x: fx.Node) -> list[fx.Node]:
    found = [x]
    for node in found:
        found += [user for user in node.users if is_view(user) and user.args[0] is node]
    return found


def _users(views: list[fx.Node]) -> list[fx.Node]:
    """Calls that read or write these numbers."""
    users = dict.fromkeys(user for node in views for user in node.users)
    return [user for user in users if user not in views and not reads_only_metadata(user)]


def _places(append: fx.Node, x: fx.Node, views: list[fx.Node]) -> tuple[int, ...] | None:
    """Of k and v: the column where each begins in x, and how many it is from head to head."""
    places: tuple[int, ...] = ()
    for node in append.args[1:3]:
        one = _slice(node, x) if node in views else None  # type: ignore[arg-type]
        if one is None:
            return None
        places += one.at, one.head_stride
    return places


def _slice(node: fx.Node, x: fx.Node) -> Slice | None:
    """Where a view, [T, H, D], has its numbers in x, [T, W]."""
    if len(shape(x)) != 2:
        return None
    try:
        columns, _ = columns_of(node, x)
    except Misfit:
        return None
    heads, dim = shape(node)[1:]
    one = columns.as_heads(heads, dim, activated=True)  # type: ignore[arg-type]
    return one if one is not None and one.is_in(shape(x)[-1], heads, dim) else None  # type: ignore[arg-type]
