"""Recognise and rewrite: FX graph in, FX graph out. One pattern a module, in the order of `NAMES`."""

if __name__ != "hstu_compile.passes":
    raise ImportError(f"this folder was imported as {__name__!r}; import it as hstu_compile.passes")

import importlib
from collections.abc import Iterable, Iterator

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch._higher_order_ops.wrap import tag_activation_checkpoint

from hstu_compile.passes.activation import as_silu
from hstu_compile.passes.contents_inside import carry_inside
from hstu_compile.passes.joined_parts import as_layout
from hstu_compile.passes.report import Report
from hstu_compile.passes.searched_lists import as_whole

NAMES = ("attention", "uvqk", "output", "packed_gradient", "table_lookup")
ASKED_FOR = ("candidates",)  # after these, where an option turns it on

# Calls whose body is an ordinary part of the model: it is captured and rewritten like the graph around it. Of
# checkpointed regions only those with a context function: the others are captured as calls of the graph around them.
CALLS_OF_SUBGRAPHS = (tag_activation_checkpoint, invoke_subgraph)


def apply(gm: fx.GraphModule, report: Report, names: Iterable[str] = NAMES) -> int:
    """Run the named passes in place, also inside checkpointed regions; returns how many regions were fused."""
    chosen = [name for name in (*NAMES, *ASKED_FOR) if name in set(names)]
    modules = [importlib.import_module(f"hstu_compile.passes.{name}") for name in chosen]
    fused = 0
    carry_inside(gm.graph, [call for part in parts(gm) for call in _calls(part)], CALLS_OF_SUBGRAPHS)
    for part in parts(gm):
        with torch.device("cpu"):  # whatever the caller's default device is: masks are evaluated there
            as_layout(part.graph)
            as_silu(part.graph)
            as_whole(part.graph)
            fused += sum(module.run(part, report) for module in modules)
        part.graph.lint()
        part.recompile()
    return fused


def parts(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The graph and the bodies of its checkpointed and nested regions, each once."""
    seen = [gm]
    for part in seen:
        yield part
        for _, body in _calls(part):
            if not any(body is other for other in seen):
                seen.append(body)


def _calls(gm: fx.GraphModule) -> list[tuple[fx.Node, fx.GraphModule]]:
    """The calls of checkpointed and nested regions, and their bodies."""
    calls = [call for target in CALLS_OF_SUBGRAPHS for call in gm.graph.find_nodes(op="call_function", target=target)]
    return [(call, getattr(gm, call.args[0].target)) for call in calls]
