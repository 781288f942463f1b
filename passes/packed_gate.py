"""The gate of an attention whose gradients are packed: it takes u as it is in x, before silu.

    norm_gate_dropout(hstu_attention(q, k, v), u)        ->        hstu_compile::gated_silu_attention(x, q, k, v)

u, v, q and k are slices of silu(x), and u has no other use. Then silu(u) is never written, and the gate's backward
writes du * silu'(u) into its columns of the one gradient of x.
"""

from dataclasses import dataclass

import torch
from torch import fx

from hstu_compile.ops.norm_gate_dropout import PARAMETERS
from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    aten,
    erase_dead,
    insert_call,
    is_call,
    real_users,
    same_shape,
    shape,
    value,
    writes_to,
)
from hstu_compile.passes.report import Misfit, source_line, spoken
from hstu_compile.passes.uvqk import LAYER, ROLE

GATE = torch.ops.hstu_compile.norm_gate_dropout.default
A, U, WEIGHT, BIAS, SEED, OTHERS = range(6)  # places among its arguments


@dataclass
class Gate:
    """Where the gate is, and how many groups its norm has in a row as the attention has them."""

    node: fx.Node
    num_groups: int


def find(attention: fx.Node, silu: fx.Node, u: fx.Node) -> Gate | None:
    """The gate of an attention and of u; None where there is none."""
    gate = _only_reader(attention, A)
    if gate is None or gate is not _only_reader(u, U):
        return None
    named = dict(zip(PARAMETERS, gate.args[OTHERS:], strict=True))
    if named["activation"] != "none":
        raise Misfit(f"the gate applies {named['activation']} to silu(u)", "u as it is, without a second activation")
    if named["concat_u"]:
        raise Misfit("silu(u) is part of the gate's result")
    row, width = value(attention).shape[-2:].numel(), value(gate.args[A]).shape[1:].numel()
    run = width // named["num_groups"]
    if width != row:  # the same numbers, in longer or shorter rows
        if row % run:
            raise Misfit(f"the norm runs over {run} elements, a row of the attention has {row}")
        if named["concat_x"] or named["concat_norm"]:
            raise Misfit(f"the gate joins rows of {width} elements, the attention has rows of {row}")
        if any(node is not None and value(node).numel() != run for node in gate.args[WEIGHT : BIAS + 1]):
            raise Misfit(f"the norm's weight differs within {width} elements, a row of the attention has {row}")
    refuse_writes(silu, gate)
    return Gate(gate, row // run)


def _only_reader(node: fx.Node, place: int) -> fx.Node | None:
    """The gate, if it alone reads the node's numbers, as its argument number `place`."""
    while True:
        users = real_users(node)
        if len(users) != 1:
            return None
        if is_call(users[0], GATE):
            return users[0] if users[0].args[place] is node and node.users.keys() == {users[0]} else None
        if not is_call(users[0], *RESHAPES) or users[0].args[0] is not node:
            return None
        (node,) = users


def refuse_writes(silu: fx.Node, last: fx.Node) -> None:
    """What the silu reads is read where `last` stands; and slices of the silu are views."""
    nodes = list(silu.graph.nodes)
    first, end = nodes.index(silu), nodes.index(last)
    (x,) = silu.all_input_nodes
    for i, node in enumerate(nodes[first:], first):
        if writes_to(node, silu) or (i < end and writes_to(node, x)):
            raise Misfit(
                f"written in place by {spoken(node)} at {source_line(node)}", "write into a copy, or after the gate"
            )
        if i < end and node.target is torch._C._set_grad_enabled:
            raise Misfit("grad mode changes between the silu and the attention")


def rewrite(attention: fx.Node, silu: fx.Node, columns: dict[str, int], gate: Gate) -> None:
    """Put gated_silu_attention in the place of the gate; columns: of u, q, k and v."""
    graph, end = attention.graph, gate.node
    (x,) = silu.all_input_nodes

    def silu_of(role: str, operand: fx.Node) -> fx.Node:
        # One of its own for each: of a silu of all three that is not saved, Inductor makes a copy for each slice.
        heads, dim = shape(operand)[-2:]
        at = columns[role]
        part = insert_call(graph, end, aten.slice.Tensor, (x, -1, at, at + heads * dim), like=silu)
        activated = insert_call(graph, end, aten.silu.default, (part,), like=silu)
        activated.meta |= {key: silu.meta[key] for key in (ROLE, LAYER) if key in silu.meta}
        return insert_call(graph, end, aten.unflatten.int, (activated, -1, [heads, dim]), like=silu)

    operands = [silu_of(role, operand) for role, operand in zip("qkv", attention.args, strict=False)]  # type: ignore[arg-type]
    changed = {"activation": "silu", "num_groups": gate.num_groups}
    others = [changed.get(name, given) for name, given in zip(PARAMETERS, end.args[OTHERS:], strict=True)]
    at = (columns[name] for name in ("u", "q", "k", "v"))
    args = (x, *operands, *attention.args[3:], *at, *end.args[WEIGHT:OTHERS], *others)
    call = torch.ops.hstu_compile.gated_silu_attention.default
    out = insert_call(graph, end, call, args, like=end)
    if not same_shape(shape(out), shape(end)):
        out = insert_call(graph, end, aten.reshape.default, (out, [-1, shape(end)[-1]]), like=end)
    end.replace_all_uses_with(out)
    erase_dead([end])
