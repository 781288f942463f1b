"""`recompute_budget`: what is held for the backward fits, with the same bits, and no attention runs twice."""

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._subclasses.fake_tensor import is_fake
from torch.utils.checkpoint import checkpoint

import hstu_compile
from bench.native_layer import HSTUStack
from hstu_compile.ops import hstu_attention
from hstu_compile.options import Options
from hstu_compile.passes import uvqk
from hstu_compile.passes.recompute import FLOPS_PER_BYTE, ROLES, cached_apart, candidate, recompute
from hstu_compile.passes.recompute_budget import WithinBudget
from hstu_compile.passes.report import Recomputed, Report
from tests.models import MODELS
from tests.tracing import traced
from tests.without_codegen import Compiled, inductor_without_codegen

LAYERS = 2
E, H, D = 24, 2, 8
LENGTHS = torch.tensor([10, 4, 7])


def native() -> nn.Module:
    return HSTUStack(LAYERS, E, H, D, dropout_ratio=0.2)


def padded(seq_len: int = 10) -> tuple[Tensor, ...]:
    return torch.randn(3, seq_len, E, generator=torch.Generator().manual_seed(0)), LENGTHS


FREED = {"input_layernorm": E, "uvqk_projection": 4 * H * D, "input_silu": 3 * H * D}  # numbers a token, of a layer


@dataclass
class Step:
    held: int  # bytes of the tensors saved for the backward, but for parameters and the input
    calls: list[str]  # of ops of ours, forward then backward
    products: int  # of the backward
    values: list[Tensor]  # the output and every gradient
    warned: list[str]


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield from inductor_without_codegen(monkeypatch)


def held_by(run: Callable[[], Any], given: list[Any]) -> tuple[Tensor, int]:
    """The (first) output, and the bytes of the memory behind what autograd saves of it, each piece once."""
    ours = {t.untyped_storage().data_ptr() for t in given if isinstance(t, Tensor)}
    storages = {}

    def pack(t: Tensor) -> Tensor:
        if not is_fake(t) and (key := t.untyped_storage().data_ptr()) not in ours:
            storages[key] = t.untyped_storage().nbytes(), t  # alive, so that no other gets its address
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return out[0] if isinstance(out, tuple) else out, sum(size for size, _ in storages.values())


def step(inductor: Compiled, make: Callable[[], nn.Module], arguments: tuple, **options: Any) -> Step:
    torch._dynamo.reset()
    inductor.aot_graphs.clear()
    torch.manual_seed(0)
    model = make()
    x, *others = arguments
    x = x.clone().requires_grad_()
    compiled = torch.compile(model, backend=hstu_compile.backend, options={"strict": True, **options})
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out, held = held_by(lambda: compiled(x, *others), [x, *model.parameters(), *others])
    out.square().sum().backward()
    forward, backward = inductor.aot_graphs
    nodes = [*forward.graph.nodes, *backward.graph.nodes]
    calls = [str(n.target) for n in nodes if str(n.target).startswith("hstu_compile.")]
    products = sum(n.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) for n in backward.graph.nodes)
    warned = [str(w.message) for w in caught if "recompute_budget" in str(w.message)]
    return Step(held, calls, products, [out.detach(), x.grad, *(p.grad for p in model.parameters())], warned)


def assert_same_bits_and_calls(ours: Step, plain: Step) -> None:
    assert sorted(ours.calls) == sorted(plain.calls)
    assert all(torch.equal(a, b) for a, b in zip(ours.values, plain.values, strict=True))


@pytest.fixture
def plain(inductor: Compiled) -> Step:
    return step(inductor, native, padded())


def test_what_is_held_fits(plain: Step, inductor: Compiled) -> None:
    assert sum("hstu_attention_forward" in call for call in plain.calls) == LAYERS
    assert not plain.warned
    freed, products = 0, []
    for share in (1.0, 0.8, 0.6, 0.45):
        ours = step(inductor, native, padded(), recompute_budget=share)
        assert ours.held <= share * plain.held and not ours.warned
        assert_same_bits_and_calls(ours, plain)
        assert plain.held - ours.held >= freed
        freed = plain.held - ours.held
        products.append(ours.products - plain.products)
    assert freed > 0 and products[0] == 0 < products[-1]
    in_bytes = step(inductor, native, padded(), recompute_budget=int(0.45 * plain.held))
    assert in_bytes.held == ours.held and in_bytes.calls == plain.calls


