"""HSTU attention: anchor on "product, pointwise chain with a silu, product", and grow from there.

    out = (silu(alpha * q kT + bias) / divisor * mask) v         ->         hstu_compile::hstu_attention

Nothing is assumed about how it is written: axes are followed through layouts (`axes`), the chain is read call by call
(`attention_scores`), q, k, v and the output are taken where they come from and go to (`attention_operands`), and the
rest gets its place in the op (`attention_weights`, `attention_mask`). What does not fit is left alone and reported.
"""

from typing import Any

import torch
from torch import fx

from hstu_compile.ops import kernel_table
from hstu_compile.passes.attention_drawbacks import drawback
from hstu_compile.passes.attention_mask import MaskMeaning
from hstu_compile.passes.attention_operands import JaggedLayout, Layout, find_region, find_unpadded
from hstu_compile.passes.attention_scores import (
    Misfit,
    find_chain,
    is_silu,
    nonlinearity,
    read_chain,
    refuse_other_users,
)
from hstu_compile.passes.attention_softmax import instead_of
from hstu_compile.passes.attention_weights import Weights, attn_bias, attn_mask, read_weights
from hstu_compile.passes.axes import LAYOUT, Axes, Axis, Dims
from hstu_compile.passes.graph import (
    aten,
    cast,
    erase_dead,
    insert_call,
    is_call,
    is_cast,
    is_parameter,
    look_through,
    number,
    reads_only_metadata,
    same,
    same_shape,
    shape,
    value,
)
from hstu_compile.passes.jagged import read_offsets_at_their_source
from hstu_compile.passes.mask_counts import counts, live_keys
from hstu_compile.passes.mask_tile_states import with_tile_states
from hstu_compile.passes.products import Labels, Product, as_product
from hstu_compile.passes.report import MISSED, Region, Report, source_line, spoken

NAME = "attention"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(gm: fx.GraphModule, report: Report) -> int:
    """Rewrite every HSTU attention of the graph in place; returns how many."""
    fused = 0
    gone: set[fx.Node] = set()
    read_offsets_at_their_source(gm.graph)
    for node in list(gm.graph.nodes):
        second = None if node in gone else as_product(node)
        if second is None:
            continue
        known = set(gm.graph.nodes)
        try:
            found = _find(second)
            if found is None:
                continue
            region, erased = _rewrite(*found)
            report.add(region)
            gone |= erased
            fused += 1
        except Misfit as misfit:
            report.add(Region(NAME, "silu(q @ k.T) @ v", source_line(misfit.node), misfit.reason, change=misfit.change))
            erase_dead(n for n in reversed(gm.graph.nodes) if n not in known)
    return fused


def _find(second: Product) -> tuple[Layout, Weights] | None:
    """The attention whose second product this is; None for other products. Raises Misfit for a near miss."""
    sides = [(second.left, second.left_labels), (second.right, second.right_labels)]
    for (weights, labels), (values, value_labels) in (sides, sides[::-1]):
        chain = find_chain(weights)
        if chain is None or second.addend is not None or None in labels:
            continue
        first = as_product(chain[-1])
        if first is None or any(_is_weight(node) for node in (first.left, first.right, values)):
            continue
        if nonlinearity(chain) is not None:
            try:
                return _read(second, chain, labels, values, value_labels)
            except Misfit as misfit:
                for product in (chain[-1], second.node):
                    product.meta[MISSED] = source_line(misfit.node)
                raise
    return None


def _is_weight(node: fx.Node) -> bool:
    """A parameter of the model: then it is a layer of an MLP, not attention."""
    return is_parameter(look_through(node, *LAYOUT))


def _read(second: Product, chain: list[fx.Node], labels: Labels, values: fx.Node, value_labels: Labels):
    if any(same(size, 0) for size in (*shape(second.node), *shape(second.left))):
        raise Misfit(second.node, "nothing is computed: there are no sequences, or none with tokens")
    axes = Axes()
    by_label: dict[str, Axis] = {}
    for operand, names in ((chain[0], labels), (values, value_labels)):
        for dim, (label, size) in enumerate(zip(names, shape(operand), strict=True)):
            if label and label not in by_label:
                by_label[label] = Axis(size, [(operand, dim)])
    dims = tuple((by_label[label],) for label in labels if label)
    strange = nonlinearity(chain)
    if strange is not None and not is_silu(strange):
        change = instead_of(strange, chain, dims, axes, by_label[second.contracted])
        raise Misfit(strange, f"{spoken(strange)}, not silu, turns scores into attention weights", change)
    scores = read_chain(chain, dims, axes)
    region = find_region(axes, second, labels, values, value_labels, scores, by_label)
    refuse_other_users(scores, second.node)
    if value(second.node).dtype not in DTYPES:
        raise Misfit(
            second.node,
            f"computed in {value(second.node).dtype}",
            "float32, bfloat16 or float16: model.float(), torch.autocast",
        )
    unpadded = find_unpadded(region)
    layout = Layout(region) if unpadded is None else JaggedLayout(region, unpadded)
    return layout, read_weights(layout)


