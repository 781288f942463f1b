"""Padding and unpadding by the indices of a model's own: the attention is jagged; nothing else is taken for it."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from bench.native_jagged import HSTUBlock
from hstu_compile import compiler
from hstu_compile.ops.hstu_attention import PARAMETERS
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.without_codegen import inductor_without_codegen

compiles = pytest.fixture(inductor_without_codegen)
ATTENTION = torch.ops.hstu_compile.hstu_attention.default
SEQ_OFFSETS = 3 + PARAMETERS.index("seq_offsets")


class Places:
    """Where the tokens are, in the terms that models use."""

    def __init__(self, offsets: Tensor, tokens: int, n: int) -> None:
        self.n, self.offsets, self.lengths = n, offsets, offsets.diff()
        self.batch = self.lengths.shape[0]
        self.sequence = torch.searchsorted(offsets, torch.arange(tokens), right=True) - 1
        self.within = torch.arange(tokens) - offsets[self.sequence]
        self.repeated = torch.repeat_interleave(torch.arange(self.batch), self.lengths, output_size=tokens)
        self.token = offsets[:-1, None] + torch.arange(n)
        self.real = torch.arange(n) < self.lengths[:, None]

    def found_anew(self) -> "Places":
        return Places(self.offsets, self.within.shape[0], self.n)

    def kept(self, t: Tensor) -> Tensor:
        return self.real.view(*self.real.shape, *[1] * (t.dim() - 2))


def gathered(t: Tensor, at: Places, by: int = 0) -> Tensor:
    return t[(at.token + by).clamp(max=t.shape[0] - 1)]


def put(t: Tensor, at: Places, fill: float) -> Tensor:
    padded = t.new_full((at.batch, at.n, *t.shape[1:]), fill)
    padded[at.sequence, at.within] = t
    return padded


Move = Callable[[Tensor, Places], Tensor]
PADDED: dict[str, Move] = {
    "times the mask": lambda t, at: gathered(t, at) * at.kept(gathered(t, at)),
    "where": lambda t, at: torch.where(at.kept(gathered(t, at)), gathered(t, at), 0.0),
    "masked fill": lambda t, at: gathered(t, at).masked_fill(~at.kept(gathered(t, at)), 0.0),
    "written in place": lambda t, at: put(t, at, 0.0),
    "index_put": lambda t, at: t.new_zeros(at.batch, at.n, *t.shape[1:]).index_put((at.repeated, at.within), t),
}
UNPADDED: dict[str, Move] = {
    "two indices": lambda t, at: t[at.sequence, at.within],
    "folded": lambda t, at: t.flatten(0, 1)[at.repeated * at.n + at.within],
    "index_select": lambda t, at: t.flatten(0, 1).index_select(0, at.sequence * at.n + at.within),
}
OTHERS: dict[str, tuple[Move, Move]] = {  # not a change of layout
    "one token on": (lambda t, at: gathered(t, at, 1) * at.kept(gathered(t, at)), UNPADDED["folded"]),
    "one token too many": (
        lambda t, at: gathered(t, at) * (torch.arange(at.n) <= at.lengths[:, None])[..., None, None],
        UNPADDED["folded"],
    ),
    "not kept": (gathered, UNPADDED["folded"]),
    "half of it": (lambda t, at: gathered(t, at) * (0.5 * at.kept(gathered(t, at))), UNPADDED["folded"]),
    "filled with ones": (lambda t, at: put(t, at, 1.0), UNPADDED["folded"]),
    "backwards": (
        lambda t, at: t.new_zeros(at.batch, at.n, *t.shape[1:]).index_put(
            (at.sequence, at.lengths[at.sequence] - 1 - at.within), t
        ),
        UNPADDED["folded"],
    ),
    "unpadded from the row before": (
        PADDED["where"],
        lambda t, at: t[at.sequence, (at.within - 1).clamp(min=0)],
    ),
    "unpadded from the sequence before": (PADDED["where"], lambda t, at: t[at.sequence - 1, at.within]),
}


def offsets_of(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


Batch = tuple[list[int], int]  # lengths, the longest
BATCHES: dict[str, tuple[Batch, ...]] = {
    "some sequences": (([4, 0, 7, 3], 9), ([3, 9, 2, 0, 8, 5], 10)),
    "one sequence": (([4], 9), ([10], 10), ([7], 12)),  # a size that Dynamo takes for fixed
}
of_any_batch = pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)


class Layer(nn.Module):
    def __init__(self, pad: Move, unpad: Move) -> None:
        super().__init__()
        self.pad, self.unpad, self.uvqk = pad, unpad, nn.Linear(12, 4 * 12)

    def forward(self, x: Tensor, offsets: Tensor, n: int) -> Tensor:
        at = Places(offsets, x.shape[0], n)
        u, v, q, k = F.silu(self.uvqk(x)).unflatten(-1, (4, 2, 6)).unbind(1)
        q, k, v = (self.pad(t, at) for t in (q, k, v))
        weights = F.silu(torch.einsum("bihd,bjhd->bhij", q, k)) / 20 * torch.ones(n, n).tril()
        return u * self.unpad(torch.einsum("bhij,bjhd->bihd", weights, v), at)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[compiler.Rewritten]:
    """What the passes make of every graph from here on."""
    graphs, rewrite = [], compiler.rewrite

    def watch(*args):
        graphs.append(rewrite(*args))
        return graphs[-1]

    monkeypatch.setattr(compiler, "rewrite", watch)
    torch._dynamo.reset()
    return graphs


def assert_same_numbers(run: Callable[..., Tensor], model: nn.Module, x: Tensor, *others: Tensor | int) -> None:
    values = []
    for call, given in ((run, x), (model, x), (copy.deepcopy(model).double(), x.double())):
        given = given.detach().requires_grad_()
        out = call(given, *others)
        values.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for triple, m in zip(zip(*values, strict=True), (FORWARD, BACKWARD), strict=True):
        assert_within_budget(*triple, m)


def check(
    layer: tuple[Move, Move],
    monkeypatch: pytest.MonkeyPatch,
    batches: tuple[Batch, ...],
    made: type = Layer,
    dynamic: bool = True,
) -> list[torch.fx.Node]:
    """Numbers in budget, on one graph for all sizes; returns the calls of the attention in it."""
    graphs, model = watched(monkeypatch), made(*layer)
    options = {"enable": ("attention",)}
    run = torch.compile(model, backend=hstu_compile.backend, options=options, dynamic=dynamic, fullgraph=True)
    for lengths, n in batches:
        assert_same_numbers(run, model, torch.randn(sum(lengths), 12), offsets_of(lengths), n)
    assert len(graphs) == 1, "another size compiled again"
    assert graphs[0].graph is not None, str(graphs[0].report)
    return list(graphs[0].graph.graph.find_nodes(op="call_function", target=ATTENTION))


@of_any_batch
@pytest.mark.parametrize("pad, unpad", list(itertools.product(PADDED, UNPADDED)))
def test_the_attention_is_jagged(pad: str, unpad: str, batches, monkeypatch: pytest.MonkeyPatch, compiles) -> None:
    (call,) = check((PADDED[pad], UNPADDED[unpad]), monkeypatch, batches)
    assert call.args[SEQ_OFFSETS] is not None
    assert call.args[0].meta["val"].dim() == 3, "q is padded"


def test_many_tokens_in_a_graph_of_fixed_sizes(monkeypatch: pytest.MonkeyPatch, compiles) -> None:
    (call,) = check((PADDED["index_put"], UNPADDED["folded"]), monkeypatch, (([128] * 96, 128),), dynamic=False)
    assert call.args[SEQ_OFFSETS] is not None


@of_any_batch
@pytest.mark.parametrize("name", OTHERS)
def test_near_misses_stay_dense(name: str, batches, monkeypatch: pytest.MonkeyPatch, compiles) -> None:
    (call,) = check(OTHERS[name], monkeypatch, batches)
    same = name == "unpadded from the sequence before" and batches is BATCHES["one sequence"]  # which is itself
    assert (call.args[SEQ_OFFSETS] is not None) == same


class ScaledRows(Layer):
    """The rows' own factor is padded, and the places to read are known only after the attention."""

    def forward(self, x: Tensor, offsets: Tensor, n: int) -> Tensor:
        at = Places(offsets, x.shape[0], n)
        q, k, v = (self.pad(t, at) for t in F.silu(self.uvqk(x)).unflatten(-1, (4, 2, 6)).unbind(1)[1:])
        factor = (torch.arange(n) + at.lengths[:, None]).to(x.dtype).rsqrt()
        weights = (
            F.silu(torch.einsum("bihd,bjhd->bhij", q, k)) / 20 * torch.ones(n, n).tril() * factor[:, None, :, None]
        )
        return self.unpad(torch.einsum("bhij,bjhd->bihd", weights, v), at.found_anew())


