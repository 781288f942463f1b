"""One attention, many spellings: functions of q, k, v [B, N, H, D], each as some code in the wild writes it.

All give [B, N, H, D]. `words`: what the report must say of it.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spelling = Callable[[Tensor, Tensor, Tensor], Tensor]
SPELLINGS: dict[str, tuple[Spelling, str]] = {}


def spelling(words: str = "causal") -> Callable[[Spelling], Spelling]:
    def register(function: Spelling) -> Spelling:
        SPELLINGS[function.__name__] = function, words
        return function

    return register


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


@spelling()
def any_letters_any_order(q, k, v):
    scores = torch.einsum("zphw,zchw->pczh", q, k)
    weights = F.silu(scores) * causal(q.shape[1])[..., None, None]
    return torch.einsum("zchd,pczh->zphd", v, weights)


@spelling()
def ellipsis(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = F.silu(torch.einsum("...id,...jd->...ij", q, k)) * causal(q.shape[2])
    return torch.einsum("...ij,...jd->...id", weights, v).transpose(1, 2)


@spelling()
def heads_first(q, k, v):
    q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
    weights = F.silu(q @ k.mT) * causal(q.shape[2])
    return (weights @ v).permute(1, 2, 0, 3)


@spelling()
def heads_by_chunk_and_cat(q, k, v):
    b, n, h, d = q.shape
    q, k, v = (torch.cat(t.flatten(2).chunk(h, dim=-1), dim=0) for t in (q, k, v))  # [H * B, N, D]
    weights = F.silu(torch.bmm(q, k.transpose(1, 2))) * causal(n)
    return torch.stack(torch.bmm(weights, v).chunk(h, dim=0), dim=2)


@spelling()
def baddbmm_with_a_bias(q, k, v):
    b, n, h, d = q.shape
    q, k, v = (t.transpose(1, 2).reshape(b * h, n, d) for t in (q, k, v))
    bias = torch.linspace(-1, 1, n).to(q).expand(b * h, n, n)
    weights = F.silu(torch.baddbmm(bias, q, k.mT, beta=0.5, alpha=0.25)).tril()
    return torch.bmm(weights, v).view(b, h, n, d).transpose(1, 2)


@spelling()
def written_in_place(q, k, v):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    scores *= 0.5
    scores.masked_fill_(~causal(q.shape[1]), -1e9)
    weights = F.silu(scores, inplace=True)
    weights /= 7
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@spelling()
def keys_shared_by_all_heads(q, k, v):
    weights = F.silu(torch.einsum("bnhd,bmd->bhnm", q, k[:, :, 0])) * causal(q.shape[1])
    return torch.einsum("bhnm,bmd->bnhd", weights, v[:, :, 1])


@spelling()
def scale_is_a_tensor(q, k, v):
    scale = torch.tensor(float(q.shape[-1])).sqrt()
    weights = F.silu((q.transpose(1, 2) / scale) @ k.permute(0, 2, 3, 1)) * causal(q.shape[1])
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


@spelling()
def scales_everywhere(q, k, v):
    q, k = q * q.shape[-1] ** -0.25, k / math.sqrt(math.sqrt(k.shape[-1]))
    weights = F.silu(2 * torch.einsum("bnhd,bmhd->bhnm", q, k)) / 3 * 0.5
    weights = torch.where(causal(q.shape[1]), weights, 0.0)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@spelling()
def up_and_down_casts(q, k, v):
    scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float())
    weights = F.silu(scores.to(torch.float32)).type_as(q) * causal(q.shape[1]).to(q.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", weights.contiguous(), v.contiguous())


@spelling()
def additive_mask(q, k, v):
    n = q.shape[1]
    hide = torch.zeros(n, n).masked_fill(~causal(n), -1e9)
    weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) * 0.5 + hide)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@spelling("bias")
def alpha_scales_the_bias_too(q, k, v):
    n = q.shape[1]
    place = torch.arange(n)
    bias = torch.exp(-(place[:, None] - place).abs() / 3.0)
    weights = F.silu(0.5 * (torch.einsum("bnhd,bmhd->bhnm", q, k) + bias - 0.1 * bias.T) + bias)
    return torch.einsum("bhnm,bmhd->bnhd", weights * causal(n), v)


@spelling()
def mask_before_and_after(q, k, v):
    n = q.shape[1]
    place = torch.arange(n)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k).masked_fill(place[None, :] > place[:, None], 0.0)
    weights = F.silu(scores) * (place[:, None] - place < 4).float() / n
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@spelling("bias")
def float_mask_before_silu(q, k, v):
    n = q.shape[1]
    scores = (torch.einsum("bnhd,bmhd->bhnm", q, k) + 0.25) * causal(n).to(q.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", F.silu(scores), v)


@spelling()
def mask_like_the_scores(q, k, v):
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    weights = F.silu(scores)
    weights = weights * torch.tril(torch.ones_like(scores))
    return torch.einsum("bhnm,bmhd->bnhd", weights / scores.size(-1), v)


@spelling()
def divided_by_the_visible_keys(q, k, v):
    n = q.shape[1]
    weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k)) * causal(n)
    weights = weights / torch.arange(1, n + 1).view(1, 1, n, 1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


@spelling("full")
def one_head_no_head_axis(q, k, v):
    weights = torch.mul(torch.sigmoid(s := q[:, :, 0] @ k[:, :, 0].transpose(-1, -2)), s)
    return (weights @ v[:, :, 0]).unsqueeze(2).expand_as(q).clone()


@spelling("full")
def output_transposed(q, k, v):
    weights = F.silu(torch.einsum("bihd,bjhd->bhji", q, k))  # [B, H, keys, queries]
    return torch.einsum("bjhd,bhji->bhdi", v, weights).permute(0, 3, 1, 2)


@spelling()
def negated_twice(q, k, v):
    weights = -F.silu(-torch.einsum("bnhd,bmhd->bhnm", q, -k)) * causal(q.shape[1])
    return torch.einsum("bhnm,bmhd->bnhd", weights, -v)


class Spelled(nn.Module):
    def __init__(self, spelled: Spelling, dim: int = 16, heads: int = 2):
        super().__init__()
        self.attend, self.heads = spelled, heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, e = x.shape
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).chunk(3, -1))
        return x + self.out(self.attend(q, k, v).reshape(b, n, e))
