"""Selective recompute as a property of the graph: which parts of a uvqk projection the backward computes again.

The partitioner of AOTAutograd honours `node.meta["recompute"]`, which tracing carries from here into the joint graph.
The nodes are named by the uvqk pass: `node.meta["hstu_compile_role"]`. Slices, views and casts of what is recomputed
are recomputed too: else the partitioner saves them, which our ops and products read, and nothing is freed.

An activation that is not named is saved. The partitioner by itself would compute it again, since that seems free: but
u, v, q and k go into products and ops of ours, which do not fuse with it, so it is another pass over all four.
"""

import contextlib
import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from hstu_compile.passes import parts
from hstu_compile.passes.graph import cast, is_call, is_cast, value
from hstu_compile.passes.report import Report, source_line
from hstu_compile.passes.uvqk import MOVES, PROJECTIONS, ROLE, SLICES, SPLITS

ROLES = ("input_layernorm", "uvqk_projection", "input_silu")
SAVED = "input_silu"  # unless recomputed


def recompute(gm: fx.GraphModule, roles: Collection[str], report: Report) -> None:
    """Tag the nodes of these roles, and report them; tag what is to be saved."""
    for part in parts(gm):
        tagged: set[fx.Node] = set()
        for node in part.graph.nodes:
            role = node.meta.get(ROLE)
            if role in roles:
                report.recomputed.append(f"{role}\n    at {source_line(node)}")
                tagged.add(node)
            elif role == SAVED:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            elif role is None and _moves(node) and node.args[0] in tagged:
                tagged.add(node)
            elif is_call(node, *PROJECTIONS):
                _show_cast(node, tagged)
        for node in tagged:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        part.recompile()


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


def cached_apart(roles: Collection[str]) -> contextlib.AbstractContextManager[None]:
    """Compile in it: AOTAutograd's cache keys leave node.meta out, and would serve a graph with other roles' tags."""
    config = torch.compiler.config
    tag = " ".join(filter(None, [config.cache_key_tag, *(f"recompute={role}" for role in sorted(roles))]))
    return config.patch(cache_key_tag=tag)  # type: ignore[attr-defined]


def _moves(node: fx.Node) -> bool:
    """Whether the node holds numbers of its first argument, elsewhere or in another dtype."""
    return is_call(node, operator.getitem, *MOVES, *SLICES, *SPLITS) or is_cast(node)


def _show_cast(projection: fx.Node, tagged: set[fx.Node]) -> None:
    """Under autocast a projection casts its input itself: as a node of its own the cast can be recomputed."""
    source = projection.args[PROJECTIONS[projection.target]]  # type: ignore[index]
    if source in tagged and value(source).dtype != value(projection).dtype:
        copy = cast(source, value(projection).dtype, before=projection)  # type: ignore[arg-type]
        projection.replace_input_with(source, copy)  # type: ignore[arg-type]
        tagged.add(copy)
