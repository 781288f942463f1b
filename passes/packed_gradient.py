"""u, v, q, k = slices of x or of silu(x), attention of q, k, v: the backward writes one gradient of x.

    hstu_attention(q, k, v), u         ->         hstu_compile::silu_attention(x, u, q, k, v)

The backward of the slices would concatenate dq, dk, dv and du, that of silu multiply by silu'(x). The op writes them
into their columns of one dx, multiplied where silu was applied: before the split, or to some of the slices, or to none.
The forward stays what it is, and a bias has a gradient of its own; u goes through the op for the sake of its gradient.
After the output pass, which knows the end of a layer by its attention: where all that u meets is the gate of that
attention, the two become one op that takes u before silu (packed_gate.py).
"""

import operator
from dataclasses import dataclass

import torch
from torch import fx

from hstu_compile.ops.hstu_attention import ATTN_MASK, MASK_TILE_STATES
from hstu_compile.ops.packed_slices import as_arguments
from hstu_compile.passes import packed_gate
from hstu_compile.passes.attention_scores import DIVIDE, MULTIPLY
from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    aten,
    erase_dead,
    insert_call,
    is_call,
    is_cast,
    is_pure,
    is_tensor,
    may_require_grad,
    number,
    reads_only_metadata,
    real_users,
    same,
    same_shape,
    shape,
    value,
)
from hstu_compile.passes.inplace import as_copy, twin_of
from hstu_compile.passes.packed_columns import behind, between, columns_of, is_view, silu_between
from hstu_compile.passes.packed_gate import Part, refuse_writes
from hstu_compile.passes.report import Misfit, Region, Report, identity, source_line, spoken

NAME = "packed_gradient"
WHAT = "one gradient through {} -> attention"
ATTENTION = torch.ops.hstu_compile.hstu_attention.default


@dataclass
class Packed:
    """An attention of slices of one x, or of its silu."""

    attention: fx.Node
    x: fx.Node
    parts: dict[str, Part]  # u, q, k and v

    @property
    def whole_silu(self) -> fx.Node | None:
        """The silu of all of x."""
        silus = {part.silu for part in self.parts.values()}
        return silus.pop() if len(silus) == 1 else None

    def in_words(self) -> str:
        names = sorted(self.parts, key=lambda name: self.parts[name].columns.at)
        activated = [name for name in names if self.parts[name].silu is not None]
        split = f"split {', '.join(names)}"
        if self.whole_silu is not None:
            return f"silu -> {split}"
        return f"{split} -> silu on {', '.join(activated)}" if activated else split


def run(gm: fx.GraphModule, report: Report) -> int:
    """Rewrite every attention whose gradients can be packed; returns how many."""
    fused = 0
    for attention in gm.graph.find_nodes(op="call_function", target=ATTENTION):
        candidates, others = _cut(attention)
        if not candidates:
            continue
        x = candidates[0]
        where = source_line(next((user for user in x.users if is_call(user, aten.silu.default)), x))
        if others:
            _report_changed(report, attention, x, others[0], where)
            continue
        try:
            what = _pack(_first(attention, candidates), where, report)
        except Misfit as misfit:
            report.add(Region(NAME, WHAT.format("slices"), where, misfit.reason, change=misfit.change))
            continue
        report.add(Region(NAME, what, where, kernel="the attention's own"))
        fused += 1
    return fused


def _pack(packed: Packed, where: str, report: Report) -> str:
    """Rewrite the attention, with its gate where that fits; what it was, in words."""
    what, gate = WHAT.format(packed.in_words()), None
    try:
        gate = packed_gate.find(packed.attention, packed.x, packed.parts)
    except Misfit as misfit:
        report.add(Region(NAME, f"{what} -> gate", where, misfit.reason, change=misfit.change))
    if gate is None:
        _check_order(packed)
        _rewrite(packed)
        return what
    packed_gate.rewrite(packed.attention, packed.x, packed.parts, gate)
    return f"{what} -> gate"


def _cut(attention: fx.Node) -> tuple[list[fx.Node], list[str]]:
    """What q, k and v are slices of, before silu, the nearest first; and which of them are not, where others are."""
    rows = {role: _rows_behind(operand) for role, operand in zip("qkv", attention.args, strict=False)}  # type: ignore[arg-type]
    nodes = [node for found in rows.values() for node in found]
    if not nodes:
        return [], []
    most = max(map(nodes.count, nodes))
    common = [node for node in dict.fromkeys(nodes) if nodes.count(node) == most]
    before_silu = [n for n in common if not (is_call(n, aten.silu.default) and n.args[0] in common)]
    return before_silu, [role for role, found in rows.items() if before_silu[0] not in found]


