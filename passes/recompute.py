"""Selective recompute as a property of the graph: which parts of a uvqk projection the backward computes again.

The partitioner of AOTAutograd honours `node.meta["recompute"]`, which tracing carries from here into the joint graph.
The nodes are named by the uvqk pass: `node.meta["hstu_compile_role"]`. Slices, views and casts of what is recomputed
are recomputed too: else the partitioner saves them, which our ops and products read, and nothing is freed.

An activation that is not named is saved. The partitioner by itself would compute it again, since that seems free: but
u, v, q and k go into products and ops of ours, which do not fuse with it, so it is another pass over all four.

Under a memory budget nothing is chosen here: the nodes are labelled as candidates, for `recompute_budget.py`.
"""

import contextlib
import hashlib
import operator
from collections.abc import Collection, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from hstu_compile.passes import parts
from hstu_compile.passes.graph import cast, is_call, is_cast, shape, storages, total, value
from hstu_compile.passes.index_space import symbol_hints
from hstu_compile.passes.report import Recomputed, Report, source_line
from hstu_compile.passes.uvqk import LAYER, MOVES, PROJECTIONS, ROLE, SLICES, SPLITS

ROLES = ("input_layernorm", "uvqk_projection", "input_silu")
SAVED = "input_silu"  # unless recomputed
CANDIDATE = "hstu_compile_recompute"  # in node.meta["custom"], which tracing carries on too
FLOPS_PER_BYTE = 200  # what an H200 multiplies in half precision while its memory moves a byte; an H100: 300


def recompute(gm: fx.GraphModule, roles: Collection[str], report: Report, *, choose: bool = False) -> None:
    """Tag the nodes of these roles, and report them; tag what is to be saved.

    choose: which of these roles are recomputed is decided later; label their nodes as candidates.
    """
    hints, layers = symbol_hints(gm.graph), 0
    for part in parts(gm):
        for (role, layer), nodes in _pieces(part.graph, roles).items():
            piece = _described(role, layers + layer, nodes, hints)
            for node in nodes:
                if choose:
                    node.meta["custom"] = {**node.meta.get("custom", {}), CANDIDATE: piece}
                else:
                    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            if not choose:
                report.recomputed.append(piece)
        layers += len({node.meta[LAYER] for node in part.graph.nodes if LAYER in node.meta})
        for node in part.graph.nodes:
            if node.meta.get(ROLE) == SAVED:
                node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
        part.recompile()


def candidate(node: fx.Node) -> Recomputed | None:
    """What the node is labelled as; in the joint graph, nodes of the backward are labelled as their forward is."""
    return node.meta.get("custom", {}).get(CANDIDATE)


class SaveResults(CustomGraphPass):
    """Of what a call to be saved is decomposed into, save the result alone: its steps may be in float32.

    A pass over the joint graph, for Inductor's `joint_custom_pre_pass`; the user's own ones follow.
    """

    def __init__(self, own: Any) -> None:
        self.own = own if isinstance(own, (list, tuple)) else [] if own is None else [own]

    def __call__(self, graph: fx.Graph) -> None:
        saved = {node for node in graph.nodes if node.meta.get("recompute") == CheckpointPolicy.MUST_SAVE}
        for step in [node for node in saved if saved & node.users.keys()]:
            del step.meta["recompute"]
        for one in self.own:
            one(graph)

    def uuid(self) -> Any:
        ids = [get_hash_for_files((__file__,)), *(one.uuid() for one in self.own)]
        return None if None in ids else tuple(ids)


def cached_apart(gm: fx.GraphModule) -> contextlib.AbstractContextManager[None]:
    """Compile in it: AOTAutograd's cache keys leave node.meta out, and would serve a graph with other tags; and the
    values of symbolic sizes, for which candidates are chosen."""
    nodes = [node for part in parts(gm) for node in part.graph.nodes]
    tags = [(node.name, policy.name) for node in nodes if (policy := node.meta.get("recompute")) is not None]
    candidates = [(node.name, c.role, c.layer) for node in nodes if (c := candidate(node)) is not None]
    hints = sorted((symbol.name, size) for symbol, size in symbol_hints(gm.graph).items()) if candidates else []
    marks = hashlib.sha256(repr((tags, candidates, hints)).encode()).hexdigest()
    config = torch.compiler.config
    tag = " ".join(filter(None, [config.cache_key_tag, f"hstu_compile.recompute={marks}"]))
    return config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]


def _pieces(graph: fx.Graph, roles: Collection[str]) -> dict[tuple[str, int], list[fx.Node]]:
    """The nodes of each role in each layer, with what moves and casts their numbers."""
    piece_of: dict[fx.Node, tuple[str, int]] = {}
    for node in graph.nodes:
        role = node.meta.get(ROLE)
        if role in roles:
            piece_of[node] = role, node.meta[LAYER]
        elif role is None and _moves(node) and node.args[0] in piece_of:
            piece_of[node] = piece_of[node.args[0]]
        if is_call(node, *PROJECTIONS):
            _show_cast(node, piece_of)
    pieces: dict[tuple[str, int], list[fx.Node]] = {}
    for node, piece in piece_of.items():
        pieces.setdefault(piece, []).append(node)
    return pieces


def _described(role: str, layer: int, nodes: list[fx.Node], hints: Mapping[sympy.Symbol, int]) -> Recomputed:
    read = {source for node in nodes for source in node.all_input_nodes} - set(nodes)
    results = [node for node in nodes if node.users.keys() - set(nodes)]
    frees = total(storages(results).values(), hints)
    moved = total(storages(read).values(), hints) + frees
    products = [node for node in nodes if is_call(node, *PROJECTIONS)]
    flops = total((2 * value(node).numel() * shape(_input(node))[-1] for node in products), hints)
    return Recomputed(role, layer, source_line(nodes[0]), frees, max(moved, flops / FLOPS_PER_BYTE))


def _input(projection: fx.Node) -> fx.Node:
    return projection.args[PROJECTIONS[projection.target]]  # type: ignore[index,return-value]


def _moves(node: fx.Node) -> bool:
    """Whether the node holds numbers of its first argument, elsewhere or in another dtype."""
    return is_call(node, operator.getitem, *MOVES, *SLICES, *SPLITS) or is_cast(node)


def _show_cast(projection: fx.Node, piece_of: dict[fx.Node, tuple[str, int]]) -> None:
    """Under autocast a projection casts its input itself: as a node of its own the cast can be recomputed."""
    source = _input(projection)
    if source in piece_of and value(source).dtype != value(projection).dtype:
        copy = cast(source, value(projection).dtype, before=projection)
        projection.replace_input_with(source, copy)
        piece_of[copy] = piece_of[source]
