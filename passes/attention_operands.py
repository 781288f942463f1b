"""Where q, k and v come from, and in which layout the op gets them: jagged [T, H, D], or dense [B, N, H, D]."""

from dataclasses import dataclass

import torch
from torch import fx

from hstu_compile.passes.attention_scores import DIVIDE, MULTIPLY, Misfit, Scores, Term
from hstu_compile.passes.axes import LAYOUT, Axes, Axis, Dims, flat
from hstu_compile.passes.graph import (
    aten,
    cast,
    insert_call,
    is_call,
    is_cast,
    is_tensor,
    number,
    reads_only_metadata,
    same,
    shape,
    value,
)
from hstu_compile.passes.jagged import Padded, Unpadded
from hstu_compile.passes.jagged_indices import as_padded, as_unpadded
from hstu_compile.passes.products import Labels, Product


@dataclass(frozen=True)
class Operand:
    """factor * node, with the axes of the region."""

    node: fx.Node
    dims: Dims
    factor: float = 1.0


def trace(axes: Axes, node: fx.Node, dims: Dims, *, constants: bool = False) -> Operand:
    """The tensor behind layout calls, casts and, if asked for, constant factors."""
    factor = 1.0
    while True:
        constant = None
        if constants and is_call(node, *MULTIPLY, *DIVIDE):
            x, y = node.args[:2]
            x, y = (y, x) if number(x) is not None and is_call(node, *MULTIPLY) else (x, y)
            constant = number(y)
        if constant and isinstance(x, fx.Node):
            node, factor = x, factor * constant if is_call(node, *MULTIPLY) else factor / constant
        elif is_call(node, *LAYOUT) or is_cast(node):
            earlier = axes.before(node, dims)
            if earlier is None:
                return Operand(node, dims, factor)
            node, dims = node.all_input_nodes[0], earlier
            axes.locate(node, dims)
        else:
            return Operand(node, dims, factor)


@dataclass
class Region:
    """The two products, with every axis known by its role."""

    axes: Axes
    second: Product
    scores: Scores
    q: Operand
    k: Operand
    v: Operand
    out_dims: Dims
    row: Axis
    column: Axis
    attn: Axis  # feature of q and k
    hidden: Axis  # feature of v
    batch: Axis | None = None
    head: Axis | None = None
    pads: tuple[Padded, Padded, Padded] | None = None  # q, k, v, where all three were padded alike

    @property
    def before(self) -> fx.Node:
        """New nodes are inserted here."""
        return self.second.node

    def places(self, dims: Dims) -> Dims:
        """The Dims as they are now, without axes of one sequence or of one head."""
        tokens_and_features = self.axes.resolve(((self.row, self.column, self.attn, self.hidden),))[0]
        return tuple(
            tuple(axis for axis in group if axis in tokens_and_features or not same(axis.size, 1))
            for group in self.axes.resolve(dims)
        )


def find_region(
    axes: Axes,
    second: Product,
    weights: Labels,
    values: fx.Node,
    value_labels: Labels,
    scores: Scores,
    by_label: dict[str, Axis],
) -> Region:
    """Give q, k, v and every axis its role. `weights`: the labels of the attention weights in the second product."""
    first = scores.product
    score_axes = dict(zip(first.out_labels, axes.resolve(scores.dims), strict=True))
    column = by_label[second.contracted]
    attn = Axis(next(s for s, n in zip(shape(first.left), first.left_labels, strict=True) if n == first.contracted))
    score_axes[first.contracted] = (attn,)

    def dims_of(labels: Labels) -> Dims:
        return tuple(score_axes[label] if label else () for label in labels)

    sides = [(first.left, dims_of(first.left_labels)), (first.right, dims_of(first.right_labels))]
    if column in flat(sides[0][1]):
        sides.reverse()
    (query, query_dims), (key, key_dims) = sides
    value_dims = tuple((by_label[label],) if label else () for label in value_labels)
    if column in flat(query_dims) or column not in flat(key_dims):
        change = "scores = q @ k.mT, out = weights @ v (another model)"
        raise Misfit(first.node, "the columns of the scores are not the tokens of k", change)

    everywhere = [
        axis for group in axes.resolve(tuple((by_label[name],) for name in weights if name)) for axis in group
    ]
    value_axes = flat(axes.resolve(value_dims))
    rows = [a for a in everywhere if a not in flat(key_dims) and a not in value_axes]
    if len(rows) > 1:
        rows = [axis for axis in rows if same(axis.size, column.size)]
    hidden = [a for a in value_axes if a not in everywhere]
    if len(rows) != 1 or len(hidden) != 1:
        raise Misfit(second.node, "rows and features of the attention can't be told apart")
    for node, dims in ((query, query_dims), (key, key_dims), (values, value_dims)):
        axes.locate(node, dims)
    q = trace(axes, query, query_dims, constants=True)
    k = trace(axes, key, key_dims, constants=True)
    v = trace(axes, values, value_dims)
    if not same(rows[0].size, column.size):
        reason = f"fewer queries than keys, or more: {rows[0].size} and {column.size} (a cache, or cross attention)"
        raise Misfit(first.node, reason, "a sequence that attends to itself is what fits")
    out_dims = tuple((by_label[label],) for label in second.out_labels)
    region = Region(axes, second, scores, q, k, v, out_dims, rows[0], column, attn, hidden[0])
    _name_batch_and_head(region, [a for a in everywhere if a not in (rows[0], column)])
    return region


