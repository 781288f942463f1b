"""Whether two nodes compute the same: by what they call, down to inputs, not by being one node."""

from typing import Any

import torch.utils._pytree as pytree
from torch import fx

from hstu_compile.passes.graph import is_pure, is_tensor, may_write, storages


class Alike:
    """Gives nodes that compute the same one number; the graph may change between calls.

    A node is like no other if what it holds is random, or is written in place somewhere in the graph.
    """

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}

    def number(self, node: fx.Node) -> int:
        writers = [n for n in node.graph.nodes if n.op == "call_function" and may_write(n.target)]
        written = storages(n for writer in writers for n in writer.all_input_nodes).keys()
        found: dict[fx.Node, int] = {}
        todo = [node]
        while todo:
            last = todo[-1]
            opaque = last.op != "call_function" or not is_pure(last.target) or _lies_in(written, last)
            missing = [] if opaque else [n for n in last.all_input_nodes if n not in found]
            if missing:
                todo += missing
                continue
            found[last] = self._numbers.setdefault(last if opaque else _key(last, found), len(self._numbers))
            todo.pop()
        return found[node]


def _lies_in(written: Any, node: fx.Node) -> bool:
    return is_tensor(node) and not storages([node]).keys().isdisjoint(written)


def _key(node: fx.Node, found: dict[fx.Node, int]) -> Any:
    leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return node.target, str(spec), tuple(("node", found[x]) if isinstance(x, fx.Node) else repr(x) for x in leaves)
