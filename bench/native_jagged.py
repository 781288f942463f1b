"""HSTU on jagged batches in plain PyTorch, as a served model is written. Nothing in it knows about hstu_compile.

The tokens of all sequences stand one after the other, those of a sequence as history and then its candidates. A
candidate attends to the history and to itself.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layout(NamedTuple):
    """Where the tokens are in a padded batch, and who attends to whom."""

    sequence: Tensor  # [T]
    within: Tensor  # [T]
    mask: Tensor  # [B, N, N]


def layout_of(offsets: Tensor, num_targets: Tensor, tokens: int, max_seq_len: int) -> Layout:
    row = torch.arange(tokens, device=offsets.device)
    sequence = torch.searchsorted(offsets, row, right=True) - 1
    within = row - offsets[sequence]
    place = torch.arange(max_seq_len, device=offsets.device)
    lengths = offsets.diff()
    history = (lengths - num_targets).view(-1, 1, 1)
    i, j = place[:, None], place[None, :]
    mask = (i >= j) & ((j < history) | (i == j)) & (i < lengths.view(-1, 1, 1))
    return Layout(sequence, within, mask)


class HSTULayer(nn.Module):
    def __init__(self, embedding_dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.input_norm = nn.LayerNorm(embedding_dim, eps=1e-6)
        self.uvqk = nn.Linear(embedding_dim, 4 * num_heads * head_dim)
        self.attn_norm = nn.LayerNorm(num_heads * head_dim, eps=1e-6)
        self.output = nn.Linear(num_heads * head_dim, embedding_dim, bias=False)

    def padded(self, t: Tensor, at: Layout) -> Tensor:
        """[T, H * D] -> [B, N, H, D]"""
        batch, seq_len, _ = at.mask.shape
        dense = t.new_zeros(batch, seq_len, self.num_heads, self.head_dim)
        dense[at.sequence, at.within] = t.view(-1, self.num_heads, self.head_dim)
        return dense

    def forward(self, x: Tensor, at: Layout, scaling_seq_len: int) -> Tensor:
        """x [T, E] -> [T, E]"""
        u, v, q, k = F.silu(self.uvqk(self.input_norm(x))).chunk(4, dim=-1)
        q, k, v = (self.padded(t, at) for t in (q, k, v))
        weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k)) / scaling_seq_len * at.mask[:, None]
        a = torch.einsum("bhnm,bmhd->bnhd", weights, v)[at.sequence, at.within].flatten(1)
        return self.output(self.attn_norm(a) * u) + x


class HSTUBlock(nn.Module):
    def __init__(
        self, num_layers: int, embedding_dim: int, num_heads: int, head_dim: int, scaling_seq_len: int
    ) -> None:
        super().__init__()
        self.scaling_seq_len = scaling_seq_len
        self.layers = nn.ModuleList(HSTULayer(embedding_dim, num_heads, head_dim) for _ in range(num_layers))

    def forward(self, x: Tensor, offsets: Tensor, num_targets: Tensor, max_seq_len: int) -> Tensor:
        """x [T, E], offsets [B + 1], num_targets [B], the longest sequence -> [T, E]"""
        at = layout_of(offsets, num_targets, x.shape[0], max_seq_len)
        for layer in self.layers:
            x = layer(x, at, self.scaling_seq_len)
        return x


class Ranker(nn.Module):
    """Item and position embeddings, the block, and a score a token."""

    def __init__(self, block: HSTUBlock, num_items: int, num_positions: int, embedding_dim: int) -> None:
        super().__init__()
        self.item, self.position = nn.Embedding(num_items, embedding_dim), nn.Embedding(num_positions, embedding_dim)
        self.block = block
        self.norm, self.head = nn.LayerNorm(embedding_dim), nn.Linear(embedding_dim, 1)

    def forward(self, items: Tensor, offsets: Tensor, num_targets: Tensor, max_seq_len: int) -> Tensor:
        """items [T] -> [T]"""
        row = torch.arange(items.shape[0], device=items.device)
        sequence = torch.searchsorted(offsets, row, right=True) - 1
        history = (offsets.diff() - num_targets)[sequence]
        position = torch.minimum(row - offsets[sequence], history)  # candidates all stand behind the history
        x = self.item(items) + self.position(position)
        return self.head(self.norm(self.block(x, offsets, num_targets, max_seq_len))).squeeze(-1)
