"""Lookups in tiny tables (relative bias by position or bucketed time) become `hstu_compile::table_lookup`.

The forward stays the same gather; what changes is its gradient, which ATen scatters with atomics.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.graph import aten, erase_dead, insert_call, is_call, is_floating, may_require_grad, value
from hstu_compile.passes.report import Region, Report, source_line

NAME = "table_lookup"
MAX_ENTRIES = 512  # measured on an H200: with 4095 entries index_add's atomics seldom collide, and win
MAX_COLUMNS = 32
LOOKUPS_PER_ENTRY = 64  # with fewer, hardly any gradients collide


@dataclass(frozen=True)
class Lookup:
    """A gather of whole slices along one dimension of a floating-point tensor."""

    table: fx.Node
    dim: int
    index: fx.Node
    may_be_negative: bool  # counts from the end, as in table[-1]
    extras: str | None = None  # what the gather does beyond looking up

    @property
    def entries(self) -> int | torch.SymInt:
        return value(self.table).shape[self.dim]


def run(gm: fx.GraphModule, report: Report) -> int:
    """Rewrite every lookup that fits; returns how many."""
    fused = 0
    for node in list(gm.graph.nodes):
        lookup = _read(node)
        if lookup is None or not _is_tiny_table_with_many_lookups(lookup):
            continue
        reason = _misfit(lookup)
        table = value(lookup.table)
        what = f"table {list(table.shape)} looked up by index {list(value(lookup.index).shape)}"
        if reason is None:
            _rewrite(gm.graph, node, lookup)
            fused += 1
        report.add(Region(NAME, what, source_line(node), reason, kernel="table_grad" if reason is None else None))
    return fused


def _read(node: fx.Node) -> Lookup | None:
    table: Any
    index: Any
    indices: Any
    if is_call(node, aten.index_select.default):
        table, dim, index = node.args
        return Lookup(table, dim % max(value(table).dim(), 1), index, may_be_negative=False)
    if is_call(node, aten.embedding.default):
        names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
        given: dict[str, Any] = {**dict(zip(names, (None, None, -1, False, False), strict=True)), **node.kwargs}
        given.update(zip(names, node.args, strict=False))
        unusual = [name for name in names[3:] if given[name]] + ["padding_idx"] * (given["padding_idx"] != -1)
        return Lookup(given["weight"], 0, given["indices"], may_be_negative=False, extras=", ".join(unusual) or None)
    if is_call(node, aten.index.Tensor):
        table, indices = node.args
        dims = [dim for dim, index in enumerate(indices) if index is not None]
        if len(dims) == 1:
            return Lookup(table, dims[0], indices[dims[0]], may_be_negative=True)
    return None


def _is_tiny_table_with_many_lookups(lookup: Lookup) -> bool:
    """Whether this is the pattern at all: what fails here is another thing (items, a permutation), not a near miss."""
    table, index = value(lookup.table), value(lookup.index)
    if not is_floating(lookup.table) or index.dtype not in (torch.int32, torch.int64) or table.dim() == 0:
        return False
    if not all(isinstance(size, int) for size in table.shape):
        return False
    if not 0 < lookup.entries <= MAX_ENTRIES or table.numel() > MAX_ENTRIES * MAX_COLUMNS:
        return False
    # A token count that changes between calls is taken to be large.
    if all(isinstance(size, int) for size in index.shape):
        if math.prod(index.shape) < LOOKUPS_PER_ENTRY * lookup.entries:
            return False
    return may_require_grad(lookup.table)


def _misfit(lookup: Lookup) -> str | None:
    table, index = value(lookup.table), value(lookup.index)
    if lookup.extras:
        return f"the lookup has {lookup.extras}"
    if table.dim() > 2:
        return f"the table has {table.dim()} dimensions; at most 2 fit"
    columns = table.numel() // lookup.entries
    if columns > MAX_COLUMNS:
        return f"the table has {columns} columns; at most {MAX_COLUMNS} fit"
    if table.device != index.device:
        return f"the index is on {index.device}, the table on {table.device}"
    return None


def _rewrite(graph: fx.Graph, node: fx.Node, lookup: Lookup) -> None:
    def call(target, *args) -> fx.Node:
        return insert_call(graph, node, target, args, like=node)

    table, index = lookup.table, lookup.index
    if lookup.may_be_negative:
        from_the_end = call(aten.add.Tensor, index, lookup.entries)
        index = call(aten.where.self, call(aten.lt.Scalar, index, 0), from_the_end, index)
    if lookup.dim == 1:
        table = call(aten.t.default, table)
    new = call(torch.ops.hstu_compile.table_lookup.default, table, index)
    if lookup.dim == 1:
        last = value(new).dim() - 1
        new = call(aten.permute.default, new, [last, *range(last)])
        new = call(aten.contiguous.default, new)  # views further on rely on it
    node.replace_all_uses_with(new)
    erase_dead([node])
