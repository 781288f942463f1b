"""Dense padded batches [B, N, E], the majority in public code: four linears, tril buffers, matmul, x * sigmoid(x)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FourLinears(nn.Module):
    """matmul on [B, H, N, D], x * sigmoid(x), a tril buffer, padding cleared by multiplying with [B, N, 1]."""

    def __init__(self, dim: int = 16, heads: int = 2, max_len: int = 12):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.to_q, self.to_k, self.to_v, self.to_u = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.register_buffer("causal", torch.tril(torch.ones(max_len, max_len, dtype=torch.bool)))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        b, n, e = x.shape
        h = self.norm1(x)

        def split(t: Tensor) -> Tensor:
            return t.view(b, n, self.heads, self.head_dim).transpose(1, 2)

        u = F.silu(self.to_u(h))
        q, k, v = split(F.silu(self.to_q(h))), split(F.silu(self.to_k(h))), split(F.silu(self.to_v(h)))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.head_dim)
        weights = scores * torch.sigmoid(scores)
        weights = weights.masked_fill(~self.causal[:n, :n], 0.0)
        weights = weights / n
        a = torch.matmul(weights, v).transpose(1, 2).contiguous().view(b, n, e)
        return (x + self.out(self.norm2(a) * u)) * valid.unsqueeze(-1)


class KeyPadding(nn.Module):
    """Heads folded into the batch for bmm; scores filled with -1e9 before silu where key or query is padding."""

    def __init__(self, dim: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.uvqk = nn.Linear(dim, 4 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        b, n, e = x.shape
        d = e // self.heads
        u, v, q, k = F.silu(self.uvqk(F.layer_norm(x, (e,)))).chunk(4, dim=-1)
        q, k, v = (t.reshape(b, n, self.heads, d).permute(0, 2, 1, 3).reshape(b * self.heads, n, d) for t in (q, k, v))
        place = torch.arange(n, device=x.device)
        valid = place[None, :] < lengths[:, None]
        keep = (place[:, None] >= place[None, :]) & valid[:, :, None] & valid[:, None, :]
        scores = torch.bmm(q * d**-0.5, k.transpose(1, 2)).view(b, self.heads, n, n)
        scores = scores.masked_fill(~keep.unsqueeze(1), -1e9)
        weights = (F.silu(scores) * (1.0 / 50)).view(b * self.heads, n, n)
        a = (weights @ v).view(b, self.heads, n, d).permute(0, 2, 1, 3).reshape(b, n, e)
        return x + self.out(F.layer_norm(a, (e,)) * u)


class ItemPadding(nn.Module):
    """Padding is where an item is 0, wherever that is: a triangle of keys, for all heads and rows."""

    def __init__(self, dim: int = 16, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.uvqk = nn.Parameter(torch.randn(dim, 4 * dim) / dim**0.5)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, items: Tensor) -> Tensor:
        b, n, e = x.shape
        u, v, q, k = torch.split(F.silu(torch.matmul(F.layer_norm(x, [e], eps=1e-6), self.uvqk)), [e] * 4, dim=-1)
        keep = torch.tril((items != 0).unsqueeze(1).unsqueeze(2).expand(-1, -1, n, -1))
        q, k = q.view(b, n, self.heads, -1), k.view(b, n, self.heads, -1)
        weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k)) / n * keep
        a = torch.einsum("bhnm,bmhd->bnhd", weights, v.reshape(b, n, self.heads, -1)).reshape(b, n, e)
        return self.out(u * F.layer_norm(a, [e], eps=1e-6)) + x


class RelativeBias(nn.Module):
    """A learned bias per head by i - j, each sequence's true length as divisor, the mask passed in from outside."""

    def __init__(self, dim: int = 16, heads: int = 2, max_len: int = 12):
        super().__init__()
        self.heads, self.max_len = heads, max_len
        self.qkvu = nn.Linear(dim, 4 * dim)
        self.table = nn.Embedding(2 * max_len - 1, heads)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v, u = F.silu(self.qkvu(x)).view(b, n, 4, self.heads, e // self.heads).unbind(2)
        place = torch.arange(n, device=x.device)
        bias = self.table(place[:, None] - place[None, :] + self.max_len - 1).permute(2, 0, 1)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) + bias
        weights = F.silu(scores) * mask[:, None]
        weights = weights / lengths.clamp(min=1)[:, None, None, None]
        a = torch.einsum("bhij,bjhd->bihd", weights, v)
        return x + self.out((F.layer_norm(a, a.shape[-1:]) * u).flatten(2))


class SingleHead(nn.Module):
    """No head axis at all; where() instead of a product with the mask; keys first in the scores."""

    def __init__(self, dim: int = 16):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = k @ q.mT  # [B, keys, queries]
        weights = F.silu(scores) / n
        keep = torch.ones(n, n, device=x.device).triu().bool()
        weights = torch.where(keep, weights, torch.zeros_like(weights))
        return x + weights.mT @ v
