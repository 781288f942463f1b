"""The spelling of the research HSTU: mm and silu on all of uvqk, a bias from position and time tables, a mask buffer.

It returns its padded q and k, and `dense_to_jagged` without a total length breaks Dynamo's graph.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.fbgemm_stand_ins  # noqa: F401


class BucketedBias(nn.Module):
    """[B, N, N]: a table by i - j plus a table by the logarithm of the time between."""

    def __init__(self, max_seq_len: int, num_buckets: int):
        super().__init__()
        self.n, self.buckets = max_seq_len, num_buckets
        self.time_table = nn.Parameter(torch.randn(num_buckets + 1) * 0.3)
        self.position_table = nn.Parameter(torch.randn(2 * max_seq_len - 1) * 0.3)

    def forward(self, timestamps: Tensor) -> Tensor:
        batch, n = timestamps.size(0), self.n
        t = F.pad(self.position_table[: 2 * n - 1], [0, n]).repeat(n)
        t = t[..., :-n].reshape(1, n, 3 * n - 2)
        r = (2 * n - 1) // 2
        later = torch.cat([timestamps, timestamps[:, n - 1 : n]], dim=1)
        gaps = later[:, 1:].unsqueeze(2) - later[:, :-1].unsqueeze(1)
        bucket = (torch.log(torch.abs(gaps).clamp(min=1)) / 0.301).long()
        bucket = torch.clamp(bucket, min=0, max=self.buckets).detach()
        by_time = torch.index_select(self.time_table, dim=0, index=bucket.view(-1)).view(batch, n, n)
        return t[:, :, r:-r] + by_time


class ResearchHSTU(nn.Module):
    def __init__(
        self,
        embedding_dim: int = 16,
        num_heads: int = 2,
        attn_dim: int = 4,
        linear_dim: int = 8,
        max_seq_len: int = 12,
        break_graph: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.attn, self.linear = num_heads, attn_dim, linear_dim
        self.break_graph, self.dropout = break_graph, dropout
        self.width = embedding_dim
        self.uvqk = nn.Parameter(torch.randn(embedding_dim, 2 * num_heads * (attn_dim + linear_dim)) / 4)
        self.o = nn.Linear(num_heads * linear_dim, embedding_dim)
        self.bias = BucketedBias(max_seq_len, 8)
        triangle = torch.triu(torch.ones(max_seq_len, max_seq_len, dtype=torch.bool), diagonal=1)
        self.register_buffer("invalid_attn_mask", 1.0 - triangle.float())

    def forward(self, x: Tensor, offsets: Tensor, timestamps: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        heads, attn, linear, mask = self.heads, self.attn, self.linear, self.invalid_attn_mask
        n = mask.size(-1)
        normed = F.layer_norm(x, [self.width], eps=1e-6)
        uvqk = F.silu(torch.mm(normed, self.uvqk))
        u, v, q, k = torch.split(uvqk, [linear * heads, linear * heads, attn * heads, attn * heads], dim=1)
        batch = offsets.size(0) - 1
        padded_q = torch.ops.fbgemm.jagged_to_padded_dense(
            values=q, offsets=[offsets], max_lengths=[n], padding_value=0.0
        )
        padded_k = torch.ops.fbgemm.jagged_to_padded_dense(
            values=k, offsets=[offsets], max_lengths=[n], padding_value=0.0
        )
        scores = torch.einsum(
            "bnhd,bmhd->bhnm", padded_q.view(batch, n, heads, attn), padded_k.view(batch, n, heads, attn)
        )
        scores = scores + self.bias(timestamps).unsqueeze(1)
        weights = F.silu(scores) / n
        weights = weights * mask.unsqueeze(0).unsqueeze(0)
        padded_v = torch.ops.fbgemm.jagged_to_padded_dense(v, [offsets], [n]).reshape(batch, n, heads, linear)
        dense = torch.einsum("bhnm,bmhd->bnhd", weights, padded_v).reshape(batch, n, heads * linear)
        total = () if self.break_graph else (x.shape[0],)
        a = torch.ops.fbgemm.dense_to_jagged(dense, [offsets], *total)[0]
        gated = u * F.layer_norm(a, [linear * heads], eps=1e-6)
        y = self.o(F.dropout(gated, p=self.dropout, training=self.training)) + x
        return y, (v.contiguous(), padded_q, padded_k)
