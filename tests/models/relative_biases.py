"""Relative biases of one attention, many spellings: each a function of the model's tables, times [B, N] and N.

`RECOGNISED` maps a name to a function and what the report must say, `FROM_BUFFERS` too, of those that read a buffer;
`TENSORS` to one that stays a tensor, and why.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Bias = Callable[["Biased", Tensor, int], Tensor]
RECOGNISED: dict[str, tuple[Bias, str]] = {}
TENSORS: dict[str, tuple[Bias, str]] = {}
FROM_BUFFERS: dict[str, tuple[Bias, str]] = {}
LONGEST = 16


class Biased(nn.Module):
    """Attention over q, k, v that are given, with a bias from tables of its own."""

    def __init__(self, bias: Bias, heads: int = 2):
        super().__init__()
        self.bias, self.heads = bias, heads
        self.near = nn.Parameter(torch.randn(2 * LONGEST - 1))
        self.near_by_head = nn.Parameter(torch.randn(2 * LONGEST - 1, heads))
        self.ages = nn.Parameter(torch.randn(9))
        self.ages_by_head = nn.Embedding(9, heads)
        self.padded = nn.Embedding(9, 1, padding_idx=3)
        self.scale = nn.Parameter(torch.ones(1))
        place = torch.arange(LONGEST)
        self.register_buffer("apart", place[:, None] - place + LONGEST - 1)
        self.register_buffer("bounds", torch.tensor([1, 5, 60, 3600]))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in x.chunk(3, -1))
        weights = F.silu(q @ k.mT + self.bias(self, times, n)) / n
        return (weights.tril() @ v).transpose(1, 2).flatten(2)


def place_of(times: Tensor, n: int) -> Tensor:
    return torch.arange(n, device=times.device)


def recognised(words: str) -> Callable[[Bias], Bias]:
    def register(function: Bias) -> Bias:
        RECOGNISED[function.__name__] = function, words
        return function

    return register


def from_a_buffer(words: str) -> Callable[[Bias], Bias]:
    def register(function: Bias) -> Bias:
        FROM_BUFFERS[function.__name__] = function, words
        return function

    return register


def stays(reason: str) -> Callable[[Bias], Bias]:
    def register(function: Bias) -> Bias:
        TENSORS[function.__name__] = function, reason
        return function

    return register


@recognised("position bias")
def rows_less_columns(m, times, n):
    place = place_of(times, n)
    return m.near_by_head[place[:, None] - place + n - 1].permute(2, 0, 1)


@recognised("position bias")
def counted_down_and_up(m, times, n):
    place = place_of(times, n)
    return m.near[torch.arange(n - 1, -1, -1)[:, None] + place]


@from_a_buffer("position bias")
def cut_from_a_buffer(m, times, n):
    return F.embedding(m.apart[:n, :n], m.near_by_head).permute(2, 0, 1)


@recognised("position bias")
def padded_repeated_reshaped(m, times, n):
    t = F.pad(m.near[: 2 * n - 1], [0, n]).repeat(n)
    t = t[..., :-n].reshape(1, n, 3 * n - 2)
    r = (2 * n - 1) // 2
    return t[..., r:-r]


@recognised("position bias")
def skewed_by_one_column(m, times, n):
    rows = F.pad(m.near[: 2 * n - 1].flip(0).expand(n, -1), [0, 1]).reshape(-1)
    return rows[: n * (2 * n - 1)].view(n, 2 * n - 1)[:, n - 1 :]


@recognised("position bias")
def buckets_of_t5(m, times, n):
    place = place_of(times, n)
    apart = (place[:, None] - place).clamp(min=0)
    far = 4 + (torch.log(apart.clamp(min=1).float() / 4) / math.log(4) * 4).long()
    bucket = torch.where(apart < 4, apart, torch.min(far, torch.full_like(far, 7)))
    return m.ages_by_head(bucket).permute(2, 0, 1).unsqueeze(0)


@recognised("position bias")
def not_learned(m, times, n):
    place = place_of(times, n)
    return -(place[:, None] - place).abs() * 0.25


@recognised("position bias")
def tables_summed_and_scaled(m, times, n):
    place = place_of(times, n)
    apart = place[:, None] - place
    return 0.5 * (m.near[apart + n - 1] - m.ages[apart.abs().clamp(max=8)]) + m.near_by_head[0, 0]


@recognised("time bias of 10 buckets of |")
def logarithm_of_the_gap(m, times, n):
    gap = times[:, :, None] - times[:, None, :]
    bucket = (torch.log(torch.abs(gap).clamp(min=1)) / 0.301).long()
    bucket = torch.clamp(bucket, min=0, max=10).detach()
    return torch.index_select(F.pad(m.ages, [1, 1]), 0, bucket.view(-1)).view(-1, 1, n, n)


@recognised("time bias")
def next_times_less_times(m, times, n):
    later = torch.cat([times, times[:, n - 1 : n]], dim=1)
    gap = later[:, 1:].unsqueeze(2) - later[:, :-1].unsqueeze(1)
    return m.ages_by_head((gap / 60).clamp(0, 8).long()).permute(0, 3, 1, 2)


@from_a_buffer("time bias of 5 buckets")
def bucketized(m, times, n):
    gap = (times.unsqueeze(2) - times.unsqueeze(1)).abs()
    return m.ages[torch.bucketize(gap, m.bounds)].unsqueeze(1)


@recognised("time bias of 5 buckets of sub")
def comparisons_summed(m, times, n):
    gap = times.unsqueeze(1) - times.unsqueeze(2)  # columns less rows
    return m.ages[(gap > 1).long() + (gap > 60).long() + (gap > 3600).long()][:, None]


@recognised("time bias of 6 buckets")
def comparisons_with_many(m, times, n):
    gap = (times[:, :, None] - times[:, None]).abs()
    bounds = torch.tensor([1, 2, 60, 300, 3600])
    return F.embedding((gap[..., None] >= bounds).sum(-1), m.ages_by_head.weight).permute(0, 3, 1, 2)


@recognised("time bias")
def root_of_the_gap_in_float(m, times, n):
    hours = times.float() / 3600
    return m.ages[(hours[:, :, None] - hours[:, None]).abs().sqrt().clamp(max=8).long()][:, None]


@recognised("time bias")
def on_either_side_of_now(m, times, n):
    gap = times[:, :, None] - times[:, None, :]
    return m.ages[torch.where(gap > 0, 4, 0) + (gap.abs() // 1000).clamp(max=3)][:, None]


@recognised("time bias of 9 buckets of |")
def position_and_time(m, times, n):
    place = place_of(times, n)
    by_position = m.near[place[:, None] - place + n - 1]
    gap = (times[:, :, None] - times[:, None, :]).abs()
    return (by_position + m.ages[torch.log2(gap + 1.0).long().clamp(0, 8)])[:, None]


@recognised("time bias of 4 buckets of |")
def two_tables_of_one_gap(m, times, n):
    gap = (times[:, :, None] - times[:, None, :]).abs()
    return (m.ages[(gap // 500).clamp(max=8)] - 2 * m.near[(gap // 1000).clamp(max=2)])[:, None]


@recognised("time bias")
def sequences_folded_with_heads(m, times, n):
    gap = (times[:, :, None] - times[:, None, :]).abs()
    folded = m.ages[(gap // 500).clamp(max=8)].repeat_interleave(m.heads, 0)
    return folded.view(-1, m.heads, n, n)


@stays("it is not the same along the diagonals: row 1, column 1 differs")
def rows_plus_columns(m, times, n):
    place = place_of(times, n)
    return m.near[place[:, None] + place]


@stays("more than 4096 steps")
def remainder_of_the_gap(m, times, n):
    return m.ages[(times[:, :, None] - times[:, None, :]).abs() % 9][:, None]


@stays("beside")
def table_by_sequence(m, times, n):
    gap = (times[:, :, None] - times[:, None, :]).abs()
    return m.near[(gap // 500).clamp(max=8) + (times[:, :1, None] % 3)][:, None]


@stays("it depends on l_times_")
def item_of_the_column(m, times, n):
    return m.ages[(times % 9)][:, None, None].expand(-1, 1, n, n)


@stays("is no difference of a row and a column")
def bucket_of_three_times(m, times, n):
    gap = times[:, :, None] - (times[:, None, :] + times[:, :, None] // 2)
    return m.ages[(gap // 500).clamp(0, 8)][:, None]


@stays("depends on more than")
def bucket_that_rows_shift(m, times, n):
    gap = (times[:, :, None] - times[:, None, :]).abs()
    return m.near[(gap // 500).clamp(max=8) + place_of(times, n)[:, None]][:, None]


@stays("(what embedding is made of is not followed)")
def padding_of_an_embedding(m, times, n):
    place = place_of(times, n)
    return m.padded((place[:, None] - place).abs().clamp(max=8)).squeeze(-1)


@stays("another grad mode")
def without_a_gradient(m, times, n):
    place = place_of(times, n)
    with torch.no_grad():
        return m.near[place[:, None] - place + n - 1]


@stays("its bucket depends on a size")
def bucket_by_the_length(m, times, n):
    gap = (times[:, :, None] - times[:, None, :]).abs()
    return m.near[(gap // 500).clamp(max=n)][:, None]


@recognised("time bias")
def times_with_a_gradient(m, times, n):
    hours = times.double() * m.scale.double() / 3600
    return m.ages[(hours[:, :, None] - hours[:, None]).abs().clamp(max=8).long()][:, None]
