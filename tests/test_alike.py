"""Nodes that compute the same, and nodes that do not; a mask that layers share is read once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu_compile.passes import attention_mask
from hstu_compile.passes.alike import Alike
from tests.spelling_trials import through_trace
from tests.tracing import traced


def numbers(function) -> list[int]:
    gm, alike = traced(function, [torch.ones(3, 4), torch.tensor([1, 2, 3])]), Alike()
    (results,) = gm.graph.output_node().args
    return [alike.number(node) for node in results]


def test_the_same_in_other_words_of_nodes() -> None:
    first, second, other, more = numbers(
        lambda x, n: (
            (torch.arange(4) < n[:, None]).unsqueeze(1),
            (torch.arange(4) < n[:, None]).unsqueeze(1),
            (torch.arange(4) <= n[:, None]).unsqueeze(1),
            (torch.arange(4) < n[:, None]).unsqueeze(0),
        )
    )
    assert first == second and len({first, other, more}) == 3


def test_random_and_written_tensors_are_like_no_other() -> None:
    first, second = numbers(lambda x, n: (torch.rand(3), torch.rand(3)))
    assert first != second

    def written(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        a, b = torch.ones(3, 3).tril(), torch.ones(3, 3).tril()
        view = b[0]
        view.zero_()
        return a.unsqueeze(0), b.unsqueeze(0)

    first, second = numbers(written)
    assert first != second


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        mask = (place[:, None] >= place) & (place < lengths[:, None])[:, None, :]
        for k, projection in enumerate(self.projections):
            q, k_, v = projection(x).chunk(3, -1)
            weights = F.silu(q @ k_.mT) / 9 * (mask if k < 2 else mask & (place % 2 == 0)).to(x.dtype)
            x = x + weights @ v
        return x


def test_a_mask_that_layers_share_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, regions = attention_mask._read, []

    def watched(region):
        regions.append(region)
        return read(region)

    monkeypatch.setattr(attention_mask, "_read", watched)
    x, lengths = torch.randn(3, 7, 8), torch.tensor([7, 2, 0])
    model = Layers()
    call, report, _ = through_trace(model, (x, lengths))
    assert len(report.fused("attention")) == 3, report
    assert len(regions) == 2
    torch.testing.assert_close(call(x, lengths), model(x, lengths))
