"""u, v, q, k = split(silu(x)), attention of q, k, v: the backward writes one gradient of x.

    hstu_attention(q, k, v), u         ->         hstu_compile::silu_attention(x, u, q, k, v)

The backward of silu and split would concatenate dq, dk, dv and du and multiply them by silu'(x). The op writes them
into their columns of one dx, multiplied. The forward stays what it is; u goes through the op for the sake of its
gradient. After the output pass, which knows the end of a layer by its attention: where all that u meets is the gate of
that attention, the two become one op that takes u before silu (packed_gate.py).
"""

import math
import operator
from dataclasses import dataclass

import torch
from torch import fx

from hstu_compile.ops.hstu_attention import ATTN_BIAS, ATTN_MASK, MASK_TILE_STATES
from hstu_compile.passes import packed_gate
from hstu_compile.passes.graph import (
    aten,
    erase_dead,
    insert_call,
    is_call,
    is_tensor,
    may_require_grad,
    reads_only_metadata,
    real_users,
    same,
    same_shape,
    shape,
    share_storage,
    value,
)
from hstu_compile.passes.packed_gate import refuse_writes
from hstu_compile.passes.report import Misfit, Region, Report, source_line, spoken
from hstu_compile.passes.uvqk import MOVES, SLICES, SPLITS

NAME = "packed_gradient"
WHAT = "one gradient through silu -> split {} -> attention"
ATTENTION = torch.ops.hstu_compile.hstu_attention.default


@dataclass
class Packed:
    """An attention of slices of one silu, each with the column at which it begins."""

    attention: fx.Node
    silu: fx.Node
    u: fx.Node
    late: list[fx.Node]  # views of u that stand before the attention and can stand after it
    columns: dict[str, int]  # of u, q, k and v


def run(gm: fx.GraphModule, report: Report) -> int:
    """Rewrite every attention whose gradients can be packed; returns how many."""
    fused = 0
    for attention in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        sources = [_source(operand) for operand in attention.args[:3]]
        silu = next((node for node in sources if is_call(node, aten.silu.default)), None)
        if silu is None:
            continue
        if changed := [(role, node) for role, node in zip("qkv", sources, strict=True) if node is not silu]:
            _report_changed(report, silu, *changed[0])
            continue
        where = source_line(silu)
        try:
            packed = _find(attention, silu)
        except Misfit as misfit:
            report.add(Region(NAME, WHAT.format("into slices"), where, misfit.reason, change=misfit.change))
            continue
        what = WHAT.format(", ".join(sorted(packed.columns, key=packed.columns.__getitem__)))
        try:
            gate = packed_gate.find(attention, silu, packed.u)
        except Misfit as misfit:
            report.add(Region(NAME, f"{what} -> gate", where, misfit.reason, change=misfit.change))
            gate = None
        if gate is None:
            _rewrite(packed)
        else:
            packed_gate.rewrite(attention, silu, packed.columns, gate)
            what = f"{what} -> gate"
        report.add(Region(NAME, what, where, kernel="the attention's own"))
        fused += 1
    return fused


def _report_changed(report: Report, silu: fx.Node, role: str, made: fx.Node) -> None:
    """Where q, k or v is a slice of the same silu, changed on its way to the attention."""
    if may_require_grad(silu) and any(_source(node) is silu for node in made.all_input_nodes):
        reason = f"{role} is changed between the silu and the attention: {spoken(made)} at {source_line(made)}"
        change = f"{role} as the split gives it"
        tensors = filter(is_tensor, made.all_input_nodes)
        if is_call(made, aten.mul.Tensor) and any(value(n).dtype == torch.bool for n in tensors):
            reason = (
                f"{role} is multiplied by a mask before the attention: padded keys are dead there, padded queries not"
            )
            change = "mask padded queries as well as padded keys"
        report.add(Region(NAME, WHAT.format("into slices"), source_line(silu), reason, change=change))


