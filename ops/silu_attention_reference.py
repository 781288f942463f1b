"""The backward of `silu_attention` in plain PyTorch: the CPU implementation, and in float64 the oracle of its tests.

    dx = [du, dq, dk, dv, each in its columns] * silu'(x)        silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))

fp16 and bf16 are computed in float32 and rounded once, as the kernels do.
"""

import torch
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import compute_dtype, hstu_attention_backward_reference


def silu_attention_backward_reference(
    dout: Tensor,
    du: Tensor | None,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dx: Tensor,
    *,
    u_at: int,
    q_at: int,
    k_at: int,
    v_at: int,
    seq_offsets: Tensor | None = None,
    seq_lengths: Tensor | None = None,
    **attention,
) -> None:
    """Fill dx, like x; du: None leaves the columns of u. Arguments as in `hstu_compile.ops.silu_attention`."""
    dout, wide, q, k, v = (t.to(compute_dtype(x)) for t in (dout, x, q, k, v))
    grads = hstu_attention_backward_reference(
        dout, q, k, v, seq_offsets=seq_offsets, seq_lengths=seq_lengths, **attention, needs_bias_grad=False
    )
    unused = _unused(x, seq_offsets, seq_lengths)
    given = {} if du is None else {u_at: du.to(wide.dtype)}
    given |= zip((q_at, k_at, v_at), (grad.flatten(-2) for grad in grads[:3]), strict=True)
    for at, grad in given.items():
        piece = wide[..., at : at + grad.shape[-1]]
        sigmoid = torch.sigmoid(piece)
        product = grad * (sigmoid * (1 + piece * (1 - sigmoid)))
        if unused is not None and at != u_at:
            product = product.masked_fill(unused[..., None], 0)
        dx[..., at : at + grad.shape[-1]] = product


def _unused(x: Tensor, seq_offsets: Tensor | None, seq_lengths: Tensor | None) -> Tensor | None:
    """Rows of no sequence: [T] or [B, N]; None where there are none."""
    rows = torch.arange(x.shape[-2], device=x.device)
    if seq_offsets is not None:
        return rows >= seq_offsets[-1]
    return None if seq_lengths is None else rows >= seq_lengths[:, None]
