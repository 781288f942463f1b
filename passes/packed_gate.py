"""The gate of an attention whose gradients are packed: it takes u as it is in x, before silu.

    norm_gate_dropout(hstu_attention(q, k, v), u)        ->        hstu_compile::gated_silu_attention(x, q, k, v)

u, v, q and k are slices of x or of silu(x), and u has no other use. Then silu(u) is never written, and the gate's
backward writes du * silu'(u) into its columns of the one gradient of x.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hstu_compile.ops.norm_gate_dropout import PARAMETERS
from hstu_compile.ops.packed_slices import Slice, as_arguments
from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    aten,
    erase_dead,
    insert_call,
    is_call,
    real_users,
    same,
    same_shape,
    shape,
    value,
    writes_to,
)
from hstu_compile.passes.packed_columns import Columns, as_heads, between
from hstu_compile.passes.report import Misfit, source_line, spoken
from hstu_compile.passes.uvqk import LAYER, ROLE

GATE = torch.ops.hstu_compile.norm_gate_dropout.default
A, U, WEIGHT, BIAS, SEED, OTHERS = range(6)  # places among its arguments


@dataclass
class Part:
    """u, q, k or v: a slice of x, or of a silu between x and it."""

    node: fx.Node
    columns: Columns
    silu: fx.Node | None

    def slice_of(self, heads: int, dim: int) -> Slice:
        return as_heads(self.node, self.columns, heads, dim, self.silu is not None)


@dataclass
class Gate:
    """Where the gate is, how many groups its norm has in a row as the attention has them, and the slices of x."""

    node: fx.Node
    num_groups: int
    slices: dict[str, Slice]


def find(attention: fx.Node, x: fx.Node, parts: dict[str, Part]) -> Gate | None:
    """The gate of an attention and of u; None where there is none."""
    u, gate = parts["u"], _only_reader(attention, A)
    if gate is None or gate is not _only_reader(u.node, U):
        return None
    named = dict(zip(PARAMETERS, gate.args[OTHERS:], strict=True))
    if u.silu is not None and named["activation"] != "none":
        raise Misfit(f"the gate applies {named['activation']} to silu(u)", "u as it is, without a second activation")
    num_groups = groups_in_row(attention, gate)
    slices = {role: parts[role].slice_of(*shape(parts[role].node)[-2:]) for role in "qkv"}  # type: ignore[arg-type]
    slices["u"] = u.slice_of(*shape(attention)[-2:])  # type: ignore[arg-type]
    refuse_writes(x, parts, gate)
    return Gate(gate, num_groups, slices)


def groups_in_row(attention: fx.Node, gate: fx.Node) -> int:
    """How many groups the gate's norm has in a row of the attention."""
    named = dict(zip(PARAMETERS, gate.args[OTHERS:], strict=True))
    row, width = value(attention).shape[-2:].numel(), value(gate.args[A]).shape[1:].numel()
    run = width // named["num_groups"]
    if width != row:  # the same numbers, in longer or shorter rows
        if row % run:
            raise Misfit(f"the norm runs over {run} elements, a row of the attention has {row}")
        if any(named[f"concat_{name}"] for name in ("u", "x", "norm")):
            raise Misfit(f"the gate joins rows of {width} elements, the attention has rows of {row}")
        if any(node is not None and value(node).numel() != run for node in gate.args[WEIGHT : BIAS + 1]):
            raise Misfit(f"the norm's weight differs within {width} elements, a row of the attention has {row}")
    return row // run


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


def refuse_writes(x: fx.Node, parts: dict[str, Part], last: fx.Node) -> None:
    """The op reads x where `last` stands, and not where the first of the parts is made; and the parts are views."""
    nodes = list(x.graph.nodes)
    silus = {part.silu for part in parts.values() if part.silu is not None}
    made = {node for part in parts.values() for node in between(part.node, x)}
    first, end = min(map(nodes.index, made)), nodes.index(last)
    reads_x = any(part.silu is None for part in parts.values())  # and the backward reads it again
    for i, node in enumerate(nodes[first:], first):
        written = any(writes_to(node, silu) for silu in silus) or ((i < end or reads_x) and writes_to(node, x))
        if written:
            raise Misfit(
                f"written in place by {spoken(node)} at {source_line(node)}", "write into a copy, or after the gate"
            )
        if i < end and node.target is torch._C._set_grad_enabled:
            raise Misfit("grad mode changes between the split and the attention")


def rewrite(attention: fx.Node, x: fx.Node, parts: dict[str, Part], gate: Gate) -> None:
    """Put gated_silu_attention in the place of the gate."""
    graph, end = attention.graph, gate.node

    def operand(role: str) -> fx.Node:
        part, silu, at = parts[role], parts[role].silu, gate.slices[role]
        if silu is None or same(value(silu).numel(), value(part.node).numel()):
            return part.node
        # One of its own for each: of a silu of all three that is not saved, Inductor makes a copy for each slice.
        heads, dim = shape(part.node)[-2:]
        by_heads = at.head_stride != dim
        begin = at.first(heads, shape(x)[-1])  # type: ignore[arg-type]
        piece = insert_call(graph, end, aten.slice.Tensor, (x, -1, begin, begin + heads * at.head_stride), like=silu)
        if by_heads:
            piece = insert_call(graph, end, aten.unflatten.int, (piece, -1, [heads, at.head_stride]), like=silu)
            own = at.at - begin
            piece = insert_call(graph, end, aten.slice.Tensor, (piece, -1, own, own + dim), like=silu)
        activated = insert_call(graph, end, aten.silu.default, (piece,), like=silu)
        activated.meta |= {key: silu.meta[key] for key in (ROLE, LAYER) if key in silu.meta}
        if by_heads:
            return activated
        return insert_call(graph, end, aten.unflatten.int, (activated, -1, [heads, dim]), like=silu)

    operands = [operand(role) for role in "qkv"]
    changed: dict[str, Any] = {"num_groups": gate.num_groups}
    if parts["u"].silu is not None:
        joined = end.args[OTHERS + PARAMETERS.index("concat_u")]
        changed |= {"activation": "silu", "concat_activated": joined}
    others = [changed.get(name, given) for name, given in zip(PARAMETERS, end.args[OTHERS:], strict=True)]
    args = (x, *operands, *attention.args[3:], *as_arguments(gate.slices), *end.args[WEIGHT:OTHERS], *others)
    call = torch.ops.hstu_compile.gated_silu_attention.default
    out = insert_call(graph, end, call, args, like=end)
    if not same_shape(shape(out), shape(end)):
        out = insert_call(graph, end, aten.reshape.default, (out, [-1, shape(end)[-1]]), like=end)
    end.replace_all_uses_with(out)
    erase_dead([end])
