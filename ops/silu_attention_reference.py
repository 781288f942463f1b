"""The backward of `silu_attention` in plain PyTorch: the CPU implementation, and in float64 the oracle of its tests.

    dx = [du, dq, dk, dv, each in its columns; times silu'(x) where it is the gradient of silu(x)]

silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x))). fp16 and bf16 are computed in float32 and rounded once, as the kernels
do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import compute_dtype, hstu_attention_backward_reference

Into = tuple[Tensor, Tensor | None]  # where a gradient goes, and what its slice is the silu of


def silu_attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Sequence[Into],
    of_u: tuple[Tensor, Into] | None = None,
    *,
    needs_bias_grad: bool,
    seq_offsets: Tensor | None = None,
    seq_lengths: Tensor | None = None,
    **attention,
) -> Tensor | None:
    """Fill slices of dx; of_u: the gradient of u, and where it goes. Returns the gradient of the bias, if asked for."""
    dtype = compute_dtype(q)
    grads = hstu_attention_backward_reference(
        *(t.to(dtype) for t in (dout, q, k, v)),
        seq_offsets=seq_offsets,
        seq_lengths=seq_lengths,
        **attention,
        needs_bias_grad=needs_bias_grad,
    )
    unused = _unused(q, seq_offsets, seq_lengths)
    for grad, (dx, silu_of) in zip(grads[:3], into, strict=True):
        product = _times_silu_grad(grad, silu_of)
        dx.copy_(product if unused is None else product.masked_fill(unused[..., None, None], 0))
    if of_u is not None:
        du, (dx, silu_of) = of_u
        dx.copy_(_times_silu_grad(du.to(dtype), silu_of))
    return grads[3]


def _times_silu_grad(grad: Tensor, x: Tensor | None) -> Tensor:
    if x is None:
        return grad
    x = x.to(grad.dtype)
    sigmoid = torch.sigmoid(x)
    return grad * (sigmoid * (1 + x * (1 - sigmoid)))


def _unused(q: Tensor, seq_offsets: Tensor | None, seq_lengths: Tensor | None) -> Tensor | None:
    """Rows of no sequence: [T] or [B, N]; None where there are none."""
    rows = torch.arange(q.shape[-3], device=q.device)
    if seq_offsets is not None:
        return rows >= seq_offsets[-1]
    return None if seq_lengths is None else rows >= seq_lengths[:, None]
