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
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    row_times: Tensor | None = None,
    col_times: Tensor | None = None,
    time_boundaries: Tensor | None = None,
    time_symmetric: bool = False,
    max_seq_len: int,
    alpha: float,
    scaling_seq_len: float,
    **mask_family,
) -> Tensor:
    """Every intermediate is rounded to the dtype of q. Arguments as in `hstu_compile.ops.hstu_attention`."""
    rows = PaddedSequences(q, seq_offsets, seq_lengths, max_seq_len)
    q, k, v = (rows.pad(t) for t in (q, k, v))
    s = torch.einsum("bnhd,bmhd->bhnm", q, k) * alpha
    if position_bias is not None or time_bias is not None:
        relative = {"row_times": row_times, "col_times": col_times, "time_boundaries": time_boundaries}
        relative |= {"position_bias": position_bias, "time_bias": time_bias, "time_symmetric": time_symmetric}
        near = dense_bias(**relative, N=max_seq_len)
        attn_bias = near if attn_bias is None else attn_bias + near
    if attn_bias is not None:
        s = s + attn_bias.to(s.dtype)
    p = F.silu(s) / scaling_seq_len
    live = live_cells(rows.lengths, max_seq_len, **mask_family)[:, None]
    p = torch.where(live, p, 0)
    if attn_mask is not None:
        p = p * attn_mask.to(p.dtype)
    return rows.unpad(torch.einsum("bhnm,bmhd->bnhd", p, v))


def dense_bias(
    *,
    position_bias: Tensor | None,
    time_bias: Tensor | None,
    row_times: Tensor | None = None,
    col_times: Tensor | None = None,
    time_boundaries: Tensor | None = None,
    time_symmetric: bool = False,
    N: int,
) -> Tensor:
    """What a relative bias stands for, [B|1, H|1, N, N], by its definition: one comparison for every boundary."""
    total: Tensor | float = 0.0
    if position_bias is not None:
        position = torch.arange(N, device=position_bias.device)
        total = position_bias[None, :, N - 1 + position[:, None] - position]
    if time_bias is not None:
        apart = row_times[:, :, None] - col_times[:, None, :]
        apart = apart.abs() if time_symmetric else apart
        bucket = (time_boundaries <= apart[..., None]).sum(-1)
        total = total + time_bias[:, bucket].transpose(0, 1)
    assert isinstance(total, Tensor)
    return total
