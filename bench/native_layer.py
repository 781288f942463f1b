"""An HSTU stack in plain PyTorch, written the way people write it. Nothing in it knows about hstu_compile.

u, v, q, k = split(silu(norm(x) W_uvqk + b))
a          = (silu(q kT) / N * mask) v
out        = dropout(norm(a) * u) W_o + x
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HSTULayer(nn.Module):
    """One layer on a padded batch; positions beyond a sequence's length neither attend nor are attended to."""

    def __init__(self, embedding_dim: int, num_heads: int, head_dim: int, dropout_ratio: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout_ratio = num_heads, head_dim, dropout_ratio
        self.input_norm = nn.LayerNorm(embedding_dim, eps=1e-6)
        self.uvqk = nn.Linear(embedding_dim, 4 * num_heads * head_dim)
        self.attn_norm = nn.LayerNorm(num_heads * head_dim, eps=1e-6)
        self.output = nn.Linear(num_heads * head_dim, embedding_dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, E], mask [B, N, N] (True: the row attends to the column) -> [B, N, E]"""
        batch, seq_len, _ = x.shape
        heads = (batch, seq_len, self.num_heads, self.head_dim)
        u, v, q, k = F.silu(self.uvqk(self.input_norm(x))).chunk(4, dim=-1)
        scores = torch.einsum("bnhd,bmhd->bhnm", q.view(heads), k.view(heads))
        weights = F.silu(scores) / seq_len * mask[:, None]
        a = torch.einsum("bhnm,bmhd->bnhd", weights, v.view(heads)).reshape(batch, seq_len, -1)
        y = F.dropout(self.attn_norm(a) * u, self.dropout_ratio, self.training)
        return self.output(y) + x


class HSTUStack(nn.Module):
    def __init__(
        self, num_layers: int, embedding_dim: int, num_heads: int, head_dim: int, dropout_ratio: float = 0.2
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            HSTULayer(embedding_dim, num_heads, head_dim, dropout_ratio) for _ in range(num_layers)
        )

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x [B, N, E], lengths [B] (integers, at most N) -> [B, N, E]"""
        position = torch.arange(x.size(1), device=x.device)
        valid = position < lengths[:, None]
        mask = (position[:, None] >= position) & valid[:, :, None] & valid[:, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        return x