def test_as_much_as_there_is_and_not_more(plain: Step, inductor: Compiled) -> None:
    """A budget of exactly what is held changes nothing; a byte less does. Of what can't be met the least is named."""
    whole = step(inductor, native, padded(), recompute_budget=plain.held)
    assert whole.held == plain.held and not whole.warned
    less = step(inductor, native, padded(), recompute_budget=plain.held - 1)
    assert less.held < plain.held and not less.warned
    uvqk = step(inductor, native, padded(), recompute_uvqk=True)
    least = step(inductor, native, padded(), recompute_budget=2)
    statistics = plain.held - least.held - LAYERS * 30 * 4 * sum(FREED.values())  # of the norm: two numbers a token
    assert least.held == uvqk.held and 0 <= statistics <= LAYERS * 30 * 4 * 2
    (warning,) = least.warned
    for words in ("recompute_budget is 2", f"held for the backward is {least.held:,} bytes", f"{plain.held:,} bytes"):
        assert words in warning
    assert_same_bits_and_calls(least, plain)


@pytest.mark.parametrize("name", ["meta_stu", "research unbroken", "four linears"])
def test_other_layers(name: str, inductor: Compiled) -> None:
    """Jagged, with symbolic sizes or without; a projection that is only partly activated; four of them."""
    make, arguments = MODELS[name].model, MODELS[name].arguments(3)
    plain = step(inductor, make, arguments)
    for share in (0.8, 0.6):
        ours = step(inductor, make, arguments, recompute_budget=share)
        assert (ours.held <= share * plain.held) != bool(ours.warned)
        assert ours.held < plain.held
        assert_same_bits_and_calls(ours, plain)


def test_sizes_are_those_of_the_compilation(inductor: Compiled) -> None:
    """One graph for all token counts. A number of bytes is met at the first; at others, what is chosen stays."""
    case, model = MODELS["meta_stu"], MODELS["meta_stu"].model()

    def held(budget: int | None, batches: tuple[int, ...]) -> list[int]:
        torch._dynamo.reset()
        options = {"strict": True, "recompute_budget": budget}
        compiled = torch.compile(model, backend=hstu_compile.backend, options=options, dynamic=True)
        found: list[int] = []
        compiles = []
        for x, *others in map(case.arguments, batches):
            given = [x.requires_grad_(), *model.parameters(), *others]
            found.append(held_by(lambda x=x, others=others: compiled(x, *others), given)[1])
            compiles.append(len(inductor.graphs))
        assert len(set(compiles)) == 1
        return found

    short, long = held(None, (3, 9))
    less_long, less_short = held(long - 1, (9, 3))
    assert less_long < long and less_short < short


