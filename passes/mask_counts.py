"""The counts of a mask's meaning as arguments of the attention op."""

import torch
from torch import fx

from hstu_compile.passes.attention_operands import Layout
from hstu_compile.passes.attention_scores import Term
from hstu_compile.passes.evaluate import ancestors
from hstu_compile.passes.graph import aten, cast, insert_call, shape, value
from hstu_compile.passes.mask_meaning import MaskMeaning


def counts(layout: Layout, meaning: MaskMeaning) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None]:
    """seq_lengths, num_targets and num_contextuals: [B] each, or None."""
    before = layout.region.before
    lengths, targets = _flat(meaning.seq_lengths, before), _flat(meaning.num_targets, before)
    contextuals = _flat(meaning.num_contextuals, before)
    if lengths is None or meaning.padding == "dead":
        return lengths, targets, contextuals
    lengths = cast(lengths, torch.int64, before)
    # History may end anywhere in these codes, and before its begin: then there is none.
    history = lengths
    if targets is not None:
        history = insert_call(before.graph, before, aten.sub.Tensor, (lengths, targets), like=before)
    after = insert_call(before.graph, before, aten.rsub.Scalar, (history, layout.max_seq_len), like=before)
    after = insert_call(before.graph, before, aten.clamp.default, (after, 0, layout.max_seq_len), like=before)
    return None, after, contextuals


def live_keys(layout: Layout, meaning: MaskMeaning) -> list[Term]:
    """What v is multiplied by where padded keys are dead, but padded queries are not."""
    region, before = layout.region, layout.region.before
    lengths = _flat(meaning.seq_lengths, before)
    if lengths is None or meaning.padding != "dead keys":
        return []
    kwargs = {"dtype": torch.int64, "device": value(lengths).device}
    place = insert_call(before.graph, before, aten.arange.default, (layout.max_seq_len,), kwargs, like=before)
    ends = insert_call(before.graph, before, aten.unsqueeze.default, (lengths, 1), like=before)
    live = insert_call(before.graph, before, aten.lt.Tensor, (place, ends), like=before)
    if line := _mask_of(layout, meaning).meta.get("stack_trace"):
        live.meta["stack_trace"] = line  # of the mask: the one to speak of
    return [Term(live, (layout.batch, (region.column,)), "keeps")]


def _mask_of(layout: Layout, meaning: MaskMeaning) -> fx.Node:
    """The mask that is made of the lengths."""
    scores = layout.region.scores
    masks = [term.node for term in (*scores.masks, *scores.weights) if term.role != "divides"]
    masks += [bias.node for bias in scores.biases]
    return next((mask for mask in masks if meaning.seq_lengths in ancestors([mask])), layout.region.before)


def _flat(count: fx.Node | None, before: fx.Node) -> fx.Node | None:
    if count is None or len(shape(count)) == 1:
        return count
    return insert_call(before.graph, before, aten.reshape.default, (count, [-1]), like=before)
