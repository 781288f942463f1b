"""The spelling of Meta's STU: addmm for uvqk, silu on u only, fbgemm's jagged ops, the mask from clamped positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tests.fbgemm_stand_ins  # noqa: F401


def valid_mask(
    n: int, lengths: Tensor, num_targets: Tensor | None, window: int, contextual: int, min_full: int
) -> Tensor:
    """[B|1, N, N] bool. Targets all stand at the end of the history; contextual tokens all at its start."""
    ids = torch.arange(0, n, device=lengths.device).view(1, n)
    end = lengths.view(-1, 1, 1)
    if contextual > 0:
        ids = torch.clamp(ids - contextual + 1, min=0)
        end = end - contextual + 1
    if num_targets is not None:
        end = end - num_targets.view(-1, 1, 1)
        ids = torch.clamp(ids, max=end)
        rows, cols = ids.view(-1, n, 1).expand(-1, n, n), ids.view(-1, 1, n).expand(-1, n, n)
    else:
        rows = ids.view(n, 1).expand(n, n)
        cols = rows.t().view(1, n, n)
        rows = rows.view(1, n, n)
    distance = rows - cols
    mask = torch.eye(n, device=lengths.device, dtype=torch.bool).view(1, n, n)
    mask = torch.logical_or(mask, distance > 0)
    if window > 0:
        near = distance <= window
        if min_full > 0:
            near = torch.logical_or(near, rows >= end - min_full)
        mask = torch.logical_and(mask, near)
    if contextual > 0:
        mask = torch.logical_or(mask, torch.logical_and(rows == 0, cols < end))
    return mask


class MetaSTU(nn.Module):
    def __init__(
        self,
        embedding_dim: int = 16,
        num_heads: int = 2,
        hidden_dim: int = 8,
        attn_dim: int = 4,
        targets: bool = True,
        window: int = 0,
        contextual: int = 0,
        min_full: int = 0,
        group_norm: bool = False,
        dropout: float = 0.0,
        attn_dropout: float = 0.0,
        checkpointed: bool = False,
    ):
        """checkpointed: norm, projection, silu and split are computed again in the backward, and nothing else."""
        super().__init__()
        self.heads, self.hidden, self.attn = num_heads, hidden_dim, attn_dim
        self.targets, self.window, self.contextual, self.min_full = targets, window, contextual, min_full
        self.group_norm, self.dropout, self.attn_dropout = group_norm, dropout, attn_dropout
        self.checkpointed = checkpointed
        self.alpha = 1.0 / attn_dim**0.5
        width = 2 * num_heads * (hidden_dim + attn_dim)
        self.uvqk_weight = nn.Parameter(torch.randn(embedding_dim, width) / embedding_dim**0.5)
        self.uvqk_beta = nn.Parameter(torch.randn(width) * 0.1)
        self.norm_weight, self.norm_bias = (
            nn.Parameter(torch.ones(embedding_dim)),
            nn.Parameter(torch.zeros(embedding_dim)),
        )
        normed = num_heads if group_norm else num_heads * hidden_dim
        self.out_norm_weight, self.out_norm_bias = nn.Parameter(torch.ones(normed)), nn.Parameter(torch.zeros(normed))
        self.out_weight = nn.Parameter(torch.randn(3 * num_heads * hidden_dim, embedding_dim) / 10)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, n: int, num_targets: Tensor | None) -> Tensor:
        total, heads = q.shape[0], self.heads

        def pad(x: Tensor) -> Tensor:
            flat = x.reshape(total, heads * x.shape[2])
            dense = torch.ops.fbgemm.jagged_to_padded_dense(
                values=flat, offsets=[offsets], max_lengths=[n], padding_value=0.0
            )
            return dense.view(-1, n, heads, x.shape[2]).transpose(1, 2)

        scores = torch.einsum("bhxa,bhya->bhxy", pad(q), pad(k)) * self.alpha
        weights = F.silu(scores) / n
        lengths = offsets[1:] - offsets[:-1]
        mask = valid_mask(n, lengths, num_targets, self.window, self.contextual, self.min_full)
        weights = weights * mask.unsqueeze(1)
        if self.attn_dropout > 0.0:
            weights = F.dropout(weights, p=self.attn_dropout, training=self.training)
        dense = torch.einsum("bhxd,bhdv->bhxv", weights, pad(v))
        return torch.ops.fbgemm.dense_to_jagged(dense.transpose(1, 2).flatten(2, 3), [offsets], total)[0].view(
            total, heads, v.shape[2]
        )

    def forward(self, x: Tensor, offsets: Tensor, max_seq_len: int, num_targets: Tensor) -> Tensor:
        u, q, k, v = checkpoint(self.project, x, use_reentrant=False) if self.checkpointed else self.project(x)
        a = self.attend(q, k, v, offsets, max_seq_len, num_targets if self.targets else None)
        return self.output(a.view(-1, self.heads * self.hidden), u, x)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads, hidden, attn = self.heads, self.hidden, self.attn
        normed = F.layer_norm(x, (x.shape[-1],), self.norm_weight.to(x.dtype), self.norm_bias.to(x.dtype), 1e-6)
        uvqk = torch.addmm(self.uvqk_beta.to(x.dtype), normed, self.uvqk_weight.to(x.dtype))
        u, v, q, k = torch.split(uvqk, [hidden * heads, hidden * heads, attn * heads, attn * heads], dim=1)
        u = F.silu(u)
        return u, q.view(-1, heads, attn), k.view(-1, heads, attn), v.view(-1, heads, hidden)

    def output(self, a: Tensor, u: Tensor, x: Tensor) -> Tensor:
        heads, hidden, dtype = self.heads, self.hidden, x.dtype
        a, u = a.float(), u.float()
        weight, bias = self.out_norm_weight.float(), self.out_norm_bias.float()
        if self.group_norm:
            normed = F.group_norm(a.view(-1, heads, hidden), heads, weight, bias, 1e-6).view(-1, heads * hidden)
        else:
            normed = F.layer_norm(a, (a.shape[-1],), weight, bias, 1e-6)
        y = torch.cat([u, a, u * normed], dim=1)
        y = F.dropout(y, p=self.dropout, training=self.training).to(dtype)
        return torch.addmm(x, y, self.out_weight.to(dtype))
