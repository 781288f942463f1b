"""Almost HSTU attention, each wrong in one way; and the same place done right."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NearMiss(nn.Module):
    """kind: "right", or what is wrong with it. "hole": the mask has one; it fuses, with the mask as a tensor."""

    def __init__(self, kind: str, dim: int = 16, heads: int = 2):
        super().__init__()
        self.kind, self.heads = kind, heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate = nn.Parameter(torch.rand(12, 12))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        b, n, e = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.kind == "fewer queries":
            q = q[:, :, -2:]
        scores = q @ k.transpose(-1, -2) * 0.5
        keep = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        if self.kind == "hole":
            place = torch.arange(n, device=x.device)
            keep = keep & ~((place[:, None] == 3) & (place == 1))
        if self.kind == "minus infinity":
            scores = scores.masked_fill(~keep, float("-inf"))
        if self.kind == "softmax":
            weights = torch.softmax(scores.masked_fill(~keep, -1e9), dim=-1)
        elif self.kind == "gelu":
            weights = F.gelu(scores) * keep
        elif self.kind == "half masked before silu":
            weights = F.silu(scores * (keep * 0.5))
        elif self.kind == "added after silu":
            weights = F.silu(scores) * keep + 0.1
        elif self.kind == "fewer queries":
            weights = F.silu(scores)
        elif self.kind == "second nonlinearity":
            weights = torch.tanh(F.silu(scores)) * keep
        else:
            weights = F.silu(scores) / n * keep
        if self.kind == "dropout":
            weights = F.dropout(weights, 0.5, self.training)
        if self.kind == "learned mask":
            weights = weights * self.gate[:n, :n]
        out = (weights @ v).transpose(1, 2).flatten(2)
        return (out, scores) if self.kind == "scores returned" else out
