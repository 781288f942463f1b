"""The native model of the benchmarks, whose layers apply silu to all of a projection, small."""

from torch import Tensor

from bench.native_jagged import HSTUBlock, Ranker
from tests.models.ranking import ITEMS

WIDTH, HEADS = 16, 2


class NativeRanking(Ranker):
    """Takes the arguments of a Ranking, and no notice of times."""

    def __init__(self, max_seq_len: int, layers: int = 2):
        block = HSTUBlock(layers, WIDTH, HEADS, head_dim=WIDTH // HEADS, scaling_seq_len=max_seq_len)
        super().__init__(block, ITEMS, max_seq_len + 1, embedding_dim=WIDTH)

    def forward(self, items: Tensor, offsets: Tensor, num_targets: Tensor, max_seq_len: int, times: Tensor) -> Tensor:
        return super().forward(items, offsets, num_targets, max_seq_len)