def _source(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while _is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(node: fx.Node) -> bool:
    """A view of its first argument, or the list of views that a split gives."""
    if is_call(node, *SPLITS):
        return True
    if is_call(node, operator.getitem):
        return is_call(node.args[0], *SPLITS)
    return is_call(node, *MOVES, *SLICES) and is_tensor(node.args[0]) and share_storage(node, node.args[0])  # type: ignore[arg-type]


def _find(attention: fx.Node, silu: fx.Node) -> Packed:
    if attention.args[ATTN_BIAS] is not None:
        raise Misfit("the attention has a bias, whose gradient has no place in that of x")
    if (attention.args[ATTN_MASK] is None) != (attention.args[MASK_TILE_STATES] is None):
        raise Misfit("the attention has a mask tensor without the states of its tiles")
    if value(silu).dtype != value(attention).dtype:
        raise Misfit(f"silu gives {value(silu).dtype}, the attention {value(attention).dtype}")
    pieces = _pieces(silu)
    columns, ranges = {}, []
    for role, operand in zip("qkv", attention.args, strict=False):
        ranges.append(_columns(operand, silu, own=2))  # type: ignore[arg-type]
        columns[role] = ranges[-1][0]
        pieces.remove(_only_for(attention, role, operand, pieces))  # type: ignore[arg-type]
    if len(pieces) != 1:
        raise Misfit(f"silu gives {len(pieces)} used slices besides q, k and v, expected one, u")
    (u,) = pieces
    ranges.append(_columns(u, silu, own=value(u).dim() - value(silu).dim() + 1))
    columns["u"] = ranges[-1][0]
    begins, ends = zip(*sorted(ranges), strict=True)
    if not same_shape((*begins, shape(silu)[-1]), (0, *ends)):
        raise Misfit("u, q, k and v are not all columns of the silu, each once", "split all of it into these four")
    late = _late(u, attention)
    refuse_writes(silu, attention)
    return Packed(attention, silu, u, late, columns)


def _pieces(silu: fx.Node) -> list[fx.Node]:
    """The first views that hold some of its numbers only, where they are used; nobody uses the whole."""
    pieces, todo = [], [silu]
    while todo:
        node = todo.pop()
        for user in real_users(node):
            if not _is_view(user) or user.args[0] is not node:
                raise Misfit(
                    f"the whole silu has another use: {spoken(user)} at {source_line(user)}", "read its slices only"
                )
            if not is_tensor(user) or same(value(user).numel(), value(silu).numel()):
                todo.append(user)
            elif real_users(user):
                pieces.append(user)
    return pieces


def _columns(node: fx.Node, silu: fx.Node, own: int) -> tuple[int, int]:
    """At which column of the silu the view begins and ends: its last `own` dimensions, in one piece."""
    lead, last = shape(node)[:-own], shape(node)[-own:]
    at = value(node).storage_offset()
    fits = (
        own in (1, 2)
        and isinstance(at, int)
        and all(isinstance(size, int) for size in last)
        and same_shape(lead, shape(silu)[:-1])
        and same_shape(value(node).stride(), [*value(silu).stride()[:-1], *last[1:], 1])
        and same(value(silu).stride(-1), 1)
    )
    if not fits:
        sizes = ", ".join(map(str, shape(node)))
        change = "split silu(x) along its last dimension into u, v, q, k, each with all of its heads"
        raise Misfit(f"{spoken(node)} of shape [{sizes}] does not have its columns of the silu in one piece", change)
    return at, at + math.prod(last)


def _only_for(attention: fx.Node, role: str, operand: fx.Node, pieces: list[fx.Node]) -> fx.Node:
    """The piece behind an operand, which nobody else reads on the way."""
    node, reader = operand, attention
    while True:
        for user in real_users(node):
            if user is not reader:
                raise Misfit(
                    f"{role} has a second use: {spoken(user)} at {source_line(user)}",
                    f"leave {role} to the attention alone",
                )
        if node in pieces:
            return node
        if not _is_view(node):
            raise Misfit(f"{role} is a slice of the silu that has another role too")
        node, reader = node.args[0], node  # type: ignore[assignment]


def _late(u: fx.Node, attention: fx.Node) -> list[fx.Node]:
    """The views of u before the attention: u is a result of the op, which stands where the attention does."""
    late: list[fx.Node] = []
    for node in attention.graph.nodes:
        if node is attention:
            return late
        inputs = set(node.all_input_nodes)
        if inputs & set(late) or (u in inputs and not reads_only_metadata(node)):
            if not _is_view(node):
                raise Misfit(
                    f"u is used before the attention: {spoken(node)} at {source_line(node)}",
                    "use it after the attention",
                )
            late.append(node)
    raise AssertionError("the attention is not in its own graph")


def _rewrite(packed: Packed) -> None:
    attention, u, silu = packed.attention, packed.u, packed.silu
    graph = attention.graph
    (x,) = silu.all_input_nodes
    before = attention.next  # what is new comes between the attention and this
    flat = u
    if not same_shape(shape(u), (*shape(silu)[:-1], shape(u)[-1])):
        flat = insert_call(graph, before, aten.flatten.using_ints, (u, -2), like=attention)
    columns = (packed.columns[name] for name in ("u", "q", "k", "v"))
    call = torch.ops.hstu_compile.silu_attention.default
    both = insert_call(graph, before, call, (x, flat, *attention.args, *columns), like=attention)
    new_u, out = (insert_call(graph, before, operator.getitem, (both, i), like=attention) for i in (0, 1))
    if flat is not u:
        new_u = insert_call(graph, before, aten.unflatten.int, (new_u, -1, list(shape(u)[-2:])), like=attention)
    anchor = out if flat is u else new_u
    for view in packed.late:
        anchor.append(view)
        anchor = view
    u.replace_all_uses_with(
        new_u, delete_user_cb=lambda user: user not in (both, flat) and not reads_only_metadata(user)
    )
    attention.replace_all_uses_with(out)
    erase_dead([attention])
