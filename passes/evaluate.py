"""Compute some nodes of a graph on the CPU, from values of others."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hstu_compile.passes.graph import attribute


def ancestors(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they are computed from, as far as `stop`."""
    seen, todo, stop = set(), list(nodes), set(stop)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [] if node in stop else node.all_input_nodes
    return seen


class Evaluation:
    """Computes `nodes`, as often as is wanted, from values of `given`: of every placeholder that is needed.

    It is a graph of its own, as straight Python: a request waits for it.
    """

    def __init__(self, nodes: Iterable[fx.Node], given: Iterable[fx.Node]) -> None:
        """`reads` are those of `given` that matter, in their order."""
        nodes, known = list(nodes), dict.fromkeys(given)
        needed = ancestors(nodes, known)
        self.reads = [node for node in known if node in needed]
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in self.reads}
        for node in nodes[0].graph.nodes if nodes else ():
            if node in needed and node not in copies:
                copies[node] = _on_cpu(graph.node_copy(node, copies.__getitem__), node)
        graph.output([copies[node] for node in nodes])
        root = nodes[0].graph.owning_module if nodes else None
        self._compute = fx.GraphModule(root or nn.Module(), graph).forward

    def __call__(self, given: Sequence[Any]) -> list[Any]:
        """given: of `reads`."""
        return self._compute(*given)


def evaluate(nodes: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
    """The values of nodes, once."""
    evaluation = Evaluation(nodes, given)
    with torch.no_grad():
        return evaluation([given[node] for node in evaluation.reads])


def _on_cpu(node: fx.Node, original: fx.Node) -> fx.Node:
    if node.op == "get_attr" and isinstance(attribute(original), Tensor):
        return node.graph.call_method("cpu", (node,))
    if "device" in node.kwargs:
        node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    return node
