"""gated_silu_attention: result and gradients against float64, and against silu, attention and gate one by one."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from test_silu_attention import (
    DEVICE,
    HIDDEN,
    LENGTHS,
    MASKS,
    ORDERS,
    H,
    W,
    attention,
    dense,
    input_of,
    jagged,
    places,
    slices,
)
from torch import Tensor

from hstu_compile.ops import gated_silu_attention, hstu_attention, norm_gate_dropout
from hstu_compile.ops.hstu_attention import PARAMETERS
from hstu_compile.ops.norm_gate_dropout_reference import GATED, keep_scale
from hstu_compile.ops.packed_slices import as_arguments

OP = torch.ops.hstu_compile.gated_silu_attention.default
OP_BACKWARD = torch.ops.hstu_compile.gated_silu_attention_backward.default
WU = H * HIDDEN


class Gate(NamedTuple):
    """What the gate is given."""

    named: dict[str, Any]
    weight: Tensor | None
    bias: Tensor | None
    seed: Tensor | None


def gate(affine: str = "both", ratio: float = 0.0, dtype: torch.dtype = torch.float32, **given: Any) -> Gate:
    groups = given.get("num_groups", 1)
    weight, bias = (torch.rand(WU // groups, device=DEVICE) + at for at in (0.5, -0.5))
    named = {
        "norm_eps": 1e-5,
        "num_groups": 1,
        "rms": False,
        "activation": "silu",
        "gate_first": False,
        "concat_u": False,
        "concat_activated": False,
    }
    named |= {"concat_x": False, "concat_norm": False, "dropout_ratio": ratio, "out_dtype": dtype, **given}
    seed = torch.tensor([7], device=DEVICE) if ratio else None
    return Gate(named, weight if affine != "none" else None, bias if affine == "both" else None, seed)


def fused(x: Tensor, order: str, call: dict[str, Any], gate: Gate) -> Tensor:
    _, q, k, v = slices(x, order)
    tensors = gate.weight, gate.bias, gate.seed
    return gated_silu_attention(x, q, k, v, *tensors, attention=call, slices=places(order), gate=gate.named)


def one_by_one(x: Tensor, order: str, call: dict[str, Any], gate: Gate, attend: Any, after: Any) -> Tensor:
    _, q, k, v = slices(x, order)
    a = attend(q, k, v, **{name: value for name, value in call.items() if name != "mask_tile_states"})
    u = places(order)["u"].of(x, H, HIDDEN).flatten(-2)
    a, u = (t.flatten(0, 1) for t in (a, u)) if x.dim() == 3 else (a, u)
    return after(a, u, gate.weight, gate.bias, seed=gate.seed, **gate.named)


def unfused(*given: Any) -> Tensor:
    return one_by_one(*given, hstu_attention, norm_gate_dropout)


def eager(x: Tensor, order: str, call: dict[str, Any], gate: Gate) -> Tensor:
    """Each step rounded to the dtype of x, as PyTorch's own operators do."""

    def after(a: Tensor, u: Tensor, weight: Any, bias: Any, *, seed: Tensor | None, **named: Any) -> Tensor:
        groups = named["num_groups"]
        a = a.flatten(1).unflatten(1, (groups, -1))
        norm = F.layer_norm(a, a.shape[-1:], weight, bias, named["norm_eps"]).flatten(1)
        kept = keep_scale(seed, named["dropout_ratio"], len(a), GATED, groups, WU // groups, a.dtype)
        return norm * F.silu(u) * (kept.flatten(1) if isinstance(kept, Tensor) else kept)

    return one_by_one(x, order, call, gate, eager_attention, after)


def run(function: Any, x: Tensor, order: str, call: dict[str, Any], gate: Gate, dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    tensors = x, gate.weight, gate.bias, call["attn_bias"]
    leaves = [None if t is None else t.detach().to(x.dtype).requires_grad_() for t in tensors]
    named = {**gate.named, "out_dtype": x.dtype}
    y = function(leaves[0], order, {**call, "attn_bias": leaves[3]}, Gate(named, leaves[1], leaves[2], gate.seed))
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype))]


def check(x: Tensor, order: str, call: dict[str, Any], gate: Gate) -> None:
    dy = torch.randn(x.shape[:-1].numel(), WU, device=DEVICE).to(x.dtype)
    ours, theirs = run(fused, x, order, call, gate, dy), run(eager, x, order, call, gate, dy)
    exact = run(unfused, x.double(), order, call, gate, dy)
    names = "y", "dx", "dweight", "dbias", "dattn_bias"
    for name, *triple in zip(names, ours, theirs, exact, strict=False):
        assert_within_budget(*triple, FORWARD if name == "y" else BACKWARD, name)
    assert ours[1].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "strided"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ORDERS)
