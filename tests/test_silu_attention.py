"""silu_attention: the gradient of x against float64, and against silu, split and hstu_attention one by one."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from torch import Tensor

from hstu_compile.ops import hstu_attention, mask_tile_states, silu_attention
from hstu_compile.ops.hstu_attention import PARAMETERS
from hstu_compile.ops.packed_slices import PLACES, Slice, as_arguments
from hstu_compile.ops.silu_attention_reference import silu_attention_backward_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, ATTN, HIDDEN = 2, 16, 32
DIMS = {"u": HIDDEN, "v": HIDDEN, "q": ATTN, "k": ATTN}
W = H * sum(DIMS.values())
# The roles in the order of their columns, "/" where they stand so in each head; and those of silu(x).
ORDERS = {
    "uvqk": "uvqk",
    "qkvu": "uvqk",
    "kuqv": "uvqk",
    "uvqk, silu of u": "u",
    "vkqu, silu of uv": "uv",
    "qukv, silu of none": "",
    "/uvqk": "uvqk",
    "/kqvu, silu of u": "u",
    "u/qkv": "qk",
}
LENGTHS = [0, 1, 7, 33, 20, 0] * 4  # fewer tokens have a largest error that is more luck than accuracy
OP = torch.ops.hstu_compile.silu_attention.default
OP_BACKWARD = torch.ops.hstu_compile.silu_attention_backward.default


def places(order: str) -> dict[str, Slice]:
    apart, _, by_head = order.partition(",")[0].partition("/")
    found, end = {}, 0
    for name in apart:
        found[name] = Slice(end, DIMS[name], name in ORDERS[order])
        end += H * DIMS[name]
    stride = sum(DIMS[name] for name in by_head)
    for name in by_head:
        found[name] = Slice(end, stride, name in ORDERS[order])
        end += DIMS[name]
    return found


def slices(x: Tensor, order: str) -> list[Tensor]:
    """u, q, k, v of x or silu(x)."""
    activated, parts = F.silu(x), []
    for name in "uqkv":
        at, stride, silu = places(order)[name]
        heads = [(activated if silu else x)[..., at + i * stride :][..., : DIMS[name]] for i in range(H)]
        parts.append(torch.stack(heads, dim=-2))
    return parts


def attention(**given: Any) -> dict[str, Any]:
    defaults = {"alpha": 0.25, "scaling_seq_len": 33, "causal": True, "target_group_size": 1}
    zero = dict.fromkeys(("contextual_seq_len", "max_attn_len", "min_full_attn_seq_len"), 0)
    return {**dict.fromkeys(PARAMETERS), **zero, "targets_share_position": False, **defaults, **given}


def jagged(**given: Any) -> dict[str, Any]:
    offsets = F.pad(torch.tensor(LENGTHS, device=DEVICE).cumsum(0), (1, 0))
    return attention(seq_offsets=offsets, max_seq_len=33, **given)


def dense(kind: str) -> dict[str, Any]:
    call = attention(max_seq_len=33)
    if kind == "lengths":
        call["seq_lengths"] = torch.tensor([33, 0, 20], device=DEVICE)
    elif kind == "bias":
        call["attn_bias"] = torch.randn(1, 2, 33, 33, device=DEVICE)
    elif kind == "mask tensor":
        call["attn_mask"] = (torch.rand(3, 1, 33, 33, device=DEVICE) < 0.5).float()
        call["mask_tile_states"] = mask_tile_states(call["attn_mask"])
    return call


def input_of(total: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Of variance 1, and no value of which the whole largest error hangs."""
    shape = {"strided": (total, W + 24), "dense": (3, total, W), "packed": (total, W)}[layout]
    x = ((2 * torch.rand(shape, device=DEVICE) - 1) * math.sqrt(3)).to(dtype)
    return x[:, 8 : W + 8] if layout == "strided" else x