def jagged_layer(weight: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    u, v, q, k = F.silu(F.layer_norm(x, x.shape[1:]) @ weight).view(-1, 4, H, weight.size(1) // (4 * H)).unbind(1)
    return u * hstu_attention(q, k, v, seq_offsets=offsets, max_seq_len=10, alpha=1.0, scaling_seq_len=10.0)


def test_cache_keys_know_budget_and_sizes() -> None:
    """Of a symbolic size torch's keys hold the name alone, and of a partitioner what it says and how it is pickled."""

    def tag(tokens: int, roles: tuple[str, ...] = ROLES, *, choose: bool = False, known: bool = True) -> str:
        gm = traced(jagged_layer, [torch.randn(tokens, E), LENGTHS], fixed=[torch.randn(E, 4 * H * D)])
        assert not known or uvqk.run(gm, Report()) == 1
        recompute(gm, roles, Report(), choose=choose)
        with cached_apart(gm):
            return torch.compiler.config.cache_key_tag

    fixed, short = tag(10), tag(10, choose=True)
    assert len({fixed, tag(10, ()), short, tag(12, choose=True), tag(10, choose=True, known=False)}) == 5
    assert tag(12) == fixed and tag(10, choose=True) == short

    class Own(CustomPartitionerFn):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        def uuid(self) -> Any:
            return None

    one, same, other = WithinBudget(0.5), WithinBudget(0.5), WithinBudget(99)
    one.chosen.append(Recomputed("input_silu", 0, "m.py:3: y = F.silu(z)", 4, 4.0))
    assert one.uuid() == same.uuid() != other.uuid() is not None
    assert pickle.dumps(one) == pickle.dumps(same) != pickle.dumps(other)
    assert WithinBudget(0.5, Own()).uuid() is None  # not cached


@pytest.mark.parametrize("width, out, is_cheap", [(64, 64, True), (2048, 2048, False)])
def test_the_time_of_a_product_is_of_its_flops(width: int, out: int, is_cheap: bool) -> None:
    """Of a narrow one it is that of its operands on their way from memory."""
    T = 10_000
    gm = traced(jagged_layer, [torch.randn(T, width), LENGTHS], fixed=[torch.randn(width, out)])
    uvqk.run(gm, Report())
    recompute(gm, ROLES, Report(), choose=True)
    norm, projection, silu = ({c.role: c for n in gm.graph.nodes if (c := candidate(n))}[role] for role in ROLES)
    assert norm.cost == 2 * norm.frees == 2 * T * width * 4
    assert silu.cost == 2 * silu.frees == 2 * projection.frees == 2 * T * out * 4
    moved = (T * width + width * out + T * out) * 4
    assert projection.cost == (moved if is_cheap else 2 * T * width * out / FLOPS_PER_BYTE)


def test_own_partitioner_is_asked(inductor: Compiled) -> None:
    class Own(CustomPartitionerFn):
        calls = 0

        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> Any:
            return "own"

    own = Own()
    step(inductor, native, padded(), recompute_budget=1.0, custom_partitioner_fn=own)
    assert own.calls == 2  # asked for what is held, and then for the partition


class HalfCheckpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = HSTUStack(1, E, H, D, 0.0), HSTUStack(1, E, H, D, 0.0)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.second(checkpoint(self.first, x, lengths, use_reentrant=False), lengths)


def test_a_checkpointed_layer_stays_as_the_user_said(inductor: Compiled) -> None:
    plain = step(inductor, HalfCheckpointed, padded())
    ours = step(inductor, HalfCheckpointed, padded(), recompute_budget=0.6)
    assert ours.held <= 0.6 * plain.held
    assert_same_bits_and_calls(ours, plain)


def test_a_checkpointed_layer_frees_nothing() -> None:
    with pytest.warns(match=r"\(3 parts\)"):
        explanation = hstu_compile.explain(HalfCheckpointed(), *padded(), hstu_compile_options={"recompute_budget": 2})
    (report,) = explanation.reports
    assert [r.role for r in report.recomputed] == list(FREED) and len({r.layer for r in report.recomputed}) == 1
    both = hstu_compile.explain(HalfCheckpointed(), *padded(), hstu_compile_options={"recompute_input_silu": True})
    assert [r.layer for r in both.reports[0].recomputed] == [0, 1]


@pytest.mark.parametrize(
    "options, roles",
    [
        ({"recompute_input_layernorm": True}, {"input_layernorm"}),
        ({"recompute_input_silu": True}, {"input_silu"}),
        ({"recompute_uvqk": True}, set(FREED)),
        ({"recompute_budget": 2}, set(FREED)),
    ],
)
def test_explained(options: dict[str, Any], roles: set[str]) -> None:
    x, lengths = padded()
    model = native()
    with pytest.warns(match="recompute_budget") if "recompute_budget" in options else contextlib.nullcontext():
        explanation = hstu_compile.explain(model, x.requires_grad_(), lengths, hstu_compile_options=options)
    (report,) = explanation.reports
    assert [(r.layer, r.role) for r in report.recomputed] == [
        (k, role) for k in range(LAYERS) for role in FREED if role in roles
    ]
    assert all(r.frees == 30 * 4 * FREED[r.role] for r in report.recomputed)
    text = str(explanation)
    for role in roles:
        assert f"recomputed in the backward  {role} of layer 1: {30 * 4 * FREED[role]:,} bytes less held" in text
    assert "u, v, q, k = F.silu(self.uvqk(self.input_norm(x)))" in text


@pytest.mark.parametrize("budget", [0, -1, 1.5, 0.0, True, "half", float("nan"), float("inf")])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(ValueError, match=f"recompute_budget is {budget!r}, expected a share in"):
        Options(recompute_budget=budget)


def test_a_budget_and_a_fixed_choice() -> None:
    with pytest.raises(ValueError, match="recompute_budget.*without .*recompute_input_silu.*recompute_uvqk"):
        Options(recompute_budget=0.5, recompute_input_silu=True, recompute_uvqk=True)
    assert Options(recompute_budget=1).recompute_budget == 1
