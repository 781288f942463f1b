"""What a tensor holds, as a formula: exact, or none; and masks that are cut from such tensors."""

import pytest
import torch
from torch import Tensor

from hstu_compile.passes.attention_mask import MaskMeaning, MaskTerm, Opaque, identify
from hstu_compile.passes.contents import content_of, offer, withdraw
from hstu_compile.passes.zero_one import is_zero_or_one
from tests.tracing import traced

N = 24
FORMULAS = {
    "lower triangle": torch.ones(N, N).tril(),
    "strictly upper, bool": torch.ones(N, N, dtype=torch.bool).triu(1),
    "band": torch.ones(N, N).tril().triu(-5),
    "fills": torch.full((N, N), -1e9).triu(1),
    "identity": torch.eye(N, dtype=torch.int32),
    "four dimensions": torch.ones(1, 1, N, N).tril(),
    "expanded": torch.ones(1, 1).expand(N, N),
    "distances": torch.arange(N)[None] - torch.arange(N)[:, None],
    "clamped distances": (torch.arange(N)[:, None] - torch.arange(N)).clamp(-3, 3),
    "not square": torch.ones(N, 2 * N).tril(3),
    "positions": torch.arange(N),
    "positions, half precision": torch.arange(N, dtype=torch.bfloat16)[None],
    "every third": torch.arange(5, 5 + 3 * N, 3),
    "first three": torch.arange(N) < 3,
    "a number": torch.tensor(7.0),
}
OTHERS = {
    "a hole": torch.ones(N, N).tril().index_put((torch.tensor(9), torch.tensor(4)), torch.tensor(0.0)),
    "a dead row": torch.ones(N, N).tril().index_fill(0, torch.tensor([5]), 0),
    "blocks": torch.block_diag(*[torch.ones(4, 4)] * 6),
    "NaN": torch.full((N, N), float("nan")),
    "one NaN at the end": torch.cat([torch.zeros(N), torch.tensor([float("nan")])]),
    "weights": torch.linspace(0, 1, N) ** 2,
    "one rounding off": torch.arange(N, dtype=torch.float64) * 0.1,
    "three dimensions": torch.ones(3, N, N),
    "empty": torch.ones(0, N),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_gives_every_value(name: str) -> None:
    table = FORMULAS[name]
    found = content_of(table)
    assert found is not None and found == content_of(table.clone())
    coords = tuple(torch.arange(size).view(-1, *[1] * (table.dim() - 1 - k)) for k, size in enumerate(table.shape))
    assert torch.equal(found.at(coords).to(table.dtype).expand(table.shape), table)
    if table.dim():
        with pytest.raises(IndexError):
            found.at((*coords[:-1], coords[-1] + 1))
        with pytest.raises(IndexError):
            found.at((*coords[:-1], coords[-1] - 1))


@pytest.mark.parametrize("name", OTHERS)
def test_other_tables_have_none(name: str) -> None:
    assert content_of(OTHERS[name]) is None


def read(function, buffer: Tensor, x: Tensor, **sizes) -> tuple[MaskMeaning | Opaque, dict]:
    """What function(buffer, x) means for x [N, ...] where the buffer's content is known, and what was assumed."""
    gm = traced(function, [x], fixed=[buffer])
    placeholders = gm.graph.find_nodes(op="placeholder")
    offer(placeholders[0], buffer)
    (mask,) = gm.graph.output_node().all_input_nodes
    found = identify(
        [MaskTerm(mask, ("b", "h", "i", "j"))],
        **({"batch_size": 2, "num_heads": 2, "max_seq_len": mask.meta["val"].shape[-1]} | sizes),
        seq_offsets=None,
        padding_matters=True,
    )
    return found, withdraw([gm.graph])


CUT = {
    "cut": lambda m, x: m[: x.size(0), : x.size(0)],
    "cut, four dimensions": lambda m, x: m[None, None, : x.size(0), : x.size(0)].bool(),
    "cut at the end": lambda m, x: m[-x.size(0) :, -x.size(0) :],
    "picked": lambda m, x: m[torch.arange(x.size(0))][:, torch.arange(x.size(0))],
    "not later": lambda m, x: ~m.mT[: x.size(0), : x.size(0)].triu(1).bool() & m[: x.size(0), : x.size(0)].bool(),
}


@pytest.mark.parametrize("longest", [N, 9, 5000])
@pytest.mark.parametrize("name", CUT)
def test_masks_cut_from_a_buffer(name: str, longest: int) -> None:
    found, assumed = read(CUT[name], torch.ones(longest, longest).tril(), torch.ones(7, 3))
    assert found == MaskMeaning(causal=True)
    assert [content.begins for content in assumed.values()] == [(1 - longest, 1)]


def test_windows_in_a_buffer_are_found_up_to_its_end() -> None:
    band = torch.ones(N, N).tril().triu(-5)
    found, _ = read(CUT["cut"], band, torch.ones(4, 3))
    assert isinstance(found, MaskMeaning) and (found.causal, found.max_attn_len) == (True, 5)
    found, assumed = read(lambda m, x: m[: x.size(0), : x.size(0)] * 0.5, band, torch.ones(4, 3))
    assert isinstance(found, Opaque) and not assumed


def test_positions_in_a_buffer() -> None:
    def causal(place, x):
        return place[: x.size(0), None] >= place[None, : x.size(0)]

    assert read(causal, torch.arange(N), torch.ones(4, 3))[0] == MaskMeaning(causal=True)

    def contextual(place, x):
        return causal(place, x) | (place[: x.size(0), None] < 3)

    found, _ = read(contextual, torch.arange(N), torch.ones(4, 3))
    assert found == MaskMeaning(causal=True, contextual_seq_len=3)
    # At the end of the buffer the positions are others than in its middle: seen although the captured length is N.
    found, _ = read(lambda p, x: contextual(p[-x.size(0) :], x), torch.arange(N), torch.ones(N, 3))
    assert isinstance(found, Opaque)

    def shifted(place, x):
        late = place[-x.size(0) :]
        return (late[:, None] >= late) & (late - N + 20 >= 0)

    assert isinstance(read(shifted, torch.arange(N), torch.ones(N, 3))[0], Opaque)


@pytest.mark.parametrize("name", ["a hole", "a dead row", "blocks"])
def test_near_misses_of_buffers(name: str) -> None:
    found, assumed = read(CUT["cut"], OTHERS[name], torch.ones(7, 3))
    assert isinstance(found, Opaque) and "it reads " in found.reason and not assumed


def test_a_buffer_that_the_graph_writes_is_not_read() -> None:
    def function(m, x):
        cut = m[: x.size(0), : x.size(0)]
        m.mul_(1)
        return cut * 1

    found, assumed = read(function, torch.ones(N, N).tril(), torch.ones(7, 3))
    assert isinstance(found, Opaque) and "writes in place" in found.reason and not assumed


def test_zeros_and_ones_are_assumed_where_they_are_seen() -> None:
    for buffer, expected in ((torch.ones(N, N).tril(), True), (torch.full((N, N), 2.0), False)):
        gm = traced(lambda m, x: m[: x.size(0)] * 1, [torch.ones(7, 3)], fixed=[buffer])
        (node, _) = gm.graph.find_nodes(op="placeholder")
        assert not is_zero_or_one(node)
        offer(node, buffer)
        assert is_zero_or_one(node) == expected and bool(withdraw([gm.graph])) == expected
        assert not is_zero_or_one(node)
