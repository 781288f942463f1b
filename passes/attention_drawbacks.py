"""What keeps an attention that is fused from being as fast as others, and what to write instead."""

from torch import fx

from hstu_compile.ops import kernel_table
from hstu_compile.passes.attention_mask import Opaque
from hstu_compile.passes.attention_operands import Layout
from hstu_compile.passes.attention_weights import Weights
from hstu_compile.passes.graph import aten, is_call, value
from hstu_compile.passes.report import spoken


def drawback(layout: Layout, weights: Weights, kernel: str | None) -> tuple[str | None, str | None]:
    """The most costly one and its remedy; None twice where there is none."""
    region = layout.region
    if kernel and kernel.startswith(kernel_table.REFERENCE) and value(region.before).device.type == "cuda":
        return "no kernel takes this call", "what the kernels below ask for"
    if isinstance(weights.meaning, Opaque):
        reason, change = weights.meaning.reason, weights.meaning.change
        if all(term.node.op == "placeholder" for term in weights.masks):
            reason = f"it comes ready-made, as {', '.join(spoken(term.node) for term in weights.masks)}"
            change = "build it in the graph of the attention, from positions and lengths"
        return f"the mask is read as a tensor: {reason}", change
    if layout.seq_offsets is None and all(_is_padded(operand.node) for operand in (region.q, region.k, region.v)):
        return (
            "sequences are padded by index_put, which is not known as padding: padded tokens are computed too",
            "torch.ops.fbgemm.jagged_to_padded_dense before the attention, dense_to_jagged after it",
        )
    return None, None


def _is_padded(node: fx.Node) -> bool:
    return is_call(node, aten.index_put.default)
