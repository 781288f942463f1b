"""In which columns of a row of x a view of it, or of its silu, has its numbers."""

import itertools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from hstu_compile.ops.packed_slices import Slice
from hstu_compile.passes.graph import Size, aten, is_call, is_tensor, same_shape, shape, share_storage, value
from hstu_compile.passes.report import Misfit, spoken
from hstu_compile.passes.uvqk import MOVES, SLICES, SPLITS


@dataclass(frozen=True)
class Columns:
    """From `at` on, sizes and steps of dimensions of which none can be joined with the next."""

    at: int
    dims: tuple[tuple[int, int], ...]

    @property
    def whole(self) -> bool:
        """Whether they stand side by side."""
        return len(self.dims) <= 1 and all(step == 1 for _, step in self.dims)

    def each(self) -> list[int]:
        steps = [range(0, size * step, step) if step else [0] * size for size, step in self.dims]
        return [self.at + sum(where) for where in itertools.product(*steps)]

    def as_heads(self, heads: int, dim: int, activated: bool) -> Slice | None:
        """As of [heads, dim]; None where a head's columns do not stand side by side."""
        if self.whole and math.prod(size for size, _ in self.dims) == heads * dim:
            return Slice(self.at, dim, activated)
        if [size for size, _ in self.dims] == [heads, dim] and self.dims[1][1] == 1:
            return Slice(self.at, self.dims[0][1], activated)
        return None


def is_view(node: fx.Node) -> bool:
    """A view of its first argument, or the list of views that a split gives."""
    if is_call(node, *SPLITS):
        return True
    if is_call(node, operator.getitem):
        return is_call(node.args[0], *SPLITS)
    return is_call(node, *MOVES, *SLICES) and is_tensor(node.args[0]) and share_storage(node, node.args[0])  # type: ignore[arg-type]


def behind(node: fx.Node) -> Iterator[fx.Node]:
    """The node, what that is a view or the silu of, and so on; through one silu at most."""
    activated = False
    while True:
        yield node
        if not (is_view(node) or (is_call(node, aten.silu.default) and not activated)):
            return
        activated = activated or is_call(node, aten.silu.default)
        node = node.args[0]  # type: ignore[assignment]


def columns_of(node: fx.Node, x: fx.Node) -> tuple[Columns, fx.Node | None]:
    """Of a node that `behind` leads from to x; and the silu in between, if there is one."""
    lead = shape(x)[:-1]
    silu = silu_between(node, x)
    if silu is None:
        return _of_view(node, x, lead), None
    (source,) = silu.all_input_nodes
    inner, outer = _of_view(node, silu, lead), _of_view(source, x, lead)
    everything = _of_view(silu, silu, lead)
    if everything.whole and outer.whole:
        return Columns(outer.at + inner.at, inner.dims), silu
    if everything.whole and inner == everything:
        return outer, silu
    raise _misfit(node)


def between(node: fx.Node, x: fx.Node) -> Iterator[fx.Node]:
    """The node and what is behind it, up to x."""
    return itertools.takewhile(lambda n: n is not x, behind(node))


def silu_between(node: fx.Node, x: fx.Node) -> fx.Node | None:
    return next((n for n in between(node, x) if is_call(n, aten.silu.default)), None)


def _of_view(node: fx.Node, base: fx.Node, lead: tuple[Size, ...]) -> Columns:
    t, count = value(node), len(lead)
    at = t.storage_offset() - value(base).storage_offset()
    sizes, steps = t.shape[count:], t.stride()[count:]
    fits = (
        all(isinstance(number, int) for number in (at, *sizes, *steps))
        and same_shape(shape(node)[:count], lead)
        and same_shape(t.stride()[:count], value(base).stride()[:count])
    )
    if not fits:
        raise _misfit(node)
    dims: list[tuple[int, int]] = []
    for size, step in zip(sizes, steps, strict=True):
        if dims and dims[-1][1] == size * step:
            dims[-1] = dims[-1][0] * size, step
        elif size != 1:
            dims.append((size, step))
    return Columns(at, tuple(dims))


def _misfit(node: fx.Node) -> Misfit:
    sizes = ", ".join(map(str, shape(node)))
    change = "split the projection along its last dimension, or that of each head, into u, v, q, k"
    return Misfit(f"the columns of {spoken(node)} of shape [{sizes}] are not those of heads evenly apart", change)


def as_heads(node: fx.Node, columns: Columns, heads: int, dim: int, activated: bool) -> Slice:
    """Raises:
    Misfit: these are not the columns of so many heads.
    """
    found = columns.as_heads(heads, dim, activated)
    if found is None:
        raise _misfit(node)
    return found