def _name_batch_and_head(region: Region, found: list[Axis]) -> None:
    axes, operands = region.axes, (region.q, region.k, region.v)
    rest = [axis for group in axes.resolve((tuple(found),)) for axis in group if not same(axis.size, 1)]
    pads = [as_padded(operand.node) for operand in operands]
    dims = [region.places(operand.dims) for operand in operands]
    if all(pads) and _padded_alike(pads, dims, region):  # type: ignore[arg-type]
        region.pads = tuple(pads)  # type: ignore[assignment]
        heads = [axis for axis in rest if axis not in dims[0][0]]
        batches = [axis for axis in rest if axis in dims[0][0]]
    else:
        # A head stands beside its features before they are split; else the batch comes first where q is made, be it of
        # one sequence, which is no axis.
        made = flat(dims[0])
        rest.sort(key=lambda axis: made.index(axis) if axis in made else len(made))
        row, features = axes.resolve(((region.row,), (region.attn, region.hidden)))
        groups = [group for operand in dims for group in operand if any(f in group for f in features)]
        heads = [axis for axis in rest if any(axis in group for group in groups)]
        if not heads:
            first = next((group for group in dims[0] if not set(group) & {*row, *features}), ())
            one_sequence = len(rest) == 1 and isinstance(rest[0].size, int) and not first
            heads = rest if one_sequence else rest[1:]
        batches = [axis for axis in rest if axis not in heads]
    if len(heads) > 1 or len(batches) > 1:
        change = "fold them: [B, H, N, D] (same numbers)"
        raise Misfit(region.scores.product.node, "more than one batch and one head dimension", change)
    region.batch, region.head = next(iter(batches), None), next(iter(heads), None)


def _padded_alike(pads: list[Padded], dims: list[Dims], region: Region) -> bool:
    """Whether q, k and v are the same sequences, padded so that cells outside them add nothing."""
    first = pads[0]
    return (
        all(pad.offsets is first.offsets and same(value(pad.max_seq_len), value(first.max_seq_len)) for pad in pads)
        and all(same(shape(pad.values)[0], shape(first.values)[0]) for pad in pads)
        and all(len(shape(pad.values)) == len(d) - 1 for pad, d in zip(pads, dims, strict=True))
        and pads[2].padding == 0
        and all(d[1] == (axis,) for d, axis in zip(dims, (region.row, region.column, region.column), strict=True))
        and len({d[0] for d in dims}) == 1
    )


def find_unpadded(region: Region) -> tuple[Unpadded, Dims] | None:
    """What makes the output jagged again, and the Dims of a token in it, if nothing else reads the padded output."""
    if region.pads is None:
        return None
    axes, node, dims, passed = region.axes, region.second.node, region.out_dims, {}
    while True:
        passed[node] = dims
        users = [user for user in node.users if not reads_only_metadata(user)]
        if len(users) != 1:
            return None
        (user,) = users
        batch = 1 if region.batch is None else region.batch.size
        unpadded = as_unpadded(user, node, batch, region.row.size)
        if unpadded is not None and unpadded.dense is node:
            break
        if not (is_call(user, *LAYOUT) or is_cast(user)):
            return None
        later = axes.after(user, dims)
        if later is None:
            return None
        node, dims = user, later
    dims = region.places(dims)
    pad = region.pads[0]
    tokens = shape(pad.values)[0]
    sequences = () if region.batch is None else (region.batch,)
    apart, folded = dims[:2] == (sequences, (region.row,)), dims[0] == (*sequences, region.row)
    fits = (
        (apart or folded)
        and unpadded.offsets is pad.offsets
        and same(shape(unpadded.result)[0], tokens)  # read from the offsets too, where the code meets both
    )
    if not fits:
        return None
    region.scores.dims_of.update(passed)
    return unpadded, dims[2:] if apart else dims[1:]


