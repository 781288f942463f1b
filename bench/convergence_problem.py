"""A ranking model to train: the next item of a sequence from those before it, by HSTU layers and a head."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.native_layer import HSTUStack

LAG = 3  # an item depends on the one this many positions before it
USER_TYPES = 4
NOISE = 0.1  # share of the items that follow no rule
DATA_SEED = 0


class Problem(NamedTuple):
    seq_len: int
    batch: int
    num_heads: int
    head_dim: int
    num_layers: int = 4
    num_items: int = 32
    learning_rate: float = 1e-3


class Ranker(nn.Module):
    """Nothing in it knows about hstu_compile."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        width = problem.num_heads * problem.head_dim
        self.item = nn.Embedding(problem.num_items, width)
        self.position = nn.Embedding(problem.seq_len, width)
        self.layers = HSTUStack(problem.num_layers, width, problem.num_heads, problem.head_dim, dropout_ratio=0.0)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, problem.num_items)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        """items [B, N], lengths [B] (integers) -> scores of the next item [B, N, num_items]"""
        x = self.item(items) + self.position.weight[: items.size(1)]
        return self.head(self.norm(self.layers(x, lengths)))


def users(problem: Problem, count: int) -> tuple[Tensor, Tensor]:
    """Items [count, seq_len + 1] and lengths [count], those to predict from; always the same ones.

    A user moves on by a stride of its own, a latent: item[i] = item[i - LAG] + stride, modulo the number of items.
    """
    draw = torch.Generator().manual_seed(DATA_SEED)
    items = torch.randint(problem.num_items, (count, problem.seq_len + 1), generator=draw)
    strides = torch.randint(1, USER_TYPES + 1, (count,), generator=draw)
    follows = torch.rand(items.shape, generator=draw) >= NOISE
    for i in range(LAG, items.size(1)):
        next_items = (items[:, i - LAG] + strides) % problem.num_items
        items[:, i] = torch.where(follows[:, i], next_items, items[:, i])
    lengths = torch.randint(problem.seq_len // 4, problem.seq_len + 1, (count,), generator=draw)
    return items, lengths


def losses(
    problem: Problem,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    compiled: Callable[[nn.Module], Callable] = lambda model: model,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Of every training step, over the batch's tokens; float32 parameters, autocast to the dtype.

    seed: of the initial parameters, and of the order in which users come, each once.
    advance: called after every step.
    """
    torch.manual_seed(seed)
    model = Ranker(problem).to(device)
    order = torch.randperm(steps * problem.batch)
    run, optimizer = compiled(model), torch.optim.AdamW(model.parameters(), lr=problem.learning_rate)
    found = []
    for items, lengths in _batches(problem, steps, order, device):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = run(items[:, :-1], lengths)
        loss = _loss(scores.float(), items[:, 1:], lengths)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
        advance()
    return torch.stack(found).tolist()


def _batches(problem: Problem, steps: int, order: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    items, lengths = (of_all[order].to(device) for of_all in users(problem, steps * problem.batch))
    yield from zip(items.split(problem.batch), lengths.split(problem.batch), strict=True)


def _loss(scores: Tensor, targets: Tensor, lengths: Tensor) -> Tensor:
    """Mean cross entropy, padding left out: scores [B, N, num_items], targets [B, N], lengths [B]."""
    valid = torch.arange(targets.size(1), device=targets.device) < lengths[:, None]
    each = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (each * valid).sum() / valid.sum()
