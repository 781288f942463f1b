"""The first half of the layer: norm -> projection -> silu -> split into u, v, q, k, known by where the slices flow.

Nothing is rewritten: cuBLAS runs the projection at the chip's rate, and Inductor fuses the norm and the silu. The nodes
get `meta["hstu_compile_role"]` and the number of their layer, by which `passes/recompute.py` finds them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from hstu_compile.passes.activation import as_activation
from hstu_compile.passes.axes import EXPANDS, PERMUTES, RESHAPES
from hstu_compile.passes.graph import (
    COPIES,
    SIZE_OF,
    aten,
    is_call,
    is_cast,
    is_parameter,
    is_tensor,
    reads_only_metadata,
    same,
    same_shape,
    shape,
    value,
)
from hstu_compile.passes.norm import Norm, as_norm
from hstu_compile.passes.report import MISSED, Region, Report, identity, source_line, spoken

NAME = "uvqk"
ROLE = "hstu_compile_role"
LAYER = "hstu_compile_layer"  # a number

# A projection and where its input stands among its arguments.
PROJECTIONS = {aten.linear.default: 0, aten.addmm.default: 1, aten.mm.default: 0, aten.matmul.default: 0}
PRODUCTS = {aten.einsum.default, aten.bmm.default, aten.matmul.default, aten.baddbmm.default}
SPLITS = {aten.split_with_sizes.default, aten.split.Tensor, aten.split.sizes, aten.chunk.default, aten.unbind.int}
SLICES = {aten.slice.Tensor, aten.narrow.default, aten.select.int}
MOVES = {
    *PERMUTES,
    *RESHAPES,
    *EXPANDS,
    *COPIES,
    aten.index.Tensor,
    aten.index_select.default,
}  # the same numbers elsewhere
FILLS = {aten.masked_fill.Scalar, aten.where.ScalarOther, aten.where.self}  # zeros in padded rows


@dataclass
class Flow:
    """Where the slices of one projection go."""

    roles: dict[str, fx.Node] = field(default_factory=dict)  # role -> the slice
    silu: dict[fx.Node, set[str]] = field(default_factory=dict)  # silu -> the roles behind it
    ends: list[fx.Node] = field(default_factory=list)  # calls at which a slice was lost sight of


def run(gm: fx.GraphModule, report: Report) -> int:
    """Tag the first half of every layer; returns how many."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    by_input: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if is_call(node, *PROJECTIONS) and ROLE not in node.meta and is_tensor(node) and len(shape(_weight(node))) == 2:
            by_input.setdefault(_source(_input(node)), []).append(node)
    found = 0
    for source, projections in by_input.items():
        flows = {p: flow for p in projections if (flow := _follow(p)).roles}
        roles = {role for flow in flows.values() for role in flow.roles}
        if not roles:
            continue
        norm = as_norm(source)
        words, where = _in_words(norm, flows, order), source_line(next(iter(flows)))
        if not roles >= {"q", "k", "v"}:
            reason, change, culprit = _lost(flows, {"q", "k", "v"} - roles)
            report.add(Region(NAME, words, where, reason, change=change, culprit=culprit))
            continue
        _tag(norm, flows, layer=found)
        report.add(Region(NAME, words, where, kernel="cuBLAS and Inductor", rewritten=False))
        found += 1
    return found


def _lost(flows: dict[fx.Node, Flow], roles: set[str]) -> tuple[str, str | None, str | None]:
    """Why the slices for these roles were not found, a change, and the call that is in the way, if it is one alone."""
    reason = f"no HSTU attention was found that takes its {', '.join(sorted(roles))}"
    ends = list(dict.fromkeys(end for flow in flows.values() for end in flow.ends))
    if not ends:
        return reason, None, None
    missed = next((end.meta[MISSED] for end in ends if MISSED in end.meta), None)
    if missed is not None:
        return reason, f"follows from attention, and is recognised once that is fused, at {missed}", None
    culprit = identity(ends[0]) if len(ends) == 1 else None
    return f"{reason}; last seen in {spoken(ends[0])} at {source_line(ends[0])}", None, culprit


def _input(projection: fx.Node) -> fx.Node:
    return projection.args[PROJECTIONS[projection.target]]  # type: ignore[index,return-value]


def _weight(projection: fx.Node) -> fx.Node:
    return projection.args[PROJECTIONS[projection.target] + 1]  # type: ignore[index,return-value]


def _source(node: fx.Node) -> fx.Node:
    while is_cast(node) or is_call(node, *RESHAPES):
        node = node.all_input_nodes[0]
    return node


def _follow(projection: fx.Node) -> Flow:
    """Forwards through splits, views, silu and jagged <-> dense, up to a use that tells the role."""
    flow = Flow()
    todo: list[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]] = [(projection, projection, ())]
    seen = set()
    while todo:
        node, piece, silus = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            role = _role(node, user)
            activation = as_activation(user)
            if role is not None:
                flow.roles.setdefault(role, piece)
                for silu in silus:
                    flow.silu.setdefault(silu, set()).add(role)
            elif activation is not None and activation[0] == "silu":
                todo.append((user, piece, (*silus, user)))
            elif is_call(user, *SLICES) or (is_call(node, *SPLITS) and not is_call(user, *SIZE_OF)):
                todo.append((user, user, silus))
            elif _moves(user, node):
                todo.append((user, piece, silus))
            elif is_tensor(user) and not reads_only_metadata(user):
                flow.ends.append(user)
    return flow


