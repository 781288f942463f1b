"""An attention of whose output some rows only are read: blocks of queries that nobody reads are masked.

The kernels visit no tile that the mask tensor leaves empty, forward and backward, and load none that is all ones. So
rows live or die in blocks no smaller than the kernels' tiles: a block of which one row is read is computed. The mask
has a byte for each row, and all columns read the same one. What is read stays the same to the bit; of rows that are
not read the gradient is 0 with and without it.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    aten,
    copied_before,
    insert_call,
    is_call,
    is_pure,
    is_tensor,
    real_users,
    same_shape,
    shape,
    total,
    value,
)
from hstu_compile.passes.index_space import arguments, symbol_hints, symbols_of
from hstu_compile.passes.moved_reads import MODES, changes, sizes_from_data_ignored
from hstu_compile.passes.row_reads import RowRead, row_read

BLOCK = 128  # rows
OPS = torch.ops.hstu_compile


def skip(attention: fx.Node) -> bool:
    """Mask the rows of the attention that nobody reads; False where all may be read, or are in one block."""
    a = arguments(attention)
    hints, longest = symbol_hints(attention.graph), value(a["max_seq_len"])
    if a["attn_mask"] is not None or not symbols_of(longest) <= hints.keys() or total([longest], hints) <= BLOCK:
        return False
    reads = _reads(attention)
    sizes = (shape(a["q"])[:1],) if a["seq_offsets"] is not None else (shape(a["q"])[:2], (_count(a["q"]),))
    for read in reads:
        numbered = shape(read.source)[: read.dims]
        if not any(same_shape(numbered, size) for size in sizes) or not _can_stand_before(attention, read):
            return False
    if reads:
        with sizes_from_data_ignored(attention):
            _mask(attention, a, reads)
    return bool(reads)


def _count(q: fx.Node) -> Any:
    return shape(q)[0] * shape(q)[1]


def _reads(attention: fx.Node) -> list[RowRead]:
    """Who reads rows of the attention, or of the gate behind it, if nobody does anything else with it."""
    node = attention
    while True:
        users = real_users(node)
        if is_call(node, OPS.silu_attention.default):
            users = [user for user in users if user.args[1] == 1]  # the other result is u
        reads = [read for user in users if (read := row_read(user)) is not None and read.source is node]
        if len(reads) == len(users):
            return reads
        first, *others = users
        is_gate = is_call(first, OPS.norm_gate_dropout.default) and first.args[0] is node
        if others or not (is_gate or first.target is operator.getitem or is_call(first, *RESHAPES)):
            return []
        node = first


def _can_stand_before(attention: fx.Node, read: RowRead) -> bool:
    """Whether it can be told before the attention which rows are read."""
    nodes = list(attention.graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    needed, todo = set(), list(read.others)
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        if order[node] >= order[attention]:
            if node is attention or node.op != "call_function" or not is_pure(node.target):
                return False
            todo += node.all_input_nodes
    between = nodes[order[attention] : order[read.call]]
    tensors = [node for node in needed if is_tensor(node)]
    return not any(node.target in MODES or any(changes(node, x) for x in tensors) for node in between)


def _mask(attention: fx.Node, a: dict[str, Any], reads: list[RowRead]) -> None:
    """Give the attention a mask tensor of the blocks in which rows are read."""
    before = functools.partial(copied_before, before=attention)

    def call(target: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(attention.graph, attention, target, args, kwargs, like=attention)

    def calculate(target: Callable, x: Any, y: Any) -> Any:
        return call(target, x, y) if isinstance(x, fx.Node) or isinstance(y, fx.Node) else target(x, y)

    def size(x: fx.Node, dim: int) -> Any:
        found = shape(x)[dim]
        return found if isinstance(found, int) else call(aten.sym_size.int, x, dim)

    def read_again(like: fx.Node, target: Callable, args: Any, kwargs: Any) -> fx.Node:
        return call(target, *fx.map_arg(args, before), **fx.map_arg(kwargs or {}, before))

    q, offsets, longest = a["q"], a["seq_offsets"], a["max_seq_len"]
    on = {"device": value(q).device}
    per_sequence = calculate(operator.floordiv, calculate(operator.add, longest, BLOCK - 1), BLOCK)
    block = call(aten.div.Scalar_mode, call(aten.arange.default, longest, **on), BLOCK, rounding_mode="floor")
    if offsets is None:
        batch = size(q, 0)
        sequence = call(aten.unsqueeze.default, call(aten.arange.default, batch, **on), 1)
        block_of = call(aten.add.Tensor, call(aten.mul.Tensor, sequence, per_sequence), block)
    else:
        batch = calculate(operator.sub, size(offsets, 0), 1)
        row = call(aten.arange.default, size(q, 0), dtype=value(offsets).dtype, **on)
        sequence = call(aten.sub.Tensor, call(aten.bucketize.Tensor, row, offsets, right=True), 1)
        sequence = call(aten.clamp.default, sequence, None, calculate(operator.sub, batch, 1))  # rows of no sequence
        position = call(aten.sub.Tensor, row, call(aten.index.Tensor, offsets, [sequence]))
        position = call(aten.clamp.default, position, None, calculate(operator.sub, longest, 1))
        own = call(aten.div.Scalar_mode, position, BLOCK, rounding_mode="floor")
        block_of = call(aten.add.Tensor, call(aten.mul.Tensor, sequence, per_sequence), own)
    live = call(aten.zeros.default, [calculate(operator.mul, batch, per_sequence)], dtype=torch.bool, **on)
    for read in reads:
        grid = block_of if len(shape(block_of)) == read.dims else call(aten.reshape.default, block_of, [-1])
        found = read.of(grid, read_again)
        live = call(aten.index_fill.int_Scalar, live, 0, call(aten.reshape.default, found, [-1]), 1)
    live = call(aten.reshape.default, live, [batch, per_sequence])
    rows = call(aten.unsqueeze.default, call(aten.index.Tensor, live, [None, block]), 1)
    mask = call(aten.expand.default, call(aten.unsqueeze.default, rows, -1), [-1, -1, -1, longest])
    states = call(OPS.mask_tile_states.default, mask)
    names = [argument.name for argument in attention.target._schema.arguments]  # type: ignore[union-attr]
    attention.update_arg(names.index("attn_mask"), mask)
    attention.update_arg(names.index("mask_tile_states"), states)
