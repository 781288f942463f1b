"""Dropout outside of training is nothing: recognisers see what it is given."""

import operator

from torch import fx

from hstu_compile.passes.graph import argument, aten, is_call


def remove_idle_dropout(graph: fx.Graph) -> None:
    """Let everybody read what such a dropout is given."""
    for node in list(graph.nodes):
        if is_call(node, aten.dropout.default, aten.feature_dropout.default) and not argument(node, 2, "train"):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif is_call(node, aten.native_dropout.default) and argument(node, 2, "train") is False:
            for part in list(node.users):
                if part.target is operator.getitem and part.args[1] == 0:
                    part.replace_all_uses_with(node.args[0])
                    graph.erase_node(part)
