"""Only the rows that are read behind the last attention: the same numbers and gradients, and what is left alone."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import hstu_compile
import tests.fbgemm_stand_ins  # noqa: F401
from bench.native_layer import HSTUStack
from hstu_compile.ops import hstu_attention
from hstu_compile.passes import NAMES, apply
from hstu_compile.passes.graph import is_floating, same, shape
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.tracing import traced
from tests.without_codegen import Compiled, inductor_without_codegen

aten = torch.ops.aten
WIDTH, HEADS, N = 16, 2, 7
DRAWS = 6
OFFSETS = torch.tensor([0, 7, 7, 10, 16])
ROWS = torch.tensor([15, 2, 9, 2, 0])
Read = Callable[["Stack", Tensor, Tensor, Tensor], Any]


class Layer(nn.Module):
    """Jagged [T, E] or dense [B, N, E]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.uvqk = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH)
        self.out_norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, offsets: Tensor, longest: int = N) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(self.norm(x))).chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, v))
        jagged = {"seq_offsets": offsets} if x.dim() == 2 else {}
        a = hstu_attention(q, k, v, max_seq_len=longest, alpha=0.5, scaling_seq_len=N, **jagged).flatten(-2)
        return x + self.out(self.out_norm(a) * u)


class Stack(nn.Module):
    """Two layers, and what `read` makes of their output."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.read = read

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, offsets)
        return self.read(self, x, offsets, rows)

    def scores(self, x: Tensor) -> Tensor:
        return self.head(F.normalize(self.norm(x), dim=-1))


def padded(y: Tensor, offsets: Tensor) -> Tensor:
    if y.dtype == torch.float64:  # which fbgemm has not
        cells = offsets[:-1, None] + torch.arange(N)
        return torch.cat([y, y.new_full((1, WIDTH), 0.5)])[torch.where(cells < offsets[1:, None], cells, len(y))]
    return torch.ops.fbgemm.jagged_to_padded_dense(y, [offsets], [N], 0.5)


JAGGED: dict[str, Read] = {
    "index, with rows twice": lambda m, y, o, rows: y[rows],
    "index_select": lambda m, y, o, rows: m.scores(y.index_select(0, rows)),
    "of the head": lambda m, y, o, rows: m.scores(y)[rows],
    "of numbers": lambda m, y, o, rows: m.scores(y)[:, 0][rows[:4].view(2, 2)],
    "from the end": lambda m, y, o, rows: y[rows - 16],
    "last of each": lambda m, y, o, rows: m.scores(y)[o[1:] - 1],
    "slice": lambda m, y, o, rows: m.scores(y)[-5:],
    "every third": lambda m, y, o, rows: y[1::3],
    "one": lambda m, y, o, rows: m.scores(y)[3],
    "prefix": lambda m, y, o, rows: y[:6],
    "narrow": lambda m, y, o, rows: torch.narrow(y, 0, 2, 3),
    "mask": lambda m, y, o, rows: m.scores(y)[torch.arange(y.shape[0]) % 3 == 1],
    "padded, last cell": lambda m, y, o, rows: m.scores(padded(y, o))[:, -1],
    "padded, cells": lambda m, y, o, rows: padded(y, o)[torch.tensor([0, 1, 3]), torch.tensor([6, 0, 2])],
    "two reads": lambda m, y, o, rows: (m.scores(y)[rows], y[o[1:] - 1]),
    "the same rows of two values": lambda m, y, o, rows: y[rows] @ m.norm(y)[rows].T,
    "a read of a read": lambda m, y, o, rows: m.scores(m.scores(y)[rows] @ m.head.weight)[1:],
    "read of a view": lambda m, y, o, rows: y.unflatten(-1, (2, -1)).transpose(1, 2)[rows],
    "detached": lambda m, y, o, rows: (m.scores(y.detach())[rows] + y[rows][:, :3].detach(), m.scores(y)[rows]),
    "in a wider dtype": lambda m, y, o, rows: (m.scores(y)[:, 0] * torch.ones(1, dtype=torch.float64))[rows],
    "idle dropout": lambda m, y, o, rows: m.scores(F.dropout(y, 0.5, training=False))[rows],
    "a read by a read": lambda m, y, o, rows: m.scores(y)[m.scores(y)[rows].argmax(0)],
    "sizes": lambda m, y, o, rows: y[rows] / y.shape[0],
}
DENSE: dict[str, Read] = {
    "last": lambda m, y, o, rows: m.scores(y)[:, -3:],
    "last of one": lambda m, y, o, rows: m.scores(y)[:, -1],
    "columns": lambda m, y, o, rows: m.scores(y)[:, rows[1:4] % N],
    "cells": lambda m, y, o, rows: m.scores(y)[torch.arange(3), rows[:3] % N],
    "gather": lambda m, y, o, rows: y.gather(1, (rows[:3, None] % N).unsqueeze(-1).expand(-1, -1, WIDTH)),
    "gather of numbers": lambda m, y, o, rows: m.scores(y)[..., 1].gather(1, rows[:3, None] % N),
    "split": lambda m, y, o, rows: m.scores(y).split([N - 2, 2], dim=1)[1],
    "every second": lambda m, y, o, rows: y[:, ::2],
    "mask of cells": lambda m, y, o, rows: m.scores(y)[torch.arange(N) > rows[:3, None] % N],
    "sequences": lambda m, y, o, rows: m.scores(y)[1:],
    "flattened": lambda m, y, o, rows: m.scores(y.reshape(-1, WIDTH))[rows],
    "flattened at the end": lambda m, y, o, rows: m.scores(y).flatten(0, 1)[rows],
}
CASES = [("jagged", name) for name in JAGGED] + [("dense", name) for name in DENSE]


def inputs(layout: str) -> list[Tensor]:
    x = torch.randn(int(OFFSETS[-1]), WIDTH) if layout == "jagged" else torch.randn(3, N, WIDTH)
    return [x, OFFSETS, ROWS]


def rewritten(
    model: nn.Module, args: list[Tensor], names: tuple[str, ...] = ("candidates",)
) -> tuple[fx.GraphModule, Report]:
    """The graph of (*parameters, *args)."""
    parameters = dict(model.named_parameters())

    def call(*values: Tensor) -> Any:
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=False)), values[len(parameters) :])

    gm, report = traced(call, args, fixed=[p.detach() for p in parameters.values()]), Report()
    apply(gm, report, names)
    return gm, report


def outputs_and_gradients(call: Callable, model: nn.Module, args: list[Tensor]) -> list[Tensor]:
    """Of x and every parameter, by a loss in which no two elements have the same weight."""
    leaves = [args[0].detach().requires_grad_(), *model.parameters()]
    results = torch.utils._pytree.tree_leaves(call(leaves[0], *args[1:]))
    loss = sum((r * torch.linspace(0.5, 2, r.numel()).to(r).view(r.shape)).square().sum() for r in results)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*results, *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads, strict=True))]


def assert_as_good_as_eager(gm: fx.GraphModule, model: nn.Module, args: list[Tensor]) -> None:
    """The maximum over draws of x: of few numbers eager may happen to get all right."""
    exact_model = type(model)(model.read).double()  # type: ignore[call-arg]
    exact_model.load_state_dict(model.state_dict())
    x, *others = args
    draws = []
    for _ in range(DRAWS):
        ours = outputs_and_gradients(lambda *a: gm(*model.parameters(), *a), model, [x, *others])
        eager = outputs_and_gradients(model, model, [x, *others])
        exact = outputs_and_gradients(exact_model, exact_model, [x.double(), *others])
        draws.append(zip(ours, eager, exact, strict=True))
        x = torch.randn_like(x)
    count = len(eager) - 1 - len(list(model.parameters()))
    for i, triples in enumerate(zip(*draws, strict=True)):
        ours, eager, exact = ([t.flatten() for t in same] for same in zip(*triples, strict=True))
        assert_within_budget(*map(torch.cat, (ours, eager, exact)), FORWARD if i < count else BACKWARD, f"value {i}")


def whole_projections(gm: fx.GraphModule) -> int:
    """How many there are of all rows."""
    linears = gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    tokens = [n for n in gm.graph.nodes if n.target is torch.ops.hstu_compile.hstu_attention.default][0].meta["val"]
    return sum(same(math.prod(n.meta["val"].shape[:-1]), math.prod(tokens.shape[:-2])) for n in linears)


@pytest.mark.parametrize("layout, name", CASES)
def test_only_rows_that_are_read(layout: str, name: str) -> None:
    torch.manual_seed(0)
    model, args = Stack({"jagged": JAGGED, "dense": DENSE}[layout][name]), inputs(layout)
    gm, report = rewritten(model, args)
    assert report.fused("candidates") and not report.missed(), str(report)
    assert whole_projections(gm) == 3  # u, v, q, k of two layers, and the output of the first
    picked = [n for n in gm.graph.find_nodes(op="call_function", target=aten.index.Tensor) if is_floating(n)]
    assert not any(same(shape(n)[-1], 4 * WIDTH) for n in picked)  # of u alone
    assert_as_good_as_eager(gm, model, args)
    again = Report()
    assert apply(gm, again, ("candidates",)) == 0
    if layout == "jagged" and name in ("of the head", "last of each", "two reads"):
        others = [torch.randn(9, WIDTH), torch.tensor([0, 4, 9]), torch.tensor([3, 3, 8, 0, 1])]
        assert_as_good_as_eager(gm, model, others)
        assert_as_good_as_eager(gm, model, [*others[:2], torch.zeros(0, dtype=torch.int64)])


@pytest.mark.parametrize("name", ["padded, last cell", "of the head", "prefix"])
def test_no_tokens(name: str) -> None:
    model = Stack(JAGGED[name])
    args = [torch.zeros(0, WIDTH), torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)]
    assert_as_good_as_eager(rewritten(model, args)[0], model, args)


def in_place(m: Stack, y: Tensor, o: Tensor, rows: Tensor) -> Tensor:
    z = m.scores(y)
    z[0].mul_(2)
    return z[rows]


def with_gradients_off(m: Stack, y: Tensor, o: Tensor, rows: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.scores(y)
    return z[rows] + y[rows][:, :3]


def many_rows(m: Stack, y: Tensor, o: Tensor, rows: Tensor) -> Tensor:
    return m.scores(y)[torch.arange(40) % 16]


def dropped(m: Stack, y: Tensor, o: Tensor, rows: Tensor) -> Tensor:
    return F.dropout(y, 0.5)[rows]


NEAR_MISSES: dict[str, tuple[Read, str]] = {
    "nothing reads rows": (lambda m, y, o, rows: m.scores(y), "no call behind it reads some rows"),
    "mean over tokens": (lambda m, y, o, rows: (y - y.mean(0))[rows], "mean reads all rows"),
    "norm over tokens": (
        lambda m, y, o, rows: F.layer_norm(y.T, y.shape[:1]).T[rows],
        "numpy_T is not known to work row by row",
    ),
    "an auxiliary loss": (lambda m, y, o, rows: (y[rows], y.square().mean()), "square reads all rows"),
    "returned whole": (lambda m, y, o, rows: (y[rows], y), "output reads all rows"),
    "cumulative": (lambda m, y, o, rows: y.cumsum(0)[rows], "cumsum works along dimension 0"),
    "dropout": (dropped, "dropout draws random numbers for all rows"),
    "in place": (in_place, "written in place by mul_"),
    "grad mode": (with_gradients_off, "grad mode changes"),
    "all rows": (many_rows, "40 rows are read of 16"),
    "features": (lambda m, y, o, rows: y[:, 3:], "no call behind it reads some rows"),
    "neighbours": (lambda m, y, o, rows: (y + y.flip(0))[rows], "flip is not known to work row by row"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_what_is_left_alone(name: str) -> None:
    read, reason = NEAR_MISSES[name]
    args = inputs("jagged")
    gm, report = rewritten(Stack(read), args)
    (region,) = report.missed("candidates")
    assert reason in str(region.reason), region.reason
    assert not report.fused() and whole_projections(gm) >= 4
    assert len(gm.graph.nodes) == len(rewritten(Stack(read), args, names=())[0].graph.nodes)


class Ranking(nn.Module):
    """Padded sequences, of which the last four tokens are candidates."""

    def __init__(self, dropout: float = 0.0, layers: int = 2, head_dim: int = WIDTH // HEADS) -> None:
        super().__init__()
        width = HEADS * head_dim
        self.stack = HSTUStack(layers, width, HEADS, head_dim, dropout)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.norm(self.stack(x, lengths)))[:, -4:].squeeze(-1)


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    yield from inductor_without_codegen(monkeypatch)


def compiled(model: Callable, on: bool = True, dynamic: bool = True) -> Callable:
    torch._dynamo.reset()
    options = {"last_layer_candidates_only": on}
    return torch.compile(model, backend=hstu_compile.backend, options=options, dynamic=dynamic)


def linears(graph: fx.GraphModule) -> list[tuple[Any, ...]]:
    return [tuple(n.meta["val"].shape) for n in graph.graph.find_nodes(op="call_function", target=aten.linear.default)]


@pytest.mark.parametrize("autocast", [False, True])
def test_through_torch_compile(inductor: Compiled, autocast: bool) -> None:
    """Other batch sizes and lengths need no other graph."""
    torch.manual_seed(0)
    model, exact_model = Ranking(), Ranking().double()
    exact_model.load_state_dict(model.state_dict())
    run = compiled(model)
    seen = set()
    for batch, longest in ((6, 9), (5, 12), (9, 7)):  # 16 rows or fewer are another case to Inductor's product on a CPU
        x, lengths = torch.randn(batch, longest, WIDTH), torch.randint(1, longest + 1, (batch,))
        exact = outputs_and_gradients(exact_model, exact_model, [x.double(), lengths])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = (outputs_and_gradients(call, model, [x, lengths]) for call in (run, model))
        for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
            assert_within_budget(*triple, BACKWARD if i else FORWARD, f"value {i}")
        seen.add(len(inductor.graphs))
    assert len(seen) == 1 and [len(shape) for shape in linears(inductor.graphs[-1])] == [3, 3, 3, 2, 2]


def test_off_by_default(inductor: Compiled) -> None:
    x, lengths, model = torch.randn(3, 9, WIDTH), torch.tensor([9, 4, 7]), Ranking()
    off = compiled(model, on=False)(x, lengths)
    assert [len(shape) for shape in linears(inductor.graphs[-1])] == [3] * 5
    for dynamic in (True, False):
        on = compiled(model, dynamic=dynamic)(x, lengths)
        assert [len(shape) for shape in linears(inductor.graphs[-1])] == [3, 3, 3, 2, 2]
        torch.testing.assert_close(on, off)


def test_dropout_is_that_of_all_rows(inductor: Compiled) -> None:
    """The same elements are dropped as without the option: by ours, with its seed, and by torch's own."""
    x, lengths, model = torch.randn(3, 9, WIDTH), torch.tensor([9, 4, 7]), Ranking(dropout=0.5, layers=1)
    for ours in (True, False):
        with torch._inductor.config.patch(fallback_random=not ours):
            results = []
            for on in (True, False):
                run = compiled(model, on)
                torch.manual_seed(1)
                results.append(outputs_and_gradients(run, model, [x, lengths]))
                assert len(linears(inductor.graphs[-1])[-2]) == (2 if on else 3)
                assert torch.ops.hstu_compile.gated_silu_attention.default in inductor.targets[-1] or not ours
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_region(inductor: Compiled, inside: bool) -> None:
    """Where the rows are read in another mode than the layer is in, all are computed."""
    model = Ranking()

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = model.head(model.norm(model.stack(x, lengths)))
            if inside:
                y = y[:, -4:]
        return y if inside else y[:, -4:]

    x, lengths = torch.randn(6, 9, WIDTH), torch.randint(1, 10, (6,))
    ours, eager = (outputs_and_gradients(run, model, [x, lengths]) for run in (compiled(call), call))
    exact_model = Ranking().double()
    exact_model.load_state_dict(model.state_dict())
    exact = outputs_and_gradients(lambda *a: exact_model(*a).unsqueeze(-1), exact_model, [x.double(), lengths])
    for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_budget(*triple, BACKWARD if i else FORWARD, f"value {i}")
    assert len(linears(inductor.graphs[-1])[-1]) == (2 if inside else 3)


