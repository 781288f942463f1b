"""An HSTU layer of padded sequences, and what its author may do that keeps a part from being fused, or slows it."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Layer(nn.Module):
    def __init__(self, dim: int = 16, heads: int = 2, longest: int = 12) -> None:
        super().__init__()
        self.heads, self.longest = heads, longest
        self.norm, self.uvqk = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim)
        self.out_norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, -1)
        return u, *(t.unflatten(-1, (self.heads, -1)) for t in (v, q, k))

    def mask(self, x: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        live = place < lengths[:, None]
        return ((place[:, None] >= place) & live[:, :, None] & live[:, None, :])[:, None]

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return F.silu(scores) / self.longest * mask

    def attend(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, v, q, k = self.split(x)
        weights = self.weights(torch.einsum("bihd,bjhd->bhij", q, k), self.mask(x, lengths))
        return u, torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2), weights

    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        return F.dropout(self.out_norm(a) * u, 0.1, self.training)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        u, a, _ = self.attend(x, lengths)
        return self.out(self.gated(a, u)) + x


class Softmax(Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.softmax(scores.masked_fill(~mask, -1e9), -1)


class MinusInfinity(Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return F.silu(scores.masked_fill(~mask, float("-inf"))) / self.longest


class AttentionDropout(Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return F.dropout(F.silu(scores) / self.longest * mask, 0.1, self.training)


class DivisorOfPairs(Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        place = torch.arange(scores.shape[-1])
        return F.silu(scores) * mask / (1 + (place[:, None] - place).abs())


class WeightsReturned(Layer):
    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        u, a, weights = self.attend(x, lengths)
        return self.out(self.gated(a, u)) + x, weights


class NumberRead(Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return F.silu(scores) / mask.sum(-1).max().item() * mask


class Branch(Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        if scores.isnan().any():
            scores = scores.nan_to_num()
        return super().weights(scores, mask)


class HoleFromData(Layer):
    def mask(self, x: Tensor, lengths: Tensor) -> Tensor:
        return super().mask(x, lengths) & (x.abs().amax(-1) > 0.1)[:, None, None, :]


class HoleFromPlaces(Layer):
    def mask(self, x: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        return super().mask(x, lengths) & ((place[:, None] - place) % 3 != 1)


class MaskGiven(Layer):
    def mask(self, x: Tensor, lengths: Tensor) -> Tensor:
        return lengths


class PaddedKeysAlone(Layer):
    def mask(self, x: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        return ((place[:, None] >= place) & (place < lengths[:, None, None]))[:, None]


class WrittenInPlace(Layer):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(self.uvqk(self.norm(x)))
        y, rest = y.unflatten(-1, (4, -1)), x.shape[:2]
        u, v, q, k = (y[..., i, :] for i in range(4))
        q.mul_(0.5)
        return u, *(t.view(*rest, self.heads, -1) for t in (v, q, k))


class NormOverTokens(Layer):
    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        a = F.layer_norm(a.mT, (a.shape[1],)).mT
        return F.dropout(a * u, 0.1, self.training)


class NoNorm(Layer):
    def gated(self, a: Tensor, u: Tensor) -> Tensor:
        return F.dropout(a * u, 0.1, self.training)


class PaddedByIndex(Layer):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, -1)
        at = torch.arange(lengths.numel()).repeat_interleave(lengths, output_size=len(x))
        to = torch.arange(len(x)) - (lengths.cumsum(0) - lengths)[at]
        shape = (lengths.numel(), self.longest, x.shape[1])
        q, k, v = (x.new_zeros(shape).index_put((at, to), t).unflatten(-1, (self.heads, -1)) for t in (q, k, v))
        weights = F.silu(torch.einsum("bihd,bjhd->bhij", q, k)).tril() / self.longest
        a = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)[at, to]
        return self.out(self.gated(a, u)) + x