def _moves(user: fx.Node, node: fx.Node) -> bool:
    """Whether the call only moves, casts, scales or pads the numbers of `node`, its main input, or adds a bias."""
    jagged = getattr(user.target, "namespace", None) == "fbgemm" or is_call(node, *_fbgemm_lists(node))
    if is_call(user, aten.mul.Tensor, aten.div.Tensor):  # a scale: one number, or one a row
        others = [n for n in user.all_input_nodes if n is not node]
        return all(not is_tensor(n) or not shape(n) or same(shape(n)[-1], 1) for n in others)
    if is_call(user, aten.add.Tensor):
        return is_call(node, *PROJECTIONS) and all(is_parameter(n) for n in user.all_input_nodes if n is not node)
    if is_call(user, *FILLS):
        return same_shape(shape(user), shape(node))
    return (is_call(user, *MOVES, *SPLITS) or is_cast(user) or jagged) and user.all_input_nodes[0] is node


def _fbgemm_lists(node: fx.Node) -> tuple:
    """dense_to_jagged returns a list: its getitem moves the numbers on."""
    return (node.target,) if getattr(node.target, "namespace", None) == "fbgemm" else ()


def _role(node: fx.Node, user: fx.Node) -> str | None:
    """What a use makes of a slice."""
    name = getattr(getattr(user.target, "_schema", None), "name", "")
    if name == "hstu_compile::hstu_attention":
        return next((role for role, arg in zip("qkv", user.args, strict=False) if arg is node), None)
    if name == "hstu_compile::norm_gate_dropout":
        return "u" if user.args[1] is node else None
    if is_call(user, aten.mul.Tensor) and all(isinstance(arg, fx.Node) for arg in user.args):
        (other,) = [arg for arg in user.args if arg is not node] or [node]
        return "u" if as_norm(_source(other)) is not None else None  # type: ignore[arg-type]
    if is_call(user, *PRODUCTS) and user not in PROJECTIONS:
        operands = [n for n in user.all_input_nodes if is_tensor(n)][-2:]
        if _leads_to_silu(user):
            return "q" if operands[0] is node else "k"
        other_operands = [n for n in operands if n is not node]
        return "v" if any(_comes_from_silu(n) for n in other_operands) else None
    return None


def _leads_to_silu(product: fx.Node) -> bool:
    """Scores: pointwise calls and views lead from the product to a silu, without another product."""
    return any(as_activation(node) for node in _around(product, lambda node: list(node.users)))


def _comes_from_silu(weights: fx.Node) -> bool:
    """Attention weights: pointwise calls and views lead back to the silu of a product of two slices."""
    before = _around(weights, lambda node: node.all_input_nodes)
    return any(as_activation(node) for node in before) and any(is_call(node, *PRODUCTS) for node in before)


def _around(start: fx.Node, neighbours: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    """What is reached through tensors with the elements of `start`, products ending the search."""
    todo, seen = [start], {start}
    while todo:
        node = todo.pop()
        if node is not start and is_call(node, *PRODUCTS, *PROJECTIONS):
            continue
        near = {n for n in neighbours(node) if is_tensor(n) and same(value(n).numel(), value(start).numel())} - seen
        seen |= near
        todo += near
    return seen


def _tag(norm: Norm | None, flows: dict[fx.Node, Flow], layer: int) -> None:
    roles = {node: "input_layernorm" for node in (norm.interior if norm is not None else ())}
    for projection, flow in flows.items():
        roles[projection] = "uvqk_projection"
        roles |= {silu: "input_silu" for silu in flow.silu}
    for node, role in roles.items():
        node.meta |= {ROLE: role, LAYER: layer}


def _in_words(norm: Norm | None, flows: dict[fx.Node, Flow], order: dict[fx.Node, int]) -> str:
    words = [] if norm is None else [norm.name]
    for projection in flows:
        weight = _weight(projection)
        rows, cols = shape(weight)[:: -1 if is_call(projection, aten.linear.default) else 1]
        bias = is_call(projection, aten.addmm.default) or (
            is_call(projection, aten.linear.default) and len(projection.args) > 2 and projection.args[2] is not None
        )
        name = str(projection.target).split(".")[1]
        words.append(f"{name} {rows}x{cols}{' with bias' if bias else ''}")
    if len(set(words[-len(flows) :])) == 1 and len(flows) > 1:
        words[-len(flows) :] = [f"{len(flows)} times {words[-1]}"]
    pieces = {role: piece for flow in flows.values() for role, piece in flow.roles.items()}
    activated = {role for flow in flows.values() for roles in flow.silu.values() for role in roles}
    names = sorted(pieces, key=lambda role: order.get(pieces[role], 0))
    if activated:
        words.append("silu" if activated == set(names) else f"silu on {', '.join(n for n in names if n in activated)}")
    return " -> ".join([*words, f"split {', '.join(names)}"])
