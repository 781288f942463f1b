"""The gate of an attention over a paged history: one op of both, whose kernels have less to write and to launch.

norm_gate_dropout(paged_hstu_attention(q, k, v, pool), u)      ->      gated_paged_attention(q, k, v, pool, u)
"""

import torch
from torch import fx

from hstu_compile.ops.norm_gate_dropout import PARAMETERS, WITHOUT_DROPOUT
from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    aten,
    erase_dead,
    insert_call,
    is_call,
    is_tensor,
    may_write,
    same_shape,
    shape,
    share_storage,
    value,
)
from hstu_compile.passes.packed_gate import GATE, SEED, A, groups_in_row
from hstu_compile.passes.paged_attention import PAGED
from hstu_compile.passes.report import Misfit

GATED = torch.ops.hstu_compile.gated_paged_attention.default


def run(graph: fx.Graph) -> int:
    """Rewrite a graph that has no gradient, in place; how many times."""
    count = 0
    for attention in list(graph.find_nodes(op="call_function", target=PAGED)):
        gate = _only_reader(attention)
        if gate is None or not _fits(attention, gate):
            continue
        try:
            _rewrite(attention, gate, groups_in_row(attention, gate))
            count += 1
        except Misfit:
            pass  # a norm over other elements than those of a row
    return count


def _only_reader(attention: fx.Node) -> fx.Node | None:
    """The gate, if it alone reads the attention, as what it normalises."""
    node = attention
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, GATE):
            return user if user.args[A] is node and user.args.count(node) == 1 else None
        if not is_call(user, *RESHAPES) or user.args[0] is not node:
            return None
        node = user
    return None


def _fits(attention: fx.Node, gate: fx.Node) -> bool:
    """Whether the op computes the same where the gate stands."""
    if gate.args[SEED] is not None or value(gate).dtype != value(attention).dtype:
        return False
    operands = [x for x in attention.all_input_nodes if is_tensor(x)]
    node = attention.next
    while node is not gate:
        if may_write(node.target) and any(
            share_storage(x, operand) for x in node.all_input_nodes if is_tensor(x) for operand in operands
        ):
            return False
        node = node.next
    return True


def _rewrite(attention: fx.Node, gate: fx.Node, num_groups: int) -> None:
    graph, row = gate.graph, value(attention).shape[-2:].numel()
    a, u, weight, bias, _, *others = gate.args
    if value(a).shape[1:].numel() != row:  # the same numbers, in longer or shorter rows
        u = insert_call(graph, gate, aten.reshape.default, (u, [-1, row]), like=gate)
    named = dict(zip(PARAMETERS, others, strict=True)) | {"num_groups": num_groups}
    args = (*attention.args, u, weight, bias, *(named[name] for name in WITHOUT_DROPOUT))
    out = insert_call(graph, gate, GATED, args, like=gate)
    if not same_shape(shape(out), shape(gate)):
        out = insert_call(graph, gate, aten.reshape.default, (out, [-1, shape(gate)[-1]]), like=gate)
    gate.replace_all_uses_with(out)
    erase_dead([gate])
