"""What is known of a graph's inputs, carried into its checkpointed and nested regions; dropped where they change.

Also their names, for the report."""

from collections.abc import Callable, Container, Sequence

import torch
from torch import fx

from hstu_compile.passes.contents import cancel, is_offered, pass_on
from hstu_compile.passes.index_space import refuse_if_written
from hstu_compile.passes.index_space_views import NotUnderstood

Call = tuple[fx.Node, fx.GraphModule]  # of a region, and its body


def carry_inside(graph: fx.Graph, calls: Sequence[Call], kinds: Container[Callable]) -> None:
    """calls: all of them, outer ones first; kinds: their targets. A body that is called twice gets no contents."""
    for node in graph.find_nodes(op="placeholder"):
        if is_offered(node) and _may_be_written(node, kinds):
            cancel(node)
    for call, body in calls:
        inputs = body.graph.find_nodes(op="placeholder")
        for argument, node in zip(call.args[len(call.args) - len(inputs) :], inputs, strict=True):
            if not isinstance(argument, fx.Node):
                continue
            held = _behind_views(argument)
            once = sum(body is other for _, other in calls) == 1
            if once:
                node._dynamo_source = getattr(argument, "_dynamo_source", None)
            if is_offered(held) and _may_be_written(node, kinds):
                cancel(held)
            elif is_offered(argument) and once:
                pass_on(argument, node)


def _behind_views(node: fx.Node) -> fx.Node:
    """The input whose memory a node may share."""
    while node.op == "call_function" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _may_be_written(node: fx.Node, kinds: Container[Callable]) -> bool:
    """By an in-place op, or by a call of which that is not known (a Triton kernel of the model's)."""
    calls = [user for user in node.users if user.op == "call_function"]
    if any(not isinstance(call.target, torch._ops.OpOverload) and call.target not in kinds for call in calls):
        return True
    try:
        refuse_if_written(node)
    except NotUnderstood:
        return True
    return False
