"""HSTU attention as models spell it: padded einsums in the model's own dtype. The yardstick of the error budget."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import PaddedSequences, live_cells


def eager_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq_offsets: Tensor | None = None,
    seq_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    max_seq_len: int,
    alpha: float,
    scaling_seq_len: float,
    **mask_family,
) -> Tensor:
    """Every intermediate is rounded to the dtype of q. Arguments as in `hstu_compile.ops.hstu_attention`."""
    rows = PaddedSequences(q, seq_offsets, seq_lengths, max_seq_len)
    q, k, v = (rows.pad(t) for t in (q, k, v))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * alpha
    if attn_bias is not None:
        s = s + attn_bias.to(s.dtype)
    p = F.silu(s) / scaling_seq_len
    live = live_cells(rows.lengths, max_seq_len, **mask_family)[:, None]
    p = torch.where(live, p, 0)
    if attn_mask is not None:
        p = p * attn_mask.to(p.dtype)
    return rows.unpad(torch.einsum("bhnm,bmhd->bnhd", p, v))