def _rows_behind(operand: fx.Node) -> list[fx.Node]:
    """What q, k or v, [.., H, D], is a part of, and that is [.., W]."""
    lead = shape(operand)[:-2]
    return [node for node in behind(operand) if _is_larger(node, operand) and same_shape(shape(node)[:-1], lead)]


def _is_larger(node: fx.Node, part: fx.Node) -> bool:
    return is_tensor(node) and not same(value(node).numel(), value(part).numel())


def _report_changed(report: Report, attention: fx.Node, x: fx.Node, role: str, where: str) -> None:
    """Where q, k or v is a slice of the same x, changed on its way to the attention."""
    *_, made = behind(attention.args["qkv".index(role)])  # type: ignore[arg-type]
    if may_require_grad(x) and any(x in behind(node) for node in made.all_input_nodes):
        reason = f"{role} is changed between the split and the attention: {spoken(made)} at {source_line(made)}"
        change = _instead_of(made, role)
        masks = [n for n in made.all_input_nodes if is_tensor(n) and value(n).dtype == torch.bool]
        if is_call(made, aten.mul.Tensor) and masks:
            *_, mask = behind(masks[0])
            reason = f"the mask clears padded keys, but not padded queries; it is made at {source_line(mask)}"
            change = "mask padded queries as well as padded keys (output rows of padded tokens change, no others)"
        what, culprit = WHAT.format("slices"), identity(made)
        report.add(Region(NAME, what, where, reason, change=change, culprit=culprit, removes_culprit=True))


def _instead_of(made: fx.Node, role: str) -> str:
    """The change where q, k or v is not what the split gives, but made of it."""
    twin = twin_of(made)
    if (twin or made.target) not in MULTIPLY | DIVIDE or number(made.args[1]) is None:
        effect = "same numbers up to rounding" if is_cast(made) else "another model; or leave yours"
        return f"take {role} as the split gives it ({effect})"
    if role == "v":
        return "move the constant factor to the attention weights, after silu (same numbers)"
    return as_copy(made) if twin else "move the constant factor to the scores, before silu (same numbers)"


def _first(attention: fx.Node, candidates: list[fx.Node]) -> Packed:
    """Of the first that fits.

    Raises:
        Misfit: none does; why the nearest does not.
    """
    reasons = []
    for x in candidates:
        try:
            return _find(attention, x)
        except Misfit as misfit:
            reasons.append(misfit)
    raise reasons[0]


def _find(attention: fx.Node, x: fx.Node) -> Packed:
    if (attention.args[ATTN_MASK] is None) != (attention.args[MASK_TILE_STATES] is None):
        raise Misfit("the attention has a mask tensor without the states of its tiles")
    if value(x).dtype != value(attention).dtype:
        raise Misfit(f"the projection gives {value(x).dtype}, the attention {value(attention).dtype}")
    if not same(value(x).stride(-1), 1):
        raise Misfit(f"the columns of {spoken(x)} do not stand side by side")
    pieces = _pieces(x, attention)
    parts = {}
    for role, operand in zip("qkv", attention.args, strict=False):
        parts[role] = Part(operand, *columns_of(operand, x))  # type: ignore[arg-type]
        parts[role].slice_of(*shape(operand)[-2:])  # type: ignore[arg-type]
        pieces.remove(_only_for(attention, x, role, operand, pieces))  # type: ignore[arg-type]
    if len(pieces) != 1:
        raise Misfit(f"x has {len(pieces)} used slices besides q, k and v, expected one, u")
    u = _u_of(pieces[0], x)
    parts["u"] = Part(u, *columns_of(u, x))
    _check_all(parts, x)
    refuse_writes(x, parts, attention)
    return Packed(attention, x, parts)


def _pieces(x: fx.Node, attention: fx.Node) -> list[fx.Node]:
    """What x is cut into, or its silu, where that is used: what is behind two of q, k and v is cut again; nobody uses
    the whole of x."""
    qkv: list[fx.Node] = list(attention.args[:3])  # type: ignore[arg-type]
    behind_each = [node for operand in qkv for node in between(operand, x) if _is_larger(node, operand)]
    pieces, todo = [], [(x, False)]
    while todo:
        node, activated = todo.pop()
        for user in real_users(node):
            silu = is_call(user, aten.silu.default) and not activated
            if not (is_view(user) or silu) or user.args[0] is not node:
                raise Misfit(
                    f"all of {spoken(node)} has another use: {spoken(user)} at {source_line(user)}",
                    "read its slices only",
                )
            is_whole = not is_tensor(user) or same(value(user).numel(), value(x).numel())
            if is_whole or behind_each.count(user) > 1:
                todo.append((user, activated or silu))
            elif real_users(user):
                pieces.append(user)
    return pieces


