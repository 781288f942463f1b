"""The backward of `silu_attention` in plain PyTorch: the CPU implementation, and in float64 the oracle of its tests.

    dx = [du, dq, dk, dv, each in its columns] * silu'(x)        silu'(x) = sigmoid(x) (1 + x (1 - sigmoid(x)))

fp16 and bf16 are computed in float32 and rounded once, as the kernels do.
"""

import torch
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import compute_dtype, hstu_attention_backward_reference


def silu_attention_backward_reference(
    dout: Tensor,
    du: Tensor,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    u_at: int,
    q_at: int,
    k_at: int,
    v_at: int,
    seq_offsets: Tensor | None = None,
    **attention,
) -> Tensor:
    """dx, contiguous, in the shape and dtype of x. Arguments as in `hstu_compile.ops.silu_attention`."""
    dout, du, wide, q, k, v = (t.to(compute_dtype(x)) for t in (dout, du, x, q, k, v))
    dq, dk, dv, _ = hstu_attention_backward_reference(
        dout, q, k, v, seq_offsets=seq_offsets, needs_bias_grad=False, **attention
    )
    pieces = {u_at: du, q_at: dq.flatten(-2), k_at: dk.flatten(-2), v_at: dv.flatten(-2)}
    sigmoid = torch.sigmoid(wide)
    dx = torch.cat([pieces[at] for at in sorted(pieces)], dim=-1) * (sigmoid * (1 + wide * (1 - sigmoid)))
    if seq_offsets is not None:
        used = torch.arange(x.shape[0], device=x.device) < seq_offsets[-1]
        dx = torch.where(used[:, None], dx, torch.zeros((), dtype=dx.dtype, device=dx.device))
    return dx.to(x.dtype)