class Layout:
    """How the op sees the region's tensors: dense here, jagged in the subclass."""

    def __init__(self, region: Region):
        self.region, self.axes = region, region.axes
        self.batch = () if region.batch is None else (region.batch,)
        self.head = () if region.head is None else (region.head,)

    @property
    def max_seq_len(self) -> int | fx.Node:
        return self.axes.size(self.region.row, self.region.before)

    seq_offsets: fx.Node | None = None
    words = "dense"

    def tensor(self, operand: Operand, tokens: Axis, feature: Axis | None) -> fx.Node:
        """[B, N, H, D]; without a feature [B|1, N|1, H|1, 1]."""
        wanted = (self.batch, (tokens,), self.head, () if feature is None else (feature,))
        node = self.axes.arrange(operand.node, operand.dims, wanted, self.region.before)
        return node if feature is None else self.axes.expand(node, self._single(wanted), self.region.before)

    def _single(self, wanted: Dims) -> Dims:
        """Only axes that are still whole can be broadcast."""
        return tuple(group if len(group) == 1 else () for group in self.axes.resolve(wanted))

    def operand(self, operand: Operand, tokens: Axis, feature: Axis, factors: list[Term]) -> fx.Node:
        """q, k or v for the op: the right dtype, the last dimension contiguous, factors applied."""
        before, dtype = self.region.before, value(self.region.second.node).dtype
        node = cast(self.tensor(operand, tokens, feature), dtype, before)
        node = cast(self.scaled(node, tokens, factors), dtype, before)
        if not same(value(node).stride(-1), 1) and not same(shape(node)[-1], 1):
            kwargs = {"memory_format": torch.contiguous_format}
            node = insert_call(before.graph, before, aten.clone.default, (node,), kwargs, like=before)
        return node

    def scaled(self, node: fx.Node, tokens: Axis, factors: list[Term]) -> fx.Node:
        before = self.region.before
        for term in factors:
            other = term.node
            if is_tensor(other):
                if term.role == "drops":
                    other = insert_call(before.graph, before, aten.logical_not.default, (other,), like=before)
                other = self.tensor(Operand(other, term.dims), tokens, None)
            target = aten.div.Tensor if term.role == "divides" else aten.mul.Tensor
            node = insert_call(before.graph, before, target, (node, other), like=before)
        return node

    def output(self) -> Dims:
        """The Dims of the op's result."""
        return (self.batch, (self.region.row,), self.head, (self.region.hidden,))

    def result(self) -> tuple[fx.Node, Dims]:
        """The node that the op replaces, and its Dims."""
        return self.region.second.node, self.region.out_dims


class JaggedLayout(Layout):
    words = "jagged"

    def __init__(self, region: Region, found: tuple[Unpadded, Dims]):
        super().__init__(region)
        unpadded, self._features = found
        assert region.pads is not None
        self.pad, self.unpadded = region.pads[0], unpadded
        self.seq_offsets = self.pad.offsets
        self.tokens = Axis(shape(self.pad.values)[0], [(self.pad.values, 0)])

    @property
    def max_seq_len(self) -> int | fx.Node:
        return self.pad.max_seq_len

    def tensor(self, operand: Operand, tokens: Axis, feature: Axis | None) -> fx.Node:
        """[T, H, D]; without a feature [T, H|1, 1]."""
        axes, before = self.axes, self.region.before
        traced = trace(axes, operand.node, operand.dims)
        dims, known = self.region.places(traced.dims), {pad.node: pad for pad in self.region.pads or ()}
        pad = known.get(traced.node) or as_padded(traced.node)
        if pad is not None and pad.offsets is self.pad.offsets and dims[0] == self.batch and dims[1] == (tokens,):
            values, rest = pad.values, dims[2:]
        else:
            dense = axes.arrange(operand.node, operand.dims, (self.batch, (tokens,), self.head), before)
            dense = axes.expand(dense, (self.batch, (tokens,), ()), before)
            dense = cast(dense, value(self.region.second.node).dtype, before)
            values = self.unpadded.again(dense, axes.size(self.tokens, before), before)
            rest = (self.head if not same(shape(values)[1], 1) else (),)
        traced = trace(axes, values, ((self.tokens,), *rest))
        wanted = ((self.tokens,), self.head, () if feature is None else (feature,))
        node = axes.arrange(traced.node, traced.dims, wanted, before)
        return node if feature is None else axes.expand(node, self._single(wanted), before)

    def result(self) -> tuple[fx.Node, Dims]:
        return self.unpadded.result, ((self.tokens,), *self._features)

    def output(self) -> Dims:
        return ((self.tokens,), self.head, (self.region.hidden,))
