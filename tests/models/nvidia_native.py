"""NVIDIA's native layer: u v q k interleaved per head, contextual lengths as a tensor, target groups."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.fbgemm_stand_ins  # noqa: F401


def valid_mask(
    n: int, lengths: Tensor, num_targets: Tensor, num_contextuals: Tensor, group: int, window: int
) -> Tensor:
    """[B, N, N] bool. Targets stand at their own positions and see their own group only."""
    end = lengths.view(-1, 1, 1) - num_contextuals.view(-1, 1, 1) + 1
    ids = torch.arange(0, n, device=lengths.device).view(1, n) - num_contextuals.view(-1, 1) + 1
    rows = torch.clamp(ids, min=0).unsqueeze(-1).expand(-1, n, n)
    cols = rows.transpose(1, 2)
    distance = rows - cols
    mask = torch.logical_or(torch.eye(n, device=lengths.device, dtype=torch.bool).view(1, n, n), distance > 0)
    row_group = torch.clamp(rows - end + num_targets.view(-1, 1, 1), min=-1) // group
    col_group = row_group.transpose(1, 2)
    same = torch.logical_or(row_group - col_group == 0, (row_group < 0) + (col_group < 0))
    mask = torch.logical_and(mask, same)
    end = end - num_targets.view(-1, 1, 1)
    if window > 0:
        mask = torch.logical_and(mask, distance <= window)
    return torch.logical_or(mask, torch.logical_and(rows == 0, cols < end))


class NvidiaNative(nn.Module):
    def __init__(self, hidden_size: int = 16, num_heads: int = 2, head_dim: int = 8, group: int = 2, window: int = 0):
        super().__init__()
        self.heads, self.dim, self.group, self.window = num_heads, head_dim, group, window
        self.alpha = 1.0 / head_dim**0.5
        self.input_norm = nn.LayerNorm(hidden_size, eps=1e-5)
        self.linear_uvqk = nn.Linear(hidden_size, 4 * num_heads * head_dim)
        self.norm_weight = nn.Parameter(torch.ones(num_heads * head_dim))
        self.norm_bias = nn.Parameter(torch.zeros(num_heads * head_dim))
        self.linear_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        max_seqlen: int,
        scaling_seqlen: int,
        num_targets: Tensor,
        num_contextuals: Tensor,
    ) -> Tensor:
        heads, dim = self.heads, self.dim
        mixed = F.silu(self.linear_uvqk(self.input_norm(x))).view(-1, heads, 4 * dim)
        u, v, q, k = torch.split(mixed, [dim] * 4, dim=-1)
        total = q.shape[0]

        def pad(t: Tensor) -> Tensor:
            dense = torch.ops.fbgemm.jagged_to_padded_dense(t.reshape(total, heads * dim), [offsets], [max_seqlen], 0.0)
            return dense.view(-1, max_seqlen, heads, dim).transpose(1, 2)

        scores = torch.einsum("bhxa,bhya->bhxy", pad(q), pad(k)) * self.alpha
        weights = F.silu(scores) / scaling_seqlen
        mask = valid_mask(max_seqlen, offsets[1:] - offsets[:-1], num_targets, num_contextuals, self.group, self.window)
        weights = weights * mask.unsqueeze(1)
        dense = torch.einsum("bhxd,bhdv->bhxv", weights, pad(v))
        a = torch.ops.fbgemm.dense_to_jagged(dense.transpose(1, 2).flatten(2, 3), [offsets], total)[0]
        normed = F.layer_norm(a, (heads * dim,), self.norm_weight, self.norm_bias, 1e-5)
        return self.linear_proj(normed * u.reshape(total, heads * dim)) + x
