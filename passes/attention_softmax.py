"""What to write where softmax, or another nonlinearity than silu, makes the attention weights."""

from math import inf

from torch import fx

from hstu_compile.passes.attention_mask import silu_of_fill_is_zero
from hstu_compile.passes.attention_scores import addition, scaling, selection
from hstu_compile.passes.axes import LAYOUT, Axes, Axis, Dims
from hstu_compile.passes.graph import argument, aten, is_call, is_cast, number, value
from hstu_compile.passes.products import as_product

SOFTMAX = {aten.softmax.int, aten._softmax.default}
HSTU = "weights = F.silu(scores) / c * mask, c a constant, say the longest length (another model)"


def instead_of(strange: fx.Node, chain: list[fx.Node], dims: Dims, axes: Axes, keys: Axis) -> str:
    """The change for a chain from weights, which hold `dims`, to scores, in which this nonlinearity stands."""
    if not is_call(strange, *SOFTMAX):
        return f"{HSTU}; other activations are left to Inductor"
    at = chain.index(strange)
    dropout_p, scores = _dropout(chain[:at]), _arguments(chain[at + 1 :])
    if dropout_p is None or scores is None or not _is_over(strange, chain[:at], dims, axes, keys):
        return HSTU
    scale, fill, added = scores
    mask = "what is added to the scores" * added
    rows = ""
    if fill is not None:
        mask = f"{mask or '0'} where kept, {fill:g} elsewhere, in q's dtype"
        rows = " in rows that keep a key"
    call = f"q, k, v{', attn_mask' * bool(mask)}, scale={scale!r}{f', dropout_p={dropout_p:g}' if dropout_p else ''}"
    return (
        f"replace q @ k.T, softmax and weights @ v by F.scaled_dot_product_attention({call}), with q, k, v [B, H, N, D]"
        f"{f' and attn_mask {mask}' if mask else ''} (same numbers{rows}{', in eval' if dropout_p else ''}); "
        f"or {HSTU}"
    )


def _dropout(chain: list[fx.Node]) -> float | None:
    """The share that is dropped of the weights; None where something else is done to them."""
    found = [node for node in chain if not (is_call(node, *LAYOUT) or is_cast(node))]
    if not all(is_call(node, aten.dropout.default) for node in found) or len(found) > 1:
        return None
    return next((number(argument(node, 1, "p")) for node in found if argument(node, 2, "train")), 0.0)


def _arguments(chain: list[fx.Node]) -> tuple[float, float | None, bool] | None:
    """What happens to the scores before softmax: scale, fill, whether something is added; None for anything else."""
    scale, fill, added = 1.0, None, False
    for node, main in zip(chain[:-1], chain[1:], strict=True):
        selected, scaled, more = selection(node, main), scaling(node, main), addition(node, main)
        constant = None if scaled is None else number(scaled[0])
        if selected is not None and selected[1] is not None and fill is None:
            fill = selected[1] * scale
        elif scaled is not None and constant:
            scale = scale * constant if scaled[1] == "multiplies" else scale / constant
        elif more is not None and (scale, more[1], added) == (1, 1, False):
            added = True
        elif not (is_call(node, *LAYOUT) or is_cast(node)):
            return None
    product = as_product(chain[-1])
    assert product is not None
    hidden = fill is None or fill == -inf or silu_of_fill_is_zero(fill, value(product.node).dtype)
    return (scale * product.alpha, fill, added) if hidden and product.addend is None else None


def _is_over(softmax: fx.Node, chain: list[fx.Node], dims: Dims, axes: Axes, keys: Axis) -> bool:
    """Whether it runs over the keys."""
    for node in chain:
        earlier = axes.before(node, dims) if is_call(node, *LAYOUT) else dims
        if earlier is None:
            return False
        dims = earlier
    over, wanted = axes.resolve((dims[argument(softmax, 1, "dim")], (keys,)))
    return over == wanted
