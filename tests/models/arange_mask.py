"""Jagged tokens, the mask from arange comparisons, and factors that differ by row, head and column."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.fbgemm_stand_ins  # noqa: F401


class RowScales(nn.Module):
    """A divisor per sequence, a learned temperature per head, a gate per key; padded before the heads are split."""

    def __init__(self, dim: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.proj = nn.Linear(dim, 3 * dim)
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
        self.gate = nn.Linear(dim, 1, bias=False)  # a bias: one number, whose error is chance

    def forward(self, x: Tensor, offsets: Tensor, n: int) -> Tensor:
        total, dim = x.shape
        lengths = offsets[1:] - offsets[:-1]

        def pad(t: Tensor) -> Tensor:
            return torch.ops.fbgemm.jagged_to_padded_dense(t, [offsets], [n], 0.0)

        q, k, v = (pad(t).unflatten(-1, (self.heads, dim // self.heads)) for t in self.proj(x).split(dim, dim=-1))
        place = torch.arange(n, device=x.device)
        causal = place.unsqueeze(-1).ge(place)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.temperature
        weights = causal * F.silu(scores)
        weights = weights / lengths.view(-1, 1, 1, 1).clamp(min=1) * pad(torch.sigmoid(self.gate(x))).mT.unsqueeze(1)
        a = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return x + torch.ops.fbgemm.dense_to_jagged(a, [offsets], total)[0]
