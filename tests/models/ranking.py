"""Whole ranking models: embeddings, HSTU layers, a head. History and candidates come as one jagged batch of ids."""

import torch
from torch import Tensor, nn

from tests.models.meta_stu import MetaSTU

ITEMS, WIDTH, MAX_POSITIONS = 50, 16, 64


class Ranking(nn.Module):
    """Scores of all tokens, or of so many candidates of each user (of its last token, where it has fewer)."""

    def __init__(self, layers: int = 3, times: bool = False, candidates: int = 0):
        super().__init__()
        self.candidates = candidates
        self.items, self.positions = nn.Embedding(ITEMS, WIDTH), nn.Embedding(MAX_POSITIONS, WIDTH)
        self.layers = nn.ModuleList(self.layer() for _ in range(layers))
        self.times = nn.Linear(8, WIDTH) if times else None
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)
        self.register_buffer("frequencies", 2.0 ** -torch.arange(4))
        self.dropout = nn.Dropout(0.2)

    def layer(self) -> nn.Module:
        return MetaSTU(WIDTH, num_heads=2, hidden_dim=16, attn_dim=16, dropout=0.1)

    def position(self, row: Tensor, sequence: Tensor, offsets: Tensor, num_targets: Tensor) -> Tensor:
        """Candidates all stand behind the history."""
        history = offsets[1:] - offsets[:-1] - num_targets
        return torch.minimum(row - offsets[sequence], history[sequence])

    def embed(self, ids: Tensor, offsets: Tensor, num_targets: Tensor, timestamps: Tensor | None) -> Tensor:
        row = torch.arange(ids.shape[0], device=ids.device)
        sequence = torch.bucketize(row, offsets[1:], right=True)
        x = self.items(ids) * 4.0 + self.positions(self.position(row, sequence, offsets, num_targets))
        if self.times is not None and timestamps is not None:
            angle = timestamps.unsqueeze(-1) * self.frequencies
            x = x + self.times(torch.cat([angle.sin(), angle.cos()], dim=-1))
        return x

    def between(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Of two layers."""
        return x

    def forward(
        self, ids: Tensor, offsets: Tensor, num_targets: Tensor, max_seq_len: int, timestamps: Tensor | None = None
    ) -> Tensor:
        x = self.dropout(self.embed(ids, offsets, num_targets, timestamps))
        for layer in self.layers:
            x = self.between(layer(x, offsets, max_seq_len, num_targets), offsets)
        scores = self.head(self.norm(x)).squeeze(-1)
        if not self.candidates:
            return scores
        which = (offsets[1:] - num_targets).unsqueeze(1) + torch.arange(self.candidates, device=ids.device)
        return scores[torch.minimum(which, offsets[1:].unsqueeze(1) - 1)]
