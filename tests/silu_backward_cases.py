"""The gradient of x behind u, q, k, v = slices of x or of silu(x), from the attention kernels, against float64.

`test_silu_backward.py` runs this: on a GPU with every kernel there is, else the portable one in the Triton interpreter,
in a process of its own (it reads TRITON_INTERPRET when triton is imported).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, assert_within_budget

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
from test_attention_grid import poison_new_memory

from bench.attention_problem import inputs, kernels
from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference
from hstu_compile.ops.kernels import attention_sm90, attention_triton
from hstu_compile.ops.packed_slices import Slice

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KERNELS = kernels() if GPU else {"portable": attention_triton}
DTYPES = [torch.bfloat16, torch.float16] if GPU else [torch.float32]
DIMS = [(64, 64), (128, 128), (256, 256), (96, 32)] if GPU else [(16, 16), (8, 16)]
SCALE = 150 if GPU else 20  # rows of the longest sequence
HEADS, NAN = 2, float("nan")
MASKS = {
    "causal": {},
    "targets": {"num_targets": [0.2, 0.0, 0.5, 0.0], "max_attn_len": 17},
    "full": {"causal": False},
    "bias": {},
}


def slices_of(order: str, dims: dict[str, int], activated: str) -> tuple[dict[str, Slice], int]:
    """Where the roles lie, in this order, in each head if that begins with "/"; and how many columns there are."""
    found, end = {}, 0
    roles = order.removeprefix("/")
    for name in roles:
        apart = dims[name] if roles == order else sum(dims.values())
        found[name] = Slice(end, apart, name in activated)
        end += dims[name] * (HEADS if roles == order else 1)
    return found, HEADS * sum(dims.values())


# The interpreter is slow: every order but one, once.
PACKED = [
    (order, activated, layout)
    for order, activated in (("uvqk", "uvqk"), ("qkvu", "u"), ("/uvqk", "uvqk"), ("/kvuq", "vk"))
    for layout in ("jagged", "dense")
]


@pytest.mark.parametrize("one_kernel", [False, True] if "sm90" in KERNELS else [False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order, activated, layout", PACKED if "sm90" in KERNELS else PACKED[::3])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_gradient(dtype, dim, order, activated, layout, mask, one_kernel, monkeypatch) -> None:
    dims = {"u": dim[1], "v": dim[1], "q": dim[0], "k": dim[0]}
    places, width = slices_of(order, dims, activated)

    def part(name: str, t: torch.Tensor) -> torch.Tensor:
        return places[name].of(t, HEADS, dims[name])

    def parts(t: torch.Tensor) -> dict[str, torch.Tensor]:
        silu = F.silu(t)
        return {name: part(name, silu if name in activated else t) for name in places}

    lengths = [SCALE, 0, SCALE // 2 + 1, 1]
    jagged = layout == "jagged"
    lead = (sum(lengths) + 3,) if jagged else (len(lengths), SCALE)
    x = torch.randn(*lead, width, device=DEVICE).to(dtype)
    dout = torch.randn(*lead, HEADS, dim[1], device=DEVICE).to(dtype)
    du = torch.randn(*lead, 2 * HEADS, dim[1], device=DEVICE).to(dtype)[..., :HEADS, :]  # strided
    where = torch.tensor(lengths, device=DEVICE)
    if jagged:
        used = torch.arange(lead[0], device=DEVICE) < sum(lengths)
    else:
        used = torch.arange(SCALE, device=DEVICE) < where[:, None]
    of_attention = torch.ones(width, dtype=torch.bool, device=DEVICE)
    part("u", of_attention)[:] = False
    unused = ~used[..., None] & of_attention
    call = inputs([1], 1, 1, DEVICE, dtype).call | {
        "seq_offsets": F.pad(where.cumsum(0), (1, 0)) if jagged else None,
        "seq_lengths": None if jagged else where,
        "max_seq_len": SCALE,
        "alpha": dim[0] ** -0.5,
        "scale": 1 / 100,
    }
    call |= MASKS[mask]
    if "num_targets" in MASKS[mask]:
        call["num_targets"] = (where * torch.tensor(MASKS[mask]["num_targets"], device=DEVICE)).long()
    has_bias = mask == "bias"
    if has_bias:
        call["attn_bias"] = torch.randn(1, 1, SCALE, SCALE, device=DEVICE).to(dtype)
    plain = {k: v for k, v in call.items() if k != "scale"} | {"scaling_seq_len": 100.0}

    wide = {**plain, "attn_bias": plain["attn_bias"].double() if has_bias else None}
    exact_x = x.double()
    exact = parts(exact_x)
    grads = hstu_attention_backward_reference(
        dout.double(), exact["q"], exact["k"], exact["v"], **wide, needs_bias_grad=has_bias
    )
    want = torch.zeros_like(exact_x)
    silu_grad = exact_x.sigmoid() * (1 + exact_x * (1 - exact_x.sigmoid()))
    for name, grad in zip("qkvu", [*grads[:3], du.double()], strict=True):
        part(name, want).copy_(grad * (part(name, silu_grad) if name in activated else 1))
    leaf = x.clone().requires_grad_()
    eager = parts(leaf)
    bias = plain["attn_bias"].clone().requires_grad_() if has_bias else None
    out = eager_attention(eager["q"], eager["k"], eager["v"], **{**plain, "attn_bias": bias})
    leaves = [leaf, bias] if has_bias else [leaf]
    theirs, *their_dbias = torch.autograd.grad([out, eager["u"]], leaves, [dout, du])

    x, dout = x.masked_fill(unused, NAN), dout.masked_fill(~used[..., None, None], NAN)
    act = parts(x)

    def into(name: str, dx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return part(name, dx), part(name, x) if name in activated else None

    if one_kernel:
        monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", 0)
    poison_new_memory(monkeypatch)
    for name, kernel in KERNELS.items():
        first, again, without_u = (x.new_empty(x.shape) for _ in range(3))
        without_u[..., ~of_attention] = 7
        for dx, given in ((first, du), (again, du), (without_u, None)):
            of_qkv, of_u = [into(name, dx) for name in "qkv"], None if given is None else (given, into("u", dx))
            operands = dout, act["q"], act["k"], act["v"], of_qkv, of_u
            dbias = kernel.silu_backward(*operands, needs_bias_grad=has_bias, **call)
        if has_bias:
            assert_within_budget(dbias, *their_dbias, grads[3], BACKWARD, f"{name}: the bias")
        assert torch.equal(first, again), f"{name} differs from run to run"
        assert (first[unused] == 0).all(), f"{name}: rows of no sequence"
        assert_within_budget(first, theirs, want.masked_fill(unused, 0), BACKWARD, name)
        assert (without_u[..., ~of_attention] == 7).all(), f"{name}: the columns of u are not its own"
        assert torch.equal(without_u[..., of_attention], first[..., of_attention]), f"{name}: without du"