@of_any_batch
@pytest.mark.parametrize("unpad", UNPADDED)
def test_a_factor_of_the_rows(unpad: str, batches, monkeypatch: pytest.MonkeyPatch, compiles) -> None:
    (call,) = check((PADDED["where"], UNPADDED[unpad]), monkeypatch, batches, ScaledRows)
    assert call.args[SEQ_OFFSETS] is not None


ONE, MANY, OTHERS_MANY = [7], [4, 3, 9, 6, 3, 8, 5, 4], [5, 3, 9, 4]


@pytest.mark.parametrize("marked", [(), (1, 2)], ids=["", "sequences marked dynamic"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("first", [ONE, MANY], ids=["one sequence first", "many first"])
def test_batches_of_one_and_of_many_after_each_other(
    first: list[int], dynamic: bool | None, marked: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, compiles
) -> None:
    """An unmodified block is jagged in whatever graphs Dynamo makes of it."""
    graphs, model = watched(monkeypatch), HSTUBlock(1, 16, 2, 8, 20)
    call = torch.compile(model, backend=hstu_compile.backend, dynamic=dynamic, fullgraph=True)

    def run(*arguments) -> Tensor:
        for k in marked if len(arguments[2]) > 1 else ():  # a size of 1 is fixed
            torch._dynamo.mark_dynamic(arguments[k], 0)
        return call(*arguments)

    second = MANY if first is ONE else ONE
    for lengths in (first, second, [n - 1 for n in first], OTHERS_MANY, [n + 1 for n in second]):
        x, num_targets = torch.randn(sum(lengths), 16), torch.arange(len(lengths)) % 3
        assert_same_numbers(run, model, x, offsets_of(lengths), num_targets, max(lengths))
    assert 2 <= len(graphs) <= 4
    for graph in graphs:
        assert "; jagged;" in graph.report.fused("attention")[0].what, str(graph.report)