def test_mask_through_torch_compile(inductor: Compiled) -> None:
    model = Ranking()

    def call(x: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        return model.head(model.norm(model.stack(x, lengths)))[mask]

    run = compiled(call)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for part in (0.3, 0.8, 0.0):
            args = [torch.randn(3, 9, WIDTH), torch.tensor([9, 4, 7]), torch.rand(3, 9) < part]
            for a, b in zip(*(outputs_and_gradients(f, model, args) for f in (run, call)), strict=True):
                torch.testing.assert_close(a, b)
    assert [len(shape) for shape in linears(inductor.graphs[-1])] == [3, 3, 3, 2, 2]


def test_checkpointed_layer(inductor: Compiled) -> None:
    model = Ranking()

    def call(x: Tensor, lengths: Tensor) -> Tensor:
        y = checkpoint(model.stack, x, lengths, use_reentrant=False)
        return model.head(y)[:, -4:]

    x, lengths = torch.randn(6, 9, WIDTH), torch.randint(1, 10, (6,))
    for a, b in zip(*(outputs_and_gradients(f, model, [x, lengths]) for f in (compiled(call), call)), strict=True):
        torch.testing.assert_close(a, b)
    assert [len(shape) for shape in linears(inductor.graphs[-1])] == [3, 3, 3, 2, 2]


LONG = 300


class LongStack(Stack):
    """Sequences of several blocks."""

    def forward(self, x: Tensor, offsets: Tensor, rows: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x, offsets, LONG)
        return self.read(self, x, offsets, rows)


UNREAD: dict[str, tuple[str, Read, int]] = {
    "last of each": ("jagged", lambda m, y, o, rows: m.scores(y)[o[1:] - 1], 3),
    "rows": ("jagged", lambda m, y, o, rows: m.scores(y)[rows], 4),
    "two reads": ("jagged", lambda m, y, o, rows: (m.scores(y)[rows], y[:5]), 4),
    "mask": ("jagged", lambda m, y, o, rows: m.scores(y)[torch.arange(y.shape[0]) < 3], 1),
    "slice": ("dense", lambda m, y, o, rows: m.scores(y)[:, -20:], 2),
    "one": ("dense", lambda m, y, o, rows: m.scores(y)[:, 5], 2),
    "cells": (
        "dense",
        lambda m, y, o, rows: m.scores(y)[torch.arange(2)[:, None], rows[:2, None] % LONG + torch.arange(4)],
        2,
    ),
    "flattened": ("dense", lambda m, y, o, rows: m.scores(y).flatten(0, 1)[rows], 4),
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_that_nobody_reads(name: str, gated: bool) -> None:
    """live: how many blocks are computed of eight or six."""
    layout, read, live = UNREAD[name]
    torch.manual_seed(0)
    model, dtype = LongStack(read), torch.int32 if gated else torch.int64
    offsets = torch.tensor([0, 300, 300, 420, 500], dtype=dtype)
    x = torch.randn(500, WIDTH) if layout == "jagged" else torch.randn(2, LONG, WIDTH)
    args = [x, offsets, torch.tensor([499, 2, 310, 140, 2])]
    gm, report = rewritten(model, args, (*NAMES, "candidates") if gated else ("candidates",))
    assert any("blocks of 128" in region.what for region in report.fused("candidates"))
    assert_as_good_as_eager(gm, model, args)
    states = [n for n in gm.graph.nodes if n.target is torch.ops.hstu_compile.mask_tile_states.default]
    seen: list[Tensor] = []

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            seen.extend([result] * (n in states))
            return result

    Watch(gm).run(*model.parameters(), *args)
    (found,) = seen
    rows = found[:, 0].amax(-1)  # of tiles of 32
    assert set(found.unique().tolist()) <= {0, 2} and int(rows[:, ::4].ne(0).sum()) == live


def test_blocks_through_torch_compile(inductor: Compiled) -> None:
    """Of any number of blocks, with dropout in the gate: the same numbers as where all are computed."""
    model, results = Ranking(dropout=0.5, layers=1), []
    with torch._inductor.config.patch(fallback_random=False):
        for on in (True, False):
            run, graphs = compiled(model, on), set()
            for batch, longest in ((6, 300), (5, 140)):
                torch.manual_seed(batch)
                args = [torch.randn(batch, longest, WIDTH), torch.randint(1, longest + 1, (batch,))]
                results.append(outputs_and_gradients(run, model, args))
                graphs.add(len(inductor.graphs))
            assert len(graphs) == 1
            found = inductor.graphs[-1].graph.find_nodes(
                op="call_function", target=torch.ops.hstu_compile.mask_tile_states.default
            )
            assert len(list(found)) == on
    for a, b in zip(results[0] + results[1], results[2] + results[3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("head_dim", [32, 128])
def test_blocks_on_the_gpu(head_dim: int) -> None:
    """Through Inductor and the kernels, which skip tiles by a mask whose columns are one cell in memory."""
    torch.manual_seed(0)
    width = HEADS * head_dim
    eager = Ranking(head_dim=head_dim).to("cuda", torch.bfloat16)
    exact = copy.deepcopy(eager).double()
    for batch, longest in ((6, 300), (3, 700)):
        x, lengths = torch.randn(batch, longest, width), torch.randint(longest // 2, longest + 1, (batch,))
        args = [x.to("cuda", torch.bfloat16), lengths.cuda()]
        ours = outputs_and_gradients(compiled(eager), eager, args)
        theirs = outputs_and_gradients(eager, eager, args)
        right = outputs_and_gradients(exact, exact, [args[0].double(), args[1]])
        for i, triple in enumerate(zip(ours, theirs, right, strict=True)):
            assert_within_budget(*triple, FORWARD if i == 0 else BACKWARD, f"value {i}")
