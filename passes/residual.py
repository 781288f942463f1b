"""x + a @ b as a product and a sum, where the sum is read by a kernel that Inductor writes, such as the next norm's.

addmm(x, a, b)      ->      x + mm(a, b)

Behind a model's last sum nothing but its output may come, so Inductor makes an `addmm` of it, whose reader is no
pointwise one; hence of the sum before, and so on up to the first layer. ATen's `addmm` begins with a copy of x, and the
norm's kernel reads the sum again. As it is written the sum is part of that kernel, and rounded as eager does: the
product first. A model that writes `torch.addmm` itself rounds once; that is left as it is.
"""

from typing import Any

import torch
from torch import fx
from torch._inductor import config, custom_graph_pass
from torch._inductor.utils import is_view

from hstu_compile.passes.graph import aten, insert_call, is_call, same_shape, shape

WRITTEN = "hstu_compile_written"  # marks what is an addmm before Inductor makes others
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
_AWARE = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", ())  # torch 2.13


def hooks() -> dict[str, Any]:
    """Options for `torch.compile` of a graph without gradient; the user's own passes run besides.

    Between the two of this module there is Inductor alone: no `addmm` that a pass of the user makes is taken apart.
    """
    before, after = config.post_grad_custom_pre_pass, config.post_grad_custom_post_pass
    return {
        "post_grad_custom_pre_pass": Passes([*_listed(before), mark]),
        "post_grad_custom_post_pass": Passes([run, *_listed(after)]),
    }


def mark(graph: fx.Graph) -> None:
    """Before Inductor's patterns."""
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        node.meta[WRITTEN] = True


def run(graph: fx.Graph) -> int:
    """Behind them: rewrite in place; how many times."""
    count = 0
    for node in reversed(graph.find_nodes(op="call_function", target=aten.addmm.default)):
        x, a, b = node.args
        is_whole = same_shape(shape(x), shape(node))
        if is_whole and not (node.kwargs or WRITTEN in node.meta) and any(map(_is_written_by_inductor, node.users)):
            product = insert_call(graph, node, aten.mm.default, (a, b), like=node)
            node.replace_all_uses_with(insert_call(graph, node, aten.add.Tensor, (x, product), like=node))
            graph.erase_node(node)
            count += 1
    return count


def _is_written_by_inductor(reader: fx.Node) -> bool:
    """Whether the call is, or may be, part of a kernel with what it reads."""
    target = reader.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    if is_view(target):
        return any(map(_is_written_by_inductor, reader.users))
    return not is_call(reader, *PRODUCTS)


class Passes(custom_graph_pass.CustomGraphPass):
    """Several, one after the other: torch 2.11 takes a single one."""

    def __init__(self, passes: list[Any]) -> None:
        self._passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        for one in self._passes:
            one(graph, is_inference=True) if isinstance(one, _AWARE) else one(graph)

    def uuid(self) -> Any:
        ids = [_uuid(one) for one in self._passes]
        return None if None in ids else tuple(ids)


def _uuid(one: Any) -> Any:
    if one in (mark, run):
        return custom_graph_pass.get_hash_for_files((__file__,), one.__name__)
    return one.uuid() if isinstance(one, custom_graph_pass.CustomGraphPass) else None


def _listed(passes: Any) -> list[Any]:
    if passes is None:
        return []
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]
