"""silu and sigmoid, however they are written."""

from torch import fx

from hstu_compile.passes.graph import aten, erase_dead, insert_call, is_call, look_through, value


def as_silu(graph: fx.Graph) -> None:
    """Rewrite x * sigmoid(x) as the one call silu(x), in place: one rounding instead of two, and one tensor less."""
    for gate in graph.find_nodes(op="call_function", target=aten.sigmoid.default):
        x = gate.all_input_nodes[0]
        for node in list(gate.users):
            silu = is_call(node, aten.mul.Tensor, aten.multiply.Tensor) and set(node.args) == {x, gate}
            if silu and value(x).dtype == value(node).dtype:
                node.replace_all_uses_with(insert_call(graph, node, aten.silu.default, (x,), like=node))
                erase_dead([node])


def as_activation(node: fx.Node) -> tuple[str, fx.Node] | None:
    """("silu" or "sigmoid", its argument) if the call is silu(x), x * sigmoid(x) or sigmoid(x)."""
    if is_call(node, aten.silu.default):
        return "silu", node.all_input_nodes[0]
    if is_call(node, aten.sigmoid.default):
        return "sigmoid", node.all_input_nodes[0]
    if is_call(node, aten.mul.Tensor, aten.multiply.Tensor) and len(node.all_input_nodes) == 2:
        for x, gate in (node.all_input_nodes, node.all_input_nodes[::-1]):
            inner = look_through(gate)
            if is_call(inner, aten.sigmoid.default) and look_through(inner.all_input_nodes[0]) is look_through(x):
                return "silu", x
    return None
