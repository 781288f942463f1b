"""Compute some nodes of a graph on the CPU, from values of others."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

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
    """Computes `nodes`, as often as is wanted, from values of `given`: of every placeholder that is needed."""

    def __init__(self, nodes: Iterable[fx.Node], given: Iterable[fx.Node]) -> None:
        """`reads` are those of `given` that matter."""
        self._nodes, given = list(nodes), set(given)
        needed = ancestors(self._nodes, given)
        self.reads = needed & given
        needed -= given
        self._order = [node for node in self._nodes[0].graph.nodes if node in needed] if needed else []

    def __call__(self, given: Mapping[fx.Node, Any]) -> list[Any]:
        known = dict(given)
        with torch.no_grad():
            for node in self._order:
                known[node] = _value(node, known)
        return [known[node] for node in self._nodes]


def evaluate(nodes: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
    """The values of nodes, once."""
    return Evaluation(nodes, given)(given)


def _value(node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        found = attribute(node)
        return found.cpu() if isinstance(found, Tensor) else found
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    assert callable(node.target)
    return node.target(*args, **kwargs)
