"""Selective recompute as a property of the graph: which parts of a uvqk projection the backward computes again.

The partitioner of AOTAutograd honours `node.meta["recompute"]`, which tracing carries from here into the joint graph.
The nodes are named by the uvqk pass: `node.meta["hstu_compile_role"]`.
"""

from collections.abc import Collection

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from hstu_compile.passes import parts
from hstu_compile.passes.report import Report, source_line

ROLES = ("input_layernorm", "uvqk_projection", "input_silu")


def recompute(gm: fx.GraphModule, roles: Collection[str], report: Report) -> None:
    """Tag the nodes of these roles, and report them."""
    for part in parts(gm):
        for node in part.graph.nodes:
            role = node.meta.get("hstu_compile_role")
            if role in roles:
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                report.recomputed.append(f"{role}\n    at {source_line(node)}")
