"""A gated attention whose norm is none of those known: reported, since nothing else would name it.

Between attention and product with u stands, say, a batch norm, a layer norm over the tokens, or nothing.
"""

import torch
from torch import fx

from hstu_compile.passes.axes import LAYOUT
from hstu_compile.passes.graph import aten, is_call, is_cast, is_tensor, same, same_shape, shape, value
from hstu_compile.passes.report import Region, source_line, spoken
from hstu_compile.passes.uvqk import PRODUCTS, PROJECTIONS

ATTENTION = torch.ops.hstu_compile.hstu_attention.default
GATE = torch.ops.hstu_compile.norm_gate_dropout.default
MOST_NAMES = 3


def find(graph: fx.Graph, known: set[fx.Node], pass_name: str) -> list[Region]:
    """One for each such product; `known`: those that were reported already."""
    found = []
    for attention in graph.find_nodes(op="call_function", target=ATTENTION):
        path = _to_gate(attention)
        if path and not known & {*path}:
            *between, product = path
            names = [spoken(n) for n in between if not (is_call(n, *LAYOUT, aten.clone.default) or is_cast(n))]
            what = ", ".join(names[:MOST_NAMES]) + ", ..." * (len(names) > MOST_NAMES)
            reason = "there is no norm between attention and gate"
            if what:
                reason = f"between attention and gate stands {what}, not a norm over the features of a token"
            change = "use a layer, RMS or group norm over the features of a token (another model; or leave yours)"
            found.append(Region(pass_name, "norm * gate", source_line(product), reason, change=change))
    return found


def _to_gate(attention: fx.Node) -> list[fx.Node]:
    """The calls from the attention up to a product with a tensor that does not come from it; none without one."""
    reached: dict[fx.Node, list[fx.Node]] = {attention: []}
    for node in attention.graph.nodes:
        parents = [n for n in node.all_input_nodes if n in reached]
        known = is_call(node, GATE, *PROJECTIONS, *PRODUCTS)
        if not parents or known or not is_tensor(node) or not same(value(node).numel(), value(attention).numel()):
            continue
        path = [*reached[parents[0]], node]
        if is_call(node, aten.mul.Tensor) and len(parents) == 1 and len(node.all_input_nodes) == 2:
            if all(same_shape(shape(n), shape(node)) for n in node.all_input_nodes):
                return path
        reached[node] = path
    return []
