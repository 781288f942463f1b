"""Which tiles of a mask tensor hold anything: one call for all attention of a graph that reads the same mask.

AOTAutograd merges equal calls of a training graph, Inductor none of an inference graph, so they are merged here.
"""

import torch
from torch import fx

from hstu_compile.passes.graph import aten, insert_call, is_pure, may_write, value


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

    Equal are calls of a pure function with equal arguments. What is written in between ends that: from there on all that
    was equal is not, since it may be one of two that was written to.
    """
    first: dict[fx.Node, fx.Node] = {}
    known: dict[tuple, fx.Node] = {}
    for node in last.graph.nodes:
        first[node] = node
        if node.op == "call_function" and may_write(node.target):
            first = {node: node for node in first}
            known.clear()
        elif node.op == "call_function" and is_pure(node.target):
            arguments = fx.map_arg((node.args, node.kwargs), first.__getitem__)
            first[node] = known.setdefault((node.target, repr(arguments)), node)
        if node is last:
            break
    return first[last]
