"""Attention over a paged cache: each attention computes, and stores, what no page holds yet.

    hstu_attention(q, k, v)      ->      append_kv(pool, k, v); paged_hstu_attention(q, k, v, pool)      at new rows

The new rows are selected up to the inputs and down to the outputs by `selected_rows`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from hstu_compile.passes.graph import argument, shape, value
from hstu_compile.passes.idle_dropout import remove_idle_dropout
from hstu_compile.passes.index_space import arguments
from hstu_compile.passes.selected_rows import SelectedRows

ATTENTION = torch.ops.hstu_compile.hstu_attention.default
PAGED = torch.ops.hstu_compile.paged_hstu_attention.default
APPEND = torch.ops.hstu_compile.append_kv.default
WAIT = torch.ops.hstu_compile.wait_layer.default

# The inputs that a paged graph has behind the model's own. `valid_lengths` is what the pages hold: `cached_lengths` is
# less where rows of these are computed again, since they are read.
INPUTS = ("rows", "row_offsets", "page_table", "cached_lengths", "valid_lengths")


@dataclass
class Paged:
    """What became of a graph."""

    chosen: list[bool]  # output by output: has it the new rows only?
    reads: list[fx.Node]  # row numbers that are read of new rows: these rows must be new
    computed_whole: list[fx.Node]  # values of all rows, from which the new ones are picked


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    """Every attention of a graph, layer by layer."""
    return list(gm.graph.find_nodes(op="call_function", target=ATTENTION))


def run(gm: fx.GraphModule, pools: Sequence[Tensor], max_pages: int) -> Paged:
    """Rewrite the graph in place; its inputs are then followed by `INPUTS`, and the pools are its buffers.

    Raises:
        MixesRows: the graph needs rows that are not new.
    """
    remove_idle_dropout(gm.graph)
    layers = attentions(gm)
    offsets, targets = (argument(layers[0], 3 + i, name) for i, name in ((0, "seq_offsets"), (2, "num_targets")))
    mode = value(layers[0]).fake_mode
    with mode, torch.no_grad():
        begins = torch.empty_like(value(offsets))
        counts = begins[1:].to(torch.int32)
        table = counts.new_empty(counts.shape[0], max_pages)
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    rows = torch.zeros(7, dtype=torch.int64, device=begins.device)
    rows = mode.from_tensor(rows, symbolic_context=context, source=ConstantSource("hstu_compile_rows"))
    inputs = dict(zip(INPUTS, _inputs(gm.graph, (rows, begins, table, counts, counts)), strict=True))

    def paged(layer: int) -> Any:
        def replace(selection: SelectedRows, node: fx.Node) -> fx.Node:
            a = arguments(node)
            q, k, v = (selection.at(a[name], (selection.rows,)) for name in "qkv")
            with gm.graph.inserting_before(node):
                pool = gm.graph.get_attr(f"hstu_compile_pool_{layer}")
            pool.meta["val"] = mode.from_tensor(pools[layer])
            where = (inputs["page_table"], inputs["cached_lengths"])
            selection.call(node, WAIT, (pool, layer))
            # What is full never changes, for it may be being copied.
            lengths = (targets, inputs["valid_lengths"])
            selection.call(node, APPEND, (pool, k, v, inputs["row_offsets"], *where, *lengths))
            # What the caller gives as the longest length may be another at every call: here it is what pages can hold.
            longest = max_pages * pools[0].shape[2]
            mask = [selection.whole(x) if isinstance(x, fx.Node) else x for x in list(a.values())[11:]]
            sequences = (inputs["row_offsets"], targets, None, longest)
            return selection.call(node, PAGED, (q, k, v, pool, *where, *sequences, *mask))

        return replace

    for layer, pool in enumerate(pools):
        gm.register_buffer(f"hstu_compile_pool_{layer}", pool, persistent=False)
    selection = SelectedRows(gm, inputs["rows"], {node: paged(layer) for layer, node in enumerate(layers)})
    chosen = selection.run()
    gm.graph.lint()
    gm.recompile()
    return Paged(chosen, selection.reads, selection.computed_whole)


def _inputs(graph: fx.Graph, values: Sequence[Tensor]) -> list[fx.Node]:
    last = list(graph.find_nodes(op="placeholder"))[-1]
    found = []
    for name, fake in zip(INPUTS, values, strict=True):
        with graph.inserting_after(last):
            last = graph.placeholder(f"hstu_compile_{name}")
        last.meta["val"] = fake
        found.append(last)
    return found


def geometry(node: fx.Node) -> tuple[Any, ...]:
    """(H, attn_dim, hidden_dim, dtype) of an attention's keys and values."""
    a = arguments(node)
    return (*shape(a["k"])[1:], shape(a["v"])[-1], value(a["k"]).dtype)
