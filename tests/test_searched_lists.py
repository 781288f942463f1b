"""A list that is searched, cut from another: compiled, the numbers are those of eager PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from hstu_compile.passes.searched_lists import as_whole
from tests.tracing import traced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEARCHES = {
    "bucketize": lambda row, offsets: torch.bucketize(row, offsets[1:], right=True),
    "searchsorted": lambda row, offsets: torch.searchsorted(offsets[1:], row, right=True),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_a_slice_is_computed_anew(name: str) -> None:
    gm = traced(SEARCHES[name], [torch.arange(7), torch.tensor([0, 3, 3, 7])])
    as_whole(gm.graph)
    clamp = torch.ops.aten.clamp.default
    assert [n.args[0].target for n in gm.graph.nodes if n.target is clamp] == [torch.ops.aten.slice.Tensor]
    as_whole(gm.graph)
    assert sum(n.target is clamp for n in gm.graph.nodes) == 1
    gm.recompile()
    assert gm(torch.arange(7), torch.tensor([0, 3, 3, 7])).tolist() == [0, 0, 0, 2, 2, 2, 2]


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.search = SEARCHES[name]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [T, 16]"""
        sequence = self.search(torch.arange(x.shape[0], device=x.device), offsets)
        same = sequence[:, None] == sequence
        return F.silu(x @ x.mT) / 9 * same @ x


@pytest.mark.parametrize("name", SEARCHES)
def test_numbers(name: str) -> None:
    torch._dynamo.reset()
    x, offsets = torch.randn(37, 16, device=DEVICE), torch.tensor([0, 12, 12, 20, 37], device=DEVICE)
    layer = Layer(name)
    run = torch.compile(layer, backend=hstu_compile.backend, options={"expect": 1})
    torch.testing.assert_close(run(x, offsets), layer(x, offsets))
