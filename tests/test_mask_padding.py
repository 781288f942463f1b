"""Dense masks whose lengths do not end the rows: keys alone are padded, or the lengths only tell where history ends."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from hstu_compile import compiler
from hstu_compile.ops.hstu_attention import ATTN_MASK, PARAMETERS
from hstu_compile.passes.attention_mask import MaskMeaning, MaskTerm, Opaque, identify
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.tracing import traced
from tests.without_codegen import inductor_without_codegen

compiles = pytest.fixture(inductor_without_codegen)
ATTENTION = torch.ops.hstu_compile.hstu_attention.default

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of rows, columns, lengths and numbers of targets
MASKS: dict[str, tuple[Mask, dict]] = {
    "causal, keys": (lambda i, j, n, t: (i >= j) & (j < n), {"padding": "dead keys", "causal": True}),
    "full, keys": (lambda i, j, n, t: (j < n) & (i >= 0), {"padding": "dead keys", "causal": False}),
    "window, keys": (
        lambda i, j, n, t: (i >= j) & (i - j <= 3) & (j < n),
        {"padding": "dead keys", "max_attn_len": 3, "targets_share_position": False},
    ),
    "targets, keys": (
        lambda i, j, n, t: (i >= j) & ((j < n - t) | (i == j)) & (j < n),
        {"padding": "dead keys", "causal": True},
    ),
    "targets": (lambda i, j, n, t: (i >= j) & ((j < n - t) | (i == j)), {"padding": "live", "causal": True}),
    "end of history": (lambda i, j, n, t: (i >= j) & ((j < n) | (i == j)), {"padding": "live", "causal": True}),
    "rows too": (lambda i, j, n, t: (i >= j) & (j < n) & (i < n), {"padding": "dead", "causal": True}),
}
OTHERS: dict[str, Mask] = {
    "one key more": lambda i, j, n, t: (i >= j) & (j <= n),
    "queries alone": lambda i, j, n, t: (i < n) & (j >= 0),
    "keys of another sequence": lambda i, j, n, t: (i >= j) & (j < n.roll(1, 0)) & (j < n),
    "half the padded rows": lambda i, j, n, t: (i >= j) & (j < n) & (i < 2 * n),
    "padded rows see all": lambda i, j, n, t: (i >= j) & ((j < n) | (i >= n)),
    "padded rows see themselves": lambda i, j, n, t: (i >= j) & ((j < n) | (i == j) & (i > n)),
    # In a sequence of one token, row 1 sees what the family's contextual rows don't.
    "contextual rows, keys": lambda i, j, n, t: ((i >= j) | (i < 2)) & (j < n),
    "a target too many": lambda i, j, n, t: (i >= j) & ((j <= n - t) | (i == j)) & (j < n),
}


def written(mask: Mask) -> Callable[[Tensor, Tensor, int], Tensor]:
    def function(lengths: Tensor, targets: Tensor, n: int) -> Tensor:
        place = torch.arange(n)
        return mask(place[:, None], place[None, :], lengths.view(-1, 1, 1), targets.view(-1, 1, 1))

    return function


def read(mask: Mask) -> MaskMeaning | Opaque:
    x = torch.ones(16, 3)
    gm = traced(lambda x, n, t: written(mask)(n, t, x.size(0)), [x, torch.tensor([5, 9, 16]), torch.tensor([1, 0, 2])])
    x, lengths, _ = gm.graph.find_nodes(op="placeholder")
    (node,) = gm.graph.output_node().all_input_nodes
    sizes = {"batch_size": lengths.meta["val"].shape[0], "num_heads": 2, "max_seq_len": x.meta["val"].shape[0]}
    return identify([MaskTerm(node, ("b", "i", "j"))], **sizes, seq_offsets=None, padding_matters=True)


@pytest.mark.parametrize("name", MASKS)
def test_what_the_lengths_do(name: str) -> None:
    mask, expected = MASKS[name]
    found = read(mask)
    assert isinstance(found, MaskMeaning), found
    assert {key: getattr(found, key) for key in expected} == expected
    assert (found.num_targets is not None) == name.startswith("targets")
    words = {"dead": "padding by", "dead keys": "padding of keys by", "live": "history by"}
    assert f"{words[found.padding]} lengths: " in found.words


@pytest.mark.parametrize("name", OTHERS)
def test_near_misses(name: str) -> None:
    assert isinstance(read(OTHERS[name]), Opaque)


class Attention(nn.Module):
    def __init__(self, mask: Mask, heads: int) -> None:
        super().__init__()
        self.mask, self.heads, self.uvqk = written(mask), heads, nn.Linear(12, 4 * 12)

    def forward(self, x: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        b, n, _ = x.shape
        u, v, q, k = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in F.silu(self.uvqk(x)).chunk(4, -1))
        weights = F.silu(q @ k.mT) / 50 * self.mask(lengths, targets, n).unsqueeze(1)
        return u * (weights @ v)


class HeadsFirst(Attention):
    def forward(self, x: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(x).unflatten(-1, (4, self.heads, -1))).unbind(2)
        mask = self.mask(lengths, targets, x.shape[1])
        weights = F.silu(torch.einsum("bihd,bjhd->hbij", q, k)) / 50 * mask
        return u * torch.einsum("hbij,bjhd->bihd", weights, v)


def test_the_batch_is_told_from_the_heads_where_these_come_first(monkeypatch: pytest.MonkeyPatch, compiles) -> None:
    monkeypatch.setitem(globals(), "Attention", HeadsFirst)
    test_numbers("rows too", 2, torch.int64, monkeypatch, compiles)


@pytest.mark.parametrize("heads, dtype", [(2, torch.int64), (1, torch.int32)])
@pytest.mark.parametrize("name", MASKS)
def test_numbers(name: str, heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, compiles) -> None:
    """Any counts, those that make no sense too, on one graph for all sizes."""
    graphs, rewrite = [], compiler.rewrite

    def watched(*args):
        graphs.append(rewrite(*args))
        return graphs[-1]

    monkeypatch.setattr(compiler, "rewrite", watched)
    torch._dynamo.reset()
    model = Attention(MASKS[name][0], heads)
    double = Attention(MASKS[name][0], heads).double()
    double.load_state_dict(model.state_dict())
    options = {"enable": ("attention",)}
    run = torch.compile(model, backend=hstu_compile.backend, options=options, dynamic=True)
    counts = torch.tensor(list(itertools.product(range(8), range(3))), dtype=dtype)
    lengths, targets = counts[counts[:, 0] >= (0 if MASKS[name][1]["padding"] != "dead" else counts[:, 1])].unbind(1)
    for n in (7, 11):
        x = torch.randn(len(lengths), n, 12)
        values = []
        for call, given in ((run, x), (model, x), (double, x.double())):
            given = given.clone().requires_grad_()
            out = call(given, lengths, targets)
            values.append((out, *torch.autograd.grad(out.square().sum(), given)))
        for triple, m in zip(zip(*values, strict=True), (FORWARD, BACKWARD), strict=True):
            assert_within_budget(*triple, m)
    assert len(graphs) == 1, "another length compiled again"
    (call,) = graphs[0].graph.graph.find_nodes(op="call_function", target=ATTENTION)
    assert call.args[ATTN_MASK] is None, str(graphs[0].report)
    dense = MASKS[name][1]["padding"] == "dead"
    for argument, given in (("seq_lengths", dense), ("num_targets", not dense)):
        assert (call.args[3 + PARAMETERS.index(argument)] is not None) == given
