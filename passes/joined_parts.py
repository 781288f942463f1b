"""All parts of one tensor, cut along one dimension and joined along another, are that tensor in another layout.

    cat(x.chunk(h, -1), 0), stack(x.split(d, 2), 1), cat(x.unbind(0), -1)    ->    unflatten, movedim, clone, flatten

Heads are often split and joined so. As layout calls they are looked through like any view, by every pass.
"""

import itertools
import operator
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.graph import argument, aten, erase_dead, insert_call, is_call, same_shape, shape

_CUTS = {
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.tensor_split.sections,
}


def as_layout(graph: fx.Graph) -> None:
    """Rewrite such joins in place; the numbers and strides of what they give stay."""
    joins = (graph.find_nodes(op="call_function", target=target) for target in (aten.cat.default, aten.stack.default))
    for join in itertools.chain.from_iterable(joins):
        cut = _cut(join)
        if cut is None:
            continue
        x, count = cut.args[0], len(join.args[0])
        assert isinstance(x, fx.Node)
        unbound, stacked = is_call(cut, aten.unbind.int), is_call(join, aten.stack.default)
        begin = argument(cut, 1 if unbound else 2, "dim", 0) % len(shape(x))
        end = argument(join, 1, "dim", 0) % len(shape(join))

        def call(target: Any, *args: Any, join: fx.Node = join, **kwargs: Any) -> fx.Node:
            return insert_call(graph, join, target, args, kwargs, like=join)

        new = x if unbound else call(aten.unflatten.int, x, begin, [count, -1])
        new = call(aten.movedim.int, new, begin, end)
        new = call(aten.clone.default, new, memory_format=torch.contiguous_format)
        new = new if stacked else call(aten.flatten.using_ints, new, end, end + 1)
        join.replace_all_uses_with(new)
        erase_dead([join])


def _cut(join: fx.Node) -> fx.Node | None:
    """The call whose results, all of them, equal in size and in order, are what is joined."""
    parts: Any = join.args[0]
    if len(parts) < 2 or any(part.target is not operator.getitem for part in parts):
        return None
    cut = parts[0].args[0]
    whole = is_call(cut, *_CUTS, aten.unbind.int) and len(cut.meta["val"]) == len(parts)
    if not whole or [part.args for part in parts] != [(cut, i) for i in range(len(parts))]:
        return None
    return cut if all(same_shape(shape(part), shape(parts[0])) for part in parts) else None
