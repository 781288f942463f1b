"""Which tiles of a mask tensor hold anything: one call for all attention of a graph that reads the same mask.

AOTAutograd merges equal calls of a training graph, Inductor none of an inference graph, so they are merged here.
"""

from typing import Any

import torch
from torch import fx

from hstu_compile.passes.graph import aten, insert_call, is_pure, is_tensor, may_write, value

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)


def with_tile_states(mask: fx.Node, before: fx.Node) -> tuple[fx.Node, fx.Node]:
    """A mask [B|1, H|1, N, N] with expanded leading dimensions back at size 1, and the states of its tiles."""
    for dim in (0, 1):
        step = value(mask).stride(dim)
        if isinstance(step, int) and step == 0:
            mask = insert_call(mask.graph, before, aten.slice.Tensor, (mask, dim, 0, 1), like=before)
    call = torch.ops.hstu_compile.mask_tile_states.default
    states = insert_call(mask.graph, before, call, (mask,), like=before)
    first = first_equals(states)
    if first is not states:
        states.graph.erase_node(states)
    return mask, first


def first_equals(last: fx.Node) -> fx.Node:
    """The first call of the graph that gives what `last` gives; `last` itself if there is none before.

    Equal are calls of a pure function with equal arguments (and results of one dtype: autocast may have begun), until
    something is written: that may be one of the two. Sizes are equal where their expressions are.
    """
    first: dict[fx.Node, fx.Node] = {}
    known: dict[Any, fx.Node] = {}
    for node in last.graph.nodes:
        first[node] = node
        if isinstance(value(node), SIZES):
            first[node] = known.setdefault(repr(value(node)), node)
        elif node.op == "call_function" and is_pure(node.target):
            arguments = fx.map_arg((node.args, node.kwargs), first.__getitem__)
            key = node.target, repr(arguments), getattr(value(node), "dtype", None)
            first[node] = known.setdefault(key, node)
        elif node.op == "call_function" and may_write(node.target) and any(map(is_tensor, node.all_input_nodes)):
            first = {node: node for node in first}
            known.clear()
        if node is last:
            break
    return first[last]
