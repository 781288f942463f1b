"""In-place writes to fresh intermediates become their out-of-place twins, so that passes see values, not storage.

Tracing threads in-place calls (later reads of the written tensor use the node of the call), hence the twin gives the
same numbers exactly when nothing else reads the old storage afterwards, and a copy, which passes look through, gives
them the same strides. Where that is not so, the call stays, and a recogniser that meets it declines.
"""

import itertools
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.graph import Size, aten, insert_call, same, value
from hstu_compile.passes.report import spoken


def make_out_of_place(gm: fx.GraphModule) -> int:
    """Rewrite what can be rewritten, in place; returns how many calls. Values (`meta["val"]`) must be there."""
    nodes = list(gm.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    storages = {node: _storages(node) for node in nodes}  # of the trace, where nothing is rewritten yet
    rewritten = 0
    for node in nodes:
        twin = twin_of(node)
        if twin is None:
            continue
        aliases = [n for n in nodes[: order[node]] if storages[n] & storages[node]]
        later_reader = any(order[user] > order[node] for n in aliases for user in n.users)
        if not later_reader and all(map(_is_ordinary, aliases)):
            rewritten += _replace(node, twin, order)
    return rewritten


def _replace(node: fx.Node, twin: torch._ops.OpOverload, order: dict[fx.Node, int]) -> bool:
    args: Any
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    written = args[0]
    with written.fake_mode, torch.no_grad():
        new = twin(*args, **kwargs)
    if (new.dtype, new.shape) != (written.dtype, written.shape):
        return False
    moved = new.stride() != written.stride()
    dims = _order_in_memory(written) if moved else None
    if moved and dims is None:
        return False
    node.target = twin
    node.meta["val"] = new
    if dims is not None:
        order.update(dict.fromkeys(_arrange_in_memory(node, dims), order[node]))
    return True


def as_copy(call: fx.Node) -> str:
    """What to write instead of a call that writes in place."""
    return f"write into a copy: assign what {spoken(call).rstrip('_')} returns (same numbers)"


def _order_in_memory(tensor: torch.Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost; None if the tensor has gaps or overlaps."""
    for order in itertools.permutations(range(tensor.dim())):
        stride: Size = 1
        for dim in reversed(order):
            if not (same(tensor.stride(dim), stride) or same(tensor.shape[dim], 1)):
                break
            stride = stride * tensor.shape[dim]
        else:
            return list(order)
    return None


def _arrange_in_memory(node: fx.Node, dims: list[int]) -> list[fx.Node]:
    """Copy the call's result so that its dimensions lie in this order, for all its users; returns the new calls."""
    users, before, graph = list(node.users), node.next, node.graph
    moved = insert_call(graph, before, aten.permute.default, (node, dims), like=node)
    kwargs = {"memory_format": torch.contiguous_format}
    copied = insert_call(graph, before, aten.clone.default, (moved,), kwargs, like=node)
    back = [dims.index(dim) for dim in range(len(dims))]
    result = insert_call(graph, before, aten.permute.default, (copied, back), like=node)
    for user in users:
        user.replace_input_with(node, result)
    return [moved, copied, result]


def twin_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """aten.add.Tensor for aten.add_.Tensor, aten.__and__ for aten.__iand__: the same arguments, nothing written."""
    op = node.target
    if not (isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" and op._schema.name.endswith("_")):
        return None
    name = op._schema.name.removeprefix("aten::")
    name = name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(torch.ops.aten, name, None)
    twin = getattr(packet, op._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    return twin if [a.name for a in twin._schema.arguments] == [a.name for a in op._schema.arguments] else None


def _storages(node: fx.Node) -> set[int]:
    leaves = torch.utils._pytree.tree_leaves(value(node))
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor)}


def _is_ordinary(alias: fx.Node) -> bool:
    """No input or constant; and no part in a higher-order call, whose aliasing cannot be read from its values."""
    return alias.op == "call_function" and not any(
        isinstance(n.target, torch._ops.HigherOrderOperator) for n in (alias, *alias.users)
    )