def _rewrite(layout: Layout, weights: Weights) -> tuple[Region, set[fx.Node]]:
    region, before, graph = layout.region, layout.region.before, layout.region.before.graph
    scores = region.scores
    q = layout.operand(region.q, region.row, region.attn, weights.of_q)
    k = layout.operand(region.k, region.column, region.attn, weights.of_k)
    meaning = weights.meaning if isinstance(weights.meaning, MaskMeaning) else MaskMeaning(causal=False)
    v = layout.operand(region.v, region.column, region.hidden, weights.of_v + live_keys(layout, meaning))
    mask, bias, states = attn_mask(layout, weights.masks), attn_bias(layout, weights.biases), None
    if mask is not None:
        mask, states = with_tile_states(mask, before)
    alpha = scores.alpha * region.q.factor * region.k.factor
    args = (
        *(q, k, v),
        layout.seq_offsets,
        *counts(layout, meaning),
        *(mask, bias, states),
        layout.max_seq_len,
        float(alpha),
        weights.scaling_seq_len,
        meaning.causal,
        meaning.contextual_seq_len,
        meaning.target_group_size,
        meaning.max_attn_len,
        meaning.min_full_attn_seq_len,
        meaning.targets_share_position,
    )
    silu = scores.silu
    assert silu is not None
    out = insert_call(graph, before, torch.ops.hstu_compile.hstu_attention.default, args, like=silu)
    scaled = layout.scaled(out, region.row, weights.of_output)
    kernel = _kernel(q, v, mask, bias)
    slower, change = drawback(layout, weights, kernel)
    words = _words(layout, weights, meaning, alpha)
    reported = Region(NAME, words, source_line(silu), kernel=kernel, slower=slower, change=change)
    return reported, _replace(layout, scaled)


def _replace(layout: Layout, out: fx.Node) -> set[fx.Node]:
    """Let everybody read `out` instead of the region's result, and remove the region."""
    region, axes, before = layout.region, layout.axes, layout.region.before
    old, wanted = layout.result()
    new = axes.arrange(out, layout.output(), wanted, before)
    new = cast(new, value(old).dtype, before)
    if old is before:
        new = _with_strides_of(old, new)
    dead = [old, before, *region.scores.dims_of]
    for node, dims in region.scores.dims_of.items():
        dead += _detach_sizes(axes, node, axes.resolve(dims))
    old.replace_all_uses_with(new)
    return erase_dead(dead)


def _with_strides_of(old: fx.Node, new: fx.Node) -> fx.Node:
    """Views that read the dense result rely on its strides: make them reshapes. An output keeps its strides."""
    if same_shape(value(old).stride(), value(new).stride()):
        return new
    todo, escapes = [old], False
    while todo:
        for user in todo.pop().users:
            escapes |= user.op == "output"
            if is_call(user, aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default
            if is_call(user, *LAYOUT) or is_cast(user):
                todo.append(user)
    if not escapes:
        return new
    kwargs = {"memory_format": torch.contiguous_format}
    return insert_call(old.graph, old, aten.clone.default, (new,), kwargs, like=old)


def _detach_sizes(axes: Axes, node: fx.Node, dims: Dims) -> list[fx.Node]:
    """Uses that only want the shape of a node that disappears read it elsewhere; returns what is replaced."""
    replaced = []
    for user in [user for user in node.users if reads_only_metadata(user) and user.users]:
        new, constant = None, number(user)
        if is_call(user, aten.sym_size.int):
            new = axes.group_size(dims[user.args[1]], user)  # type: ignore[index]
        elif constant is not None:
            like: Any = [axes.group_size(group, user) for group in dims] if _is_like(user) else user.args[1]
            kwargs = {"dtype": value(user).dtype, "device": value(user).device}
            new = insert_call(user.graph, user, aten.full.default, (like, constant), kwargs, like=user)
        if isinstance(new, fx.Node):
            user.replace_all_uses_with(new)
            replaced.append(user)
    return replaced


def _is_like(user: fx.Node) -> bool:
    return is_call(user, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)


def _words(layout: Layout, weights: Weights, meaning: MaskMeaning, alpha: float) -> str:
    words = [meaning.words if meaning is weights.meaning else "mask tensor"]
    words += [layout.words, f"alpha {alpha:g}", f"divisor {weights.scaling_seq_len}"]
    words += ["bias"] * bool(weights.biases)
    for name, factors in (("q", weights.of_q), ("k", weights.of_k), ("v", weights.of_v), ("out", weights.of_output)):
        words += [f"{name} scaled by {', '.join(spoken(term.node) for term in factors)}"] * bool(factors)
    return "; ".join(words)


def _kernel(q: fx.Node, v: fx.Node, mask: fx.Node | None, bias: fx.Node | None) -> str | None:
    attn_dim, hidden_dim = shape(q)[-1], shape(v)[-1]
    if not isinstance(attn_dim, int) or not isinstance(hidden_dim, int):
        return None
    return kernel_table.describe(
        value(q).device,
        value(q).dtype,
        attn_dim,
        hidden_dim,
        has_mask=mask is not None,
        has_bias=bias is not None,
    )