def _only_for(attention: fx.Node, x: fx.Node, role: str, operand: fx.Node, pieces: list[fx.Node]) -> fx.Node:
    """The piece behind an operand, which nobody else reads on the way."""
    reader = attention
    for node in between(operand, x):
        for user in real_users(node):
            if user is not reader:
                raise Misfit(
                    f"{role} has a second use: {spoken(user)} at {source_line(user)}",
                    f"leave {role} to the attention alone",
                )
        if node in pieces:
            return node
        reader = node
    raise Misfit(f"{role} is a slice of x that has another role too")


def _u_of(piece: fx.Node, x: fx.Node) -> fx.Node:
    """The silu of a slice, if that is all that is made of it, else the slice."""
    node = piece
    while len(users := real_users(node)) == 1:
        (node,) = users
        if is_call(node, aten.silu.default) and silu_between(piece, x) is None:
            return node
        if not is_view(node) or not is_tensor(node) or not same(value(node).numel(), value(piece).numel()):
            break
    return piece


def _check_all(parts: dict[str, Part], x: fx.Node) -> None:
    """The parts are all columns of x, each once."""
    width = shape(x)[-1]
    columns = sorted(column for part in parts.values() for column in part.columns.each())
    if not isinstance(width, int) or columns != list(range(width)):
        raise Misfit("u, q, k and v are not all columns of x, each once", "split all of it into these four")
    if any(size * step > width for part in parts.values() for size, step in part.columns.dims):
        raise Misfit("the heads of u, q, k or v are not a part of x each")


def _check_order(packed: Packed) -> None:
    """u is an argument of the op, which stands where the attention does."""
    u = packed.parts["u"].node
    if next(node for node in u.graph.nodes if node in (u, packed.attention)) is packed.attention:
        raise Misfit(f"u is made after the attention: {spoken(u)} at {source_line(u)}", "make it before the attention")


def _late(u: fx.Node, attention: fx.Node) -> list[fx.Node]:
    """What moves numbers of u before the attention, and can after it: u is a result of the op, which stands there."""
    late: list[fx.Node] = []
    for node in attention.graph.nodes:
        if node is attention:
            return late
        inputs = set(node.all_input_nodes)
        if inputs & set(late) or (u in inputs and not reads_only_metadata(node)):
            if not is_view(node) and not (is_call(node, *RESHAPES) and is_pure(node.target)):
                raise Misfit(
                    f"u is used before the attention: {spoken(node)} at {source_line(node)}",
                    "use it after the attention",
                )
            late.append(node)
    raise AssertionError("the attention is not in its own graph")


def _rewrite(packed: Packed) -> None:
    attention, part = packed.attention, packed.parts["u"]
    u, graph = part.node, attention.graph
    own = value(u).dim() - value(packed.x).dim() + 1  # dimensions of its columns
    slices = {role: one.slice_of(*shape(one.node)[-2:]) for role, one in packed.parts.items() if role != "u"}  # type: ignore[arg-type]
    slices["u"] = part.slice_of(*((1, *shape(u)[-1:]) if own == 1 else shape(u)[-2:]))  # type: ignore[arg-type]
    late = _late(u, attention)
    before = attention.next  # what is new comes between the attention and this
    heads = insert_call(graph, before, aten.unsqueeze.default, (u, -2), like=attention) if own == 1 else u
    call = torch.ops.hstu_compile.silu_attention.default
    args = (packed.x, heads, *attention.args, *as_arguments(slices))
    both = insert_call(graph, before, call, args, like=attention)
    new_u, out = (insert_call(graph, before, operator.getitem, (both, i), like=attention) for i in (0, 1))
    if own == 1:
        new_u = insert_call(graph, before, aten.squeeze.dim, (new_u, -2), like=attention)
    anchor = new_u if own == 1 else out
    for view in late:
        anchor.append(view)
        anchor = view
    u.replace_all_uses_with(
        new_u, delete_user_cb=lambda user: user not in (both, heads) and not reads_only_metadata(user)
    )
    attention.replace_all_uses_with(out)
    erase_dead([attention])
