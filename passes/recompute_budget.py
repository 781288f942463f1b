"""Recompute under a memory budget: what the backward computes again of each layer, so that the rest fits.

AOTAutograd's partitioner decides what is held; here it is only asked, as often as needed: with the tags of the first n
candidates, in the order of their time for each byte they free, for the least n that fits. What is counted is what a
partition holds, not an estimate. docs/recompute.md says why torch's own memory budget does not serve.
"""

import bisect
import copy
import functools
import warnings
from collections.abc import Collection
from typing import Any

from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
from torch import fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

from hstu_compile.passes.graph import storages, total
from hstu_compile.passes.index_space import symbol_hints
from hstu_compile.passes.recompute import ROLES, candidate
from hstu_compile.passes.report import Recomputed


class WithinBudget(CustomPartitionerFn):
    """For Inductor's `custom_partitioner_fn`: the partitioner that would run anyway, on a graph tagged to fit.

    budget: bytes, or up to 1 the share of what is held without recompute.
    own: the user's own partitioner, if there is one.
    chosen: what is recomputed, once this has been called.
    """

    def __init__(self, budget: float, own: CustomPartitionerFn | None = None) -> None:
        self.budget, self.own = budget, own
        self.chosen: list[Recomputed] = []

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        partition = self.own or functools.partial(min_cut_rematerialization_partition, compiler="inductor")
        hints = symbol_hints(gm.graph)
        candidates = sorted(dict.fromkeys(c for _, c in _candidates(gm.graph)), key=lambda c: c.cost / max(c.frees, 1))

        @functools.cache
        def held(count: int) -> int:
            tried = fx.GraphModule(gm, copy.deepcopy(gm.graph))
            _tag(tried.graph, candidates[:count])
            forward, _ = partition(tried, joint_inputs, **kwargs)
            return total(_made_and_kept(forward, kwargs["num_fwd_outputs"]).values(), hints)

        limit = self.budget if self.budget > 1 else self.budget * held(0)
        count = 0
        if held(0) > limit:
            count = bisect.bisect_left(range(len(candidates)), True, key=lambda count: held(count) <= limit)
        if held(count) > limit:
            warnings.warn(
                f"hstu_compile: recompute_budget is {self.budget!r}, which here is {int(limit):,} bytes, but the least "
                f"that can be held for the backward is {held(count):,} bytes: with all of the layers that can be "
                f"computed again ({count} parts) computed again. Without recompute it is {held(0):,} bytes.",
                stacklevel=2,
            )
        _tag(gm.graph, candidates[:count])
        self.chosen += sorted(candidates[:count], key=lambda c: (c.layer, ROLES.index(c.role)))
        return partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        own = None if self.own is None else self.own.uuid()
        return None if self.own is not None and own is None else (get_hash_for_files((__file__,)), self.budget, own)

    def __reduce__(self) -> Any:  # Inductor's cache keys hold its config pickled (torch 2.11, 2.13)
        return WithinBudget, (self.budget, self.own)


def _candidates(graph: fx.Graph) -> list[tuple[fx.Node, Recomputed]]:
    """The labelled nodes of the forward, outside of checkpointed regions: what is recomputed there the user says."""
    return [
        (node, found)
        for node in graph.nodes
        if (found := candidate(node)) is not None
        and node.meta.get("partitioner_tag") != "is_backward"
        and "ac_graph_id" not in node.meta
    ]


def _tag(graph: fx.Graph, chosen: Collection[Recomputed]) -> None:
    for node, found in _candidates(graph):
        if found in chosen:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def _made_and_kept(forward: fx.GraphModule, outputs: int) -> dict[int, Any]:
    """The memory that the forward makes and gives to the backward; what it was given its caller holds."""
    given = storages(forward.graph.find_nodes(op="placeholder"))
    results: Any = forward.graph.output_node().args[0]
    kept = [node for node in results[outputs:] if isinstance(node, fx.Node)]
    return {storage: size for storage, size in storages(kept).items() if storage not in given}
