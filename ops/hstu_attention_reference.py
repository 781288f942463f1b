"""HSTU attention in plain PyTorch: the CPU implementation, and in float64 the oracle of every test.

    s = alpha * q kT + bias        p = silu(s) * mask / scaling_seq_len        out = p v

(Zhai et al., "Actions Speak Louder than Words", arXiv:2402.17152: pointwise attention without softmax.) Jagged inputs
are padded to [B, N, H, D] and the result is gathered back: clear, not fast. fp16 and bf16 are computed in float32 and
rounded once, as the kernels do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops.attention_mask import attention_mask


class PaddedSequences:
    """Moves between the layout of the caller (jagged or dense) and [B, N, H, D] with zeros in every unused row.

    Unused rows are selected away, never multiplied: they may hold NaN.
    """

    def __init__(self, q: Tensor, seq_offsets: Tensor | None, seq_lengths: Tensor | None, max_seq_len: int):
        column = torch.arange(max_seq_len, device=q.device)
        self.total = q.shape[0]
        self.source: Tensor | None = None
        if seq_offsets is not None:
            self.lengths = seq_offsets[1:] - seq_offsets[:-1]
            self.used = column < self.lengths[:, None]  # [B, N]
            self.source = torch.where(self.used, seq_offsets[:-1, None] + column, self.total)  # total: a row of zeros
        elif seq_lengths is not None:
            self.lengths = seq_lengths
            self.used = column < self.lengths[:, None]
        else:
            self.lengths = torch.full((q.shape[0],), max_seq_len, device=q.device)
            self.used = torch.ones(q.shape[0], max_seq_len, dtype=torch.bool, device=q.device)

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, D] or [B, N, H, D] -> [B, N, H, D]."""
        if self.source is not None:
            return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.source]
        return torch.where(self.used[..., None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))

    def unpad(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> the caller's layout; rows that belong to no sequence are 0."""
        x = torch.where(self.used[..., None, None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        if self.source is None:
            return x.contiguous()
        out = x.new_zeros(self.total, *x.shape[2:])
        return out.index_put((self.source[self.used],), x[self.used])


def hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq_offsets: Tensor | None = None,
    seq_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    max_seq_len: int,
    alpha: float = 1.0,
    scaling_seq_len: float = 1.0,
    **mask_family,
) -> Tensor:
    """Arguments as in `hstu_compile.ops.hstu_attention`; differentiable by autograd."""
    rows = PaddedSequences(q, seq_offsets, seq_lengths, max_seq_len)
    qp, kp, vp = (rows.pad(t).to(compute_dtype(q)) for t in (q, k, v))
    s, weight = scores_and_weight(rows, qp, kp, alpha, scaling_seq_len, attn_mask, attn_bias, mask_family)
    p = F.silu(s) * weight
    return rows.unpad(torch.einsum("bhnm,bmhd->bnhd", p, vp)).to(q.dtype)


def hstu_attention_backward_reference(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq_offsets: Tensor | None = None,
    seq_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    max_seq_len: int,
    alpha: float = 1.0,
    scaling_seq_len: float = 1.0,
    needs_bias_grad: bool,
    **mask_family,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and, if asked for, dbias (in the shape of attn_bias)."""
    rows = PaddedSequences(q, seq_offsets, seq_lengths, max_seq_len)
    qp, kp, vp, dop = (rows.pad(t).to(compute_dtype(q)) for t in (q, k, v, dout))
    s, weight = scores_and_weight(rows, qp, kp, alpha, scaling_seq_len, attn_mask, attn_bias, mask_family)
    sigmoid = torch.sigmoid(s)
    dv = torch.einsum("bhnm,bnhd->bmhd", s * sigmoid * weight, dop)
    dp = torch.einsum("bnhd,bmhd->bhnm", dop, vp)
    ds = dp * weight * sigmoid * (1 + s * (1 - sigmoid))  # silu'(s) = sigmoid(s) (1 + s (1 - sigmoid(s)))
    dq = torch.einsum("bhnm,bmhd->bnhd", ds, kp) * alpha
    dk = torch.einsum("bhnm,bnhd->bmhd", ds, qp) * alpha
    dbias = ds.sum_to_size(attn_bias.shape).to(attn_bias.dtype) if needs_bias_grad and attn_bias is not None else None
    return rows.unpad(dq).to(q.dtype), rows.unpad(dk).to(k.dtype), rows.unpad(dv).to(v.dtype), dbias


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scores_and_weight(
    rows: PaddedSequences,
    q: Tensor,
    k: Tensor,
    alpha: float,
    scaling_seq_len: float,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    mask_family: dict,
) -> tuple[Tensor, Tensor]:
    """alpha * q kT + bias (0 where dead) and mask / scaling_seq_len, both broadcastable to [B, H, N, N]."""
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    live = live_cells(rows.lengths, q.shape[1], **mask_family)[:, None]  # [B, 1, N, N]
    weight = live.to(q.dtype)
    if attn_mask is not None:
        weight = torch.where(live, attn_mask.to(q.dtype), zero)
        live = live & (attn_mask != 0)
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * alpha
    if attn_bias is not None:
        s = torch.where(live, s + attn_bias.to(q.dtype), zero)  # the bias of a dead cell may be NaN
    return s, weight / scaling_seq_len


def live_cells(
    lengths: Tensor,
    max_seq_len: int,
    *,
    num_targets: Tensor | None = None,
    num_contextuals: Tensor | None = None,
    contextual_seq_len: int = 0,
    causal: bool = True,
    target_group_size: int = 1,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    targets_share_position: bool = False,
) -> Tensor:
    """The mask family materialised: [B, N, N] bool."""
    position = torch.arange(max_seq_len, device=lengths.device)
    return attention_mask(
        position.view(1, -1, 1),
        position.view(1, 1, -1),
        lengths.view(-1, 1, 1),
        causal=causal,
        contextual=contextual_seq_len if num_contextuals is None else num_contextuals.view(-1, 1, 1),
        num_targets=0 if num_targets is None else num_targets.view(-1, 1, 1),
        target_group_size=target_group_size,
        max_attn_len=max_attn_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        targets_share_position=targets_share_position,
    )