def test_jagged(order: str, mask: str, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(input_of(sum(LENGTHS), dtype, layout), order, jagged(**MASKS[mask]), gate())


@pytest.mark.parametrize("kind", ["full", "lengths", "mask tensor", "bias"])
def test_dense(kind: str) -> None:
    torch.manual_seed(1)
    check(input_of(33, torch.bfloat16, "dense"), "uvqk", dense(kind), gate())


@pytest.mark.parametrize(
    "given", [{"affine": "none"}, {"affine": "weight"}, {"num_groups": H}, {"ratio": 0.25}], ids=str
)
def test_gates(given: dict[str, Any]) -> None:
    torch.manual_seed(2)
    check(input_of(sum(LENGTHS), torch.bfloat16, "packed"), "uvqk", jagged(), gate(**given))


@pytest.mark.parametrize(
    "given",
    [{}, {"rms": True}, {"gate_first": True}, {"concat_x": True, "concat_norm": True},
     {"activation": "sigmoid", "concat_u": True}, {"ratio": 0.25, "concat_x": True},
     {"concat_u": True, "concat_activated": True}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("order", ORDERS)
def test_like_silu_attention_and_gate_one_by_one(order: str, given: dict[str, Any]) -> None:
    """In float64 to its last digits."""
    torch.manual_seed(3)
    x, call = torch.randn(sum(LENGTHS), W, device=DEVICE, dtype=torch.float64), jagged()
    given = gate(**given)
    pieces = 1 + sum(given.named[f"concat_{name}"] for name in ("u", "x", "norm"))
    dy = torch.randn(len(x), pieces * WU, device=DEVICE, dtype=torch.float64)
    for ours, theirs in zip(*(run(f, x, order, call, given, dy) for f in (fused, unfused)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_of_no_sequence_matter_to_u_alone() -> None:
    """Their columns of q, k and v are never read, and get 0; the gate reads those of u, beside an attention of 0."""
    torch.manual_seed(4)
    total = sum(LENGTHS)
    x, dy = torch.randn(total + 9, W, device=DEVICE), torch.randn(total + 9, WU, device=DEVICE)
    given, of_u = gate(), slice(0, WU)
    poisoned = x.clone()
    poisoned[total:, WU:] = float("nan")
    y, dx, *affine = run(fused, poisoned, "uvqk", jagged(), given, dy)
    want_y, want, *want_affine = run(unfused, x, "uvqk", jagged(), given, dy)
    assert (dx[total:, WU:] == 0).all()
    for ours, theirs in zip(
        (y, dx[:total], dx[:, of_u], *affine), (want_y, want[:total], want[:, of_u], *want_affine), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("total", [0, 1])
def test_nothing_or_one_token(total: int) -> None:
    offsets = torch.tensor([0, total], device=DEVICE)
    check(torch.randn(total, W, device=DEVICE), "uvqk", attention(seq_offsets=offsets, max_seq_len=4), gate())


def test_without_autograd() -> None:
    x, call, given = torch.randn(sum(LENGTHS), W, device=DEVICE), jagged(), gate()
    with torch.no_grad():
        torch.testing.assert_close(fused(x, "uvqk", call, given), unfused(x, "uvqk", call, given))


def op_arguments(x: Tensor, order: str, call: dict[str, Any], gate: Gate) -> tuple:
    _, *qkv = slices(x.detach(), order)
    given = (call[name] for name in PARAMETERS)
    return x, *qkv, *given, *as_arguments(places(order)), *gate[1:], *gate.named.values()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["packed", "strided"])
@pytest.mark.parametrize("order", ["uvqk", "/kqvu, silu of u"])
def test_opcheck(order: str, layout: str, mask: str) -> None:
    x, call = input_of(sum(LENGTHS), torch.float32, layout), jagged(**MASKS[mask])
    arguments = op_arguments(x.detach().requires_grad_(), order, call, gate())
    torch.library.opcheck(OP, arguments)
    a, dy = torch.randn(len(x), H, HIDDEN, device=DEVICE), torch.randn(len(x), WU, device=DEVICE)
    torch.library.opcheck(OP_BACKWARD, (dy, a, x.detach(), *arguments[1:], False))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attn_bias": torch.ones(1, 1, 32, 33)}, "shape of attn_bias"),
    ({"at": 1}, "u_at is 1, expected head 0 of u at column 0: u, q, k and v are all columns of x"),
    ({"num_groups": 3}, "num_groups is 3, expected a divisor of the row's width 64"),
    ({"x": torch.ones(sum(LENGTHS), W + 1)}, rf"shape of x is \({sum(LENGTHS)}, {W + 1}\), expected {W} columns"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    x, given = torch.randn(sum(LENGTHS), W, device=DEVICE), gate()
    _, q, k, v = slices(x, "uvqk")
    change = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in change.items()}

    slices_given = places("uvqk")
    slices_given["u"] = slices_given["u"]._replace(at=change.get("at", 0))

    def changed(named: dict[str, Any]) -> dict[str, Any]:
        return named | {name: value for name, value in change.items() if name in named}

    with pytest.raises((ValueError, RuntimeError), match=message):
        gated_silu_attention(
            change.get("x", x), q, k, v, *given[1:],
            attention=changed(jagged()), slices=slices_given, gate=changed(given.named),
        )  # fmt: skip
