"""Calls that read some rows of a value: by an index or a mask, as a slice, one by one, as a part of a split.

Which rows these are is what the same call gives of a tensor of row numbers.
"""

import operator
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hstu_compile.passes.graph import aten, is_tensor, same, same_shape, shape, value
from hstu_compile.passes.index_space import arguments, op_name
from hstu_compile.passes.row_wise import PARTS

Call = Callable[[fx.Node, Any, Any, Any], fx.Node]  # of the call that it is like, target, arguments, keyword arguments

_INDICES = (torch.int64, torch.int32, torch.bool)
_ALONG = {"index_select", "gather", "slice", "narrow", "select", *PARTS}


@dataclass(frozen=True)
class RowRead:
    """A call that reads rows."""

    node: fx.Node  # its result, [*numbers of the rows read, *trailing dimensions of the source]
    call: fx.Node  # the call itself: the split, of one part of it
    source: fx.Node
    dims: int  # how many leading dimensions of the source number its rows

    @property
    def others(self) -> list[fx.Node]:
        """What it reads besides the source."""
        return [n for n in self.call.all_input_nodes if n is not self.source]

    @property
    def which(self) -> str:
        """The same for calls that read the same rows."""
        part = self.node.args[1] if self.node is not self.call else ""
        return f"{self.call.target} {self.call.args[1:]} {self.call.kwargs} {part}"

    def of(self, x: fx.Node, call: Call) -> fx.Node | None:
        """The same of another value that has these rows; None where the call can't be made of it."""
        args, rank = list(self.call.args[1:]), len(shape(x))
        if op_name(self.call) == "gather":
            if rank > self.dims:
                return None
            for _ in shape(args[1])[rank:]:  # type: ignore[arg-type]
                args[1] = call(self.call, aten.select.int, (args[1], -1, 0), None)
        made = call(self.call, self.call.target, (x, *args), dict(self.call.kwargs))
        return made if self.node is self.call else call(self.node, operator.getitem, (made, self.node.args[1]), None)


def row_read(node: fx.Node) -> RowRead | None:
    """The call as one that reads rows of its first argument; None if it is none, or reads the whole."""
    call = node.args[0] if node.target is operator.getitem else node
    if not isinstance(call, fx.Node) or not isinstance(call.target, torch._ops.OpOverload) or not is_tensor(node):
        return None
    name, named, source = op_name(call), arguments(call), call.args[0] if call.args else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or (call is not node) != (name in PARTS):
        return None
    dims = _dims(name, named, shape(source))
    if dims is None or same_shape(shape(node), shape(source)) or (name == "slice" and _is_all(named)):
        return None
    return RowRead(node, call, source, dims)


def _is_all(named: dict[str, Any]) -> bool:
    """x[:], whose size may be too complicated to be known as that of x."""
    return (named["start"] or 0, named["step"]) == (0, 1) and named["end"] in (None, sys.maxsize)


def _dims(name: str, named: dict[str, Any], sizes: tuple) -> int | None:
    rank = len(sizes)
    if name == "index":
        indices = named["indices"]
        if any(i is not None and value(i).dtype not in _INDICES for i in indices):
            return None
        return sum(len(shape(i)) if i is not None and value(i).dtype == torch.bool else 1 for i in indices)
    if name not in _ALONG:
        return None
    dims = named["dim"] % max(rank, 1) + 1
    if name != "gather":
        return dims if dims < rank or rank == 1 else None  # the last dimension is that of features
    index = value(named["index"])
    whole_rows = same_shape(index.shape[dims:], sizes[dims:]) and all(same(step, 0) for step in index.stride()[dims:])
    return dims if whole_rows else None