def fused(x: Tensor, order: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return silu_attention(x, *slices(x, order), attention=call, slices=places(order))


def unfused(x: Tensor, order: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    u, q, k, v = slices(x, order)
    return u, hstu_attention(q, k, v, **{name: x for name, x in call.items() if name != "mask_tile_states"})


def eager(x: Tensor, order: str, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
    u, q, k, v = slices(x, order)
    return u, eager_attention(q, k, v, **{name: x for name, x in call.items() if name != "mask_tile_states"})


def run(function, x: Tensor, order: str, call: dict[str, Any], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """u, the attention's output, the gradient of x and that of the bias, if there is one."""
    x = x.detach().requires_grad_()
    bias = call["attn_bias"]
    leaves = [x] if bias is None else [x, bias.to(x.dtype).requires_grad_()]
    outputs = function(x, order, call if bias is None else {**call, "attn_bias": leaves[1]})
    return *outputs, *torch.autograd.grad(outputs, leaves, [g.to(x.dtype) for g in upstream])


def upstream_of(x: Tensor) -> list[Tensor]:
    return [torch.randn(*x.shape[:-1], H, HIDDEN, device=DEVICE).to(x.dtype) for _ in range(2)]


def check(x: Tensor, order: str, call: dict[str, Any]) -> None:
    upstream = upstream_of(x)
    ours, theirs = run(fused, x, order, call, upstream), run(eager, x, order, call, upstream)
    exact = run(unfused, x.double(), order, call, upstream)
    names, budgets = ("u", "out", "dx", "dbias"), (FORWARD, FORWARD, BACKWARD, BACKWARD)
    for name, m, *triple in list(zip(names, budgets, ours, theirs, exact, strict=False)):
        assert_within_budget(*triple, m, name)
    assert ours[2].is_contiguous() and len(ours) == (3 if call["attn_bias"] is None else 4)


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "targets": {"num_targets": torch.tensor([0, 1, 2, 5, 3, 0] * 4, device=DEVICE), "max_attn_len": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["packed", "strided"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ORDERS)
def test_jagged(order: str, mask: str, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(input_of(sum(LENGTHS), dtype, layout), order, jagged(**MASKS[mask]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["full", "lengths", "mask tensor", "bias"])
def test_dense(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check(input_of(33, dtype, "dense"), "uvqk", dense(kind))


@pytest.mark.parametrize("order", ORDERS)
def test_like_silu_split_and_attention_one_by_one(order: str) -> None:
    """In float64 to its last digits: each way of a gradient alone, and both."""
    torch.manual_seed(2)
    x, call = torch.randn(sum(LENGTHS), W, device=DEVICE, dtype=torch.float64), jagged()
    du, dout = upstream_of(x)
    for upstream in ([du, dout], [du, 0 * dout], [0 * du, dout]):
        ours, theirs = (run(function, x, order, call, upstream) for function in (fused, unfused))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        torch.testing.assert_close(ours[2], theirs[2])


def test_only_one_of_the_results_is_used() -> None:
    x, call = torch.randn(sum(LENGTHS), W, device=DEVICE, dtype=torch.float64, requires_grad=True), jagged()
    for i in range(2):
        ours, theirs = (torch.autograd.grad(f(x, "uvqk", call)[i].sum(), x)[0] for f in (fused, unfused))
        torch.testing.assert_close(ours, theirs)


def test_rows_of_no_sequence_matter_to_u_alone() -> None:
    torch.manual_seed(3)
    total = sum(LENGTHS)
    x = torch.randn(total + 9, W, device=DEVICE)
    du, dout = upstream_of(x)
    of_u = slice(0, H * HIDDEN)
    poisoned = torch.full_like(x, float("nan"))
    poisoned[:total], poisoned[:, of_u] = x[:total], x[:, of_u]
    dout[total:] = float("nan")
    *_, dx = run(fused, poisoned, "uvqk", jagged(), [du, dout])
    *_, want = run(fused, x[:total], "uvqk", jagged(), [du[:total], dout[:total]])
    leaf = x[total:, of_u].clone().requires_grad_()
    (want_u,) = torch.autograd.grad(F.silu(leaf), leaf, du[total:].flatten(1))
    assert torch.equal(dx[:total], want)
    torch.testing.assert_close(dx[total:, of_u], want_u)
    dx[:, of_u] = 0
    assert (dx[total:] == 0).all()


@pytest.mark.parametrize("total", [0, 1])
def test_nothing_or_one_token(total: int) -> None:
    offsets = torch.tensor([0, total], device=DEVICE)
    check(torch.randn(total, W, device=DEVICE), "uvqk", attention(seq_offsets=offsets, max_seq_len=4))


def test_16_bits_are_rounded_once() -> None:
    torch.manual_seed(4)
    x = input_of(sum(LENGTHS), torch.bfloat16, "packed")
    u, q, k, v = slices(x, "uvqk")
    call = {name: value for name, value in jagged().items() if name not in ("mask_tile_states", "attn_bias")}
    du, dout = upstream_of(x)
    found = places("uvqk")

    def gradient(dtype: torch.dtype) -> Tensor:
        dx, given = torch.empty_like(x, dtype=dtype), [t.to(dtype) for t in (dout, q, k, v, du)]
        into = {n: (place.of(dx, H, DIMS[n]), place.of(x, H, DIMS[n]).to(dtype)) for n, place in found.items()}
        of_attention = [into[name] for name in "qkv"]
        of_u = given[4], into["u"]
        silu_attention_backward_reference(*given[:4], of_attention, of_u, needs_bias_grad=False, **call)
        return dx

    assert torch.equal(gradient(torch.bfloat16), gradient(torch.float32).bfloat16())


def test_jagged_with_a_bias() -> None:
    torch.manual_seed(5)
    call = jagged(attn_bias=torch.randn(len(LENGTHS), 1, 33, 33, device=DEVICE))
    for dtype in (torch.float32, torch.bfloat16):
        check(input_of(sum(LENGTHS), dtype, "packed"), "/kqvu, silu of u", call)


def op_arguments(call: dict[str, Any], *tensors: Tensor, order: str = "uvqk") -> tuple:
    return *tensors, *(call[name] for name in PARAMETERS), *as_arguments(places(order))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["packed", "strided"])
@pytest.mark.parametrize("order", ["uvqk", "/kqvu, silu of u"])
def test_opcheck(order: str, layout: str, mask: str) -> None:
    x, call = input_of(sum(LENGTHS), torch.float32, layout), jagged(**MASKS[mask])
    leaf = x.detach().requires_grad_()
    torch.library.opcheck(OP, op_arguments(call, leaf, *slices(x, order), order=order))
    u, q, k, v = slices(x, order)
    du, dout = upstream_of(x)
    torch.library.opcheck(OP_BACKWARD, (*op_arguments(call, dout, du, x, q, k, v, order=order), False))


def test_opcheck_with_a_bias() -> None:
    x, call = input_of(33, torch.float32, "dense"), dense("bias")
    call["attn_bias"].requires_grad_()
    torch.library.opcheck(OP, op_arguments(call, x.detach().requires_grad_(), *slices(x, "uvqk")))
    _, q, k, v = slices(x, "uvqk")
    call["attn_bias"] = call["attn_bias"].detach()
    du, dout = upstream_of(x)
    for needed in (True, False):
        torch.library.opcheck(OP_BACKWARD, (*op_arguments(call, dout, du, x, q, k, v), needed))


def test_opcheck_dense() -> None:
    x, call = input_of(33, torch.float32, "dense"), attention(max_seq_len=33)
    torch.library.opcheck(OP, op_arguments(call, x.detach().requires_grad_(), *slices(x, "kuqv"), order="kuqv"))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attn_bias": torch.ones(1, 1, 32, 33)}, "shape of attn_bias"),
    ({"attn_mask": torch.ones(1, 1, 33, 33)}, "mask_tile_states is missing"),
    ({"u_at": 1}, "u_at is 1, expected head 0 of u at column 0: u, q, k and v are all columns of x"),
    ({"k_at": places("uvqk")["q"].at}, "k_at is 128|q_at is 128"),
    ({"v_head_stride": 33}, "v_head_stride is 33, expected head 1 of v at column 96"),
    ({"q_head_stride": 97}, "q_head_stride is 97, expected at most 1 / 2 of the columns of x, 192"),
    ({"activated": "uvw"}, "activated is uvw, expected some of uqkv"),
    ({"x": torch.ones(sum(LENGTHS), W + 1)}, rf"shape of x is \({sum(LENGTHS)}, {W + 1}\), expected {W} columns"),
    ({"x": torch.ones(60, W)}, "shape of d?u"),
    ({"x": torch.ones(sum(LENGTHS), W).half()}, "dtype of d?u is torch.float32, expected that of x, torch.float16"),
    ({"u": torch.ones(sum(LENGTHS), 64)}, "shape of d?u"),
    ({"q": torch.ones(sum(LENGTHS), 32)}, "shape of q"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    x = torch.randn(sum(LENGTHS), W, device=DEVICE)
    tensors = dict(zip("uqkv", slices(x, "uvqk"), strict=True))
    given = {"x": x, **tensors, **dict(zip(PLACES, as_arguments(places("uvqk")), strict=True)), **jagged()}
    order = ("x", "u", "q", "k", "v", *PARAMETERS, *PLACES)
    OP(*(given[name] for name in order))
    change = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in change.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        OP(*({**given, **change}[name] for name in order))
    du, dout = upstream_of(x)
    bad = {"du": du, **given, **change}
    bad["du"] = bad.pop("u") if "u" in change else du
    order = ("du", "x", "q", "k", "v", *PARAMETERS, *PLACES)
    OP_BACKWARD(dout, du, *(given[name] for name in order[1:]), False)  # what is remembered of it lets nothing pass
    with pytest.raises((ValueError, RuntimeError), match=message):
        OP_BACKWARD(dout, *(bad[name] for name in order), False)
