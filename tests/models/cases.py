"""Every model of this folder with arguments of any size, for tests that go through all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.arange_mask import RowScales
from tests.models.dense_padded import FourLinears, ItemPadding, KeyPadding, RelativeBias, SingleHead
from tests.models.meta_stu import MetaSTU
from tests.models.nvidia_native import NvidiaNative
from tests.models.research import ResearchHSTU

MAX_SEQ_LEN = 12
WIDTH = 16


@dataclass(frozen=True)
class Case:
    """A model, `arguments(batch, seed)` for it (the first is x, and every tensor's batch or token count may change),
    how many attention regions it holds, and what the report says about them.

    dynamic: False where a graph break makes Dynamo itself specialise the token count.
    """

    model: Callable[[], nn.Module]
    arguments: Callable[..., tuple[Any, ...]]
    regions: int = 1
    says: tuple[str, ...] = ()
    layout: str = "jagged"
    dynamic: bool = True


class Stack(nn.Module):
    """Layers that share everything but x."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *others)
        return x


def lengths_and_offsets(batch: int, seed: int = 0, least: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(least, MAX_SEQ_LEN + 1, (batch,), generator=generator)
    return lengths, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def tokens(total: int, seed: int) -> Tensor:
    return torch.randn(total, WIDTH, generator=torch.Generator().manual_seed(seed))


def jagged(batch: int, seed: int = 0) -> tuple[Any, ...]:
    _, offsets = lengths_and_offsets(batch, seed)
    return tokens(int(offsets[-1]), seed), offsets, MAX_SEQ_LEN


def with_targets(batch: int, seed: int = 0) -> tuple[Any, ...]:
    x, offsets, n = jagged(batch, seed)
    return x, offsets, n, torch.arange(batch) % 3


def with_contextuals(batch: int, seed: int = 0) -> tuple[Any, ...]:
    x, offsets, n = jagged(batch, seed)
    return x, offsets, n, 64, torch.arange(batch) % 4, (torch.arange(batch) + 1) % 3


def with_timestamps(batch: int, seed: int = 0) -> tuple[Any, ...]:
    x, offsets, n = jagged(batch, seed)
    generator = torch.Generator().manual_seed(seed)
    return x, offsets, torch.randint(0, 10_000, (batch, n), generator=generator).sort(1).values


def dense(batch: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, MAX_SEQ_LEN, WIDTH, generator=torch.Generator().manual_seed(seed))


def with_valid(batch: int, seed: int = 0) -> tuple[Any, ...]:
    lengths, _ = lengths_and_offsets(batch, seed)
    return dense(batch, seed), (torch.arange(MAX_SEQ_LEN) < lengths[:, None]).float()


def with_lengths(batch: int, seed: int = 0) -> tuple[Any, ...]:
    return dense(batch, seed), lengths_and_offsets(batch, seed)[0]


def with_items(batch: int, seed: int = 0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    return dense(batch, seed), torch.randint(0, 4, (batch, MAX_SEQ_LEN), generator=generator)


def with_mask(batch: int, seed: int = 0) -> tuple[Any, ...]:
    x, valid = with_valid(batch, seed)
    return x, torch.tril(torch.ones(MAX_SEQ_LEN, MAX_SEQ_LEN)) * valid[:, None], valid.sum(-1)


MODELS: dict[str, Case] = {
    "meta_stu": Case(MetaSTU, with_targets, says=("causal", "targets", "alpha 0.5", "divisor")),
    "meta_stu window": Case(
        lambda: MetaSTU(window=3, contextual=2, min_full=2), with_targets, says=("window 3", "contextual rows: 2")
    ),
    "meta_stu plain": Case(lambda: MetaSTU(targets=False), with_targets, says=("causal; jagged",)),
    "meta_stu group norm": Case(lambda: MetaSTU(group_norm=True), with_targets, says=("causal",)),
    "meta_stu checkpointed": Case(lambda: MetaSTU(checkpointed=True), with_targets, says=("causal", "targets")),
    "meta_stu stack": Case(lambda: Stack(MetaSTU(), MetaSTU(contextual=2)), with_targets, regions=2),
    "nvidia_native": Case(NvidiaNative, with_contextuals, says=("groups of 2", "contextual rows", "divisor 64")),
    "research": Case(ResearchHSTU, with_timestamps, says=("mask tensor", "bias"), layout="dense", dynamic=False),
    "research unbroken": Case(
        lambda: ResearchHSTU(break_graph=False), with_timestamps, says=("mask tensor", "bias"), layout="jagged"
    ),
    "four linears": Case(FourLinears, with_valid, says=("mask tensor",), layout="dense"),
    "key padding": Case(KeyPadding, with_lengths, says=("causal", "lengths", "divisor 50"), layout="dense"),
    "item padding": Case(ItemPadding, with_items, says=("mask tensor",), layout="dense"),
    "relative bias": Case(RelativeBias, with_mask, says=("mask tensor", "bias"), layout="dense"),
    "single head": Case(SingleHead, lambda batch, seed=0: (dense(batch, seed),), says=("causal",), layout="dense"),
    "row scales": Case(RowScales, jagged, says=("causal", "q scaled", "v scaled", "out scaled")),
}
