"""The gate op on whatever device is there: against float64, gradients, dropout, strides, opcheck, bad input.

The kernel is tested here on a GPU, or in the Triton interpreter (`test_kernel_in_the_interpreter` starts it).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops.norm_gate_dropout import norm_gate_dropout
from hstu_compile.ops.norm_gate_dropout_reference import (
    keep_scale,
    norm_gate_dropout_backward_reference,
    norm_gate_dropout_reference,
    random_bits,
)
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    import tests.triton_interpreter  # noqa: F401
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the Triton interpreter")
EPS = 1e-6
T = 37

# name -> (options of the op, H, D, shape of weight or None)
VARIANTS: dict[str, tuple[dict, int, int, tuple[int, ...] | None]] = {
    "layer norm": ({}, 2, 32, (64,)),
    "no affine": ({}, 2, 32, None),
    "odd width": ({}, 3, 25, (75,)),
    "silu gate": ({"activation": "silu"}, 2, 32, (64,)),
    "sigmoid gate": ({"activation": "sigmoid"}, 2, 32, None),
    "rms norm": ({"rms": True}, 2, 32, (64,)),
    "group norm": ({"num_groups": 4}, 4, 24, (4, 1)),
    "group norm, affine shared by the heads": ({"num_groups": 4}, 4, 16, (16,)),
    "group norm, affine of every channel": ({"num_groups": 2}, 2, 32, (2, 32)),
    "Meta's concat": ({"concat_u": True, "concat_x": True, "num_groups": 2}, 2, 32, (2, 1)),
    "research concat": ({"concat_u": True, "concat_norm": True}, 2, 32, None),
    "norm of the product": ({"gate_first": True}, 2, 32, (64,)),
    "rms norm of the product per head": ({"gate_first": True, "rms": True, "num_groups": 3}, 3, 25, (25,)),
    "concat, norm of the product": (
        {"gate_first": True, "activation": "silu", "concat_u": True, "concat_x": True},
        2,
        32,
        (64,),
    ),
    "concat of the gate": ({"activation": "silu", "concat_u": True, "concat_activated": True}, 2, 32, (64,)),
    "concat of the gate, norm of the product": (
        {"gate_first": True, "activation": "sigmoid", "concat_u": True, "concat_activated": True, "concat_x": True},
        3,
        25,
        (75,),
    ),
    "everything": (
        {"concat_u": True, "concat_x": True, "concat_norm": True, "activation": "silu", "rms": True},
        3,
        16,
        (48,),
    ),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def eager(a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, options: dict, keep=None) -> Tensor:
    """The same mathematics in the calls that people use, in the dtype of a."""
    a, u = a.flatten(1), u.flatten(1)
    groups = options.get("num_groups", 1)
    gate = {"none": lambda t: t, "silu": F.silu, "sigmoid": torch.sigmoid}[options.get("activation", "none")](u)
    first = options.get("gate_first", False)
    x = (a * gate if first else a).view(a.shape[0], groups, -1)
    norm = F.rms_norm(x, x.shape[-1:], eps=EPS) if options.get("rms") else F.layer_norm(x, x.shape[-1:], eps=EPS)
    norm = norm if weight is None else norm * weight
    norm = (norm if bias is None else norm + bias).flatten(1)
    pieces = {"concat_u": gate if options.get("concat_activated") else u, "concat_x": a, "concat_norm": norm}
    y = torch.cat(
        [piece for name, piece in pieces.items() if options.get(name)] + [norm if first else norm * gate], dim=1
    )
    return y if keep is None else y * keep.to(y.dtype)


def operands(variant: str, dtype: torch.dtype, layout: str = "packed") -> tuple[list[Tensor | None], dict]:
    """a, u, weight, bias as leaves' views, and the options. u is a slice of a packed buffer, as in models."""
    options, H, D, shape = VARIANTS[variant]
    torch.manual_seed(hash((H, D)) % 1000)
    a = torch.randn(T, H * D, device=DEVICE, dtype=dtype)
    if layout == "packed":
        u = torch.randn(T, 4 * H * D, device=DEVICE, dtype=dtype)[:, : H * D]
    elif layout == "interleaved":
        u = torch.randn(T, H, 4 * D, device=DEVICE, dtype=dtype)[:, :, :D]
        a = a.view(T, H, D)
    elif layout == "heads first":
        a, u = torch.randn(2, H, T, D, device=DEVICE, dtype=dtype).transpose(1, 2)
    else:  # columns not contiguous
        u = torch.randn(H * D, T, device=DEVICE, dtype=dtype).t()
        a = torch.randn(H * D, T, device=DEVICE, dtype=dtype).t()
    affine = [None, None] if shape is None else [torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(2)]
    if options.get("rms"):
        affine[1] = None
    return [a, u, *affine], options


def all_options(options: dict, dtype: torch.dtype, dropout_ratio: float = 0.0) -> dict:
    names = ("concat_u", "concat_activated", "concat_x", "concat_norm", "rms", "gate_first")
    default = {"num_groups": 1, "activation": "none", "norm_eps": EPS, **dict.fromkeys(names, False)}
    return {**default, **options, "dropout_ratio": dropout_ratio, "out_dtype": dtype}


def values_and_grads(function, tensors: list[Tensor | None], dout: Tensor | None = None) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out) if dout is None else dout
    present = [leaf for leaf in leaves if leaf is not None]
    return [out, *torch.autograd.grad(out, present, dout.to(out))]


def kernel(tensors: list[Tensor | None], options: dict, seed: Tensor | None = None, ratio: float = 0.0) -> list[Tensor]:
    """The kernel module itself, with poisoned output."""
    from hstu_compile.ops.kernels import norm_gate_dropout as module

    named = all_options(options, tensors[0].dtype, ratio)
    pieces = 1 + named["concat_u"] + named["concat_x"] + named["concat_norm"]
    out = tensors[0].new_full((tensors[0].shape[0], pieces * tensors[0].shape[1:].numel()), torch.nan)
    module.forward(*tensors, seed, out, **named)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *(g for g in module.backward(dout, *tensors, seed, **named) if g is not None)]


def check(ours: list[Tensor], tensors: list[Tensor | None], options: dict, keep: Tensor | None = None) -> None:
    doubles = [None if t is None else t.double() for t in tensors]
    dout = torch.randn(ours[0].shape, generator=torch.Generator().manual_seed(1)).to(ours[0])
    expected = values_and_grads(lambda *t: eager(*t, options, keep), tensors, dout)
    reference = values_and_grads(lambda *t: eager(*t, options, keep), doubles, dout)
    names = ["y", *(n for n, t in zip(("da", "du", "dweight", "dbias"), tensors, strict=True) if t is not None)]
    for name, actual, e, r in zip(names, ours, expected, reference, strict=True):
        assert_within_budget(actual, e, r, FORWARD if name == "y" else BACKWARD, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients(variant, dtype):
    tensors, options = operands(variant, dtype)
    check(values_and_grads(lambda *t: norm_gate_dropout(*t, norm_eps=EPS, **options), tensors), tensors, options)


@pytest.mark.parametrize(
    "variant, layout",
    [("Meta's concat", "interleaved"), ("Meta's concat", "transposed"), ("group norm", "heads first")],
)
def test_strides(variant, layout):
    tensors, options = operands(variant, torch.float32, layout)
    check(values_and_grads(lambda *t: norm_gate_dropout(*t, norm_eps=EPS, **options), tensors), tensors, options)


def test_float64_is_exact():
    tensors, options = operands("everything", torch.float64)
    grads = values_and_grads(lambda *t: norm_gate_dropout(*t, norm_eps=EPS, **options), tensors)
    for ours, expected in zip(grads, values_and_grads(lambda *t: eager(*t, options), tensors), strict=True):
        torch.testing.assert_close(ours, expected)


def test_backward_reference_is_the_derivative_of_the_forward_reference():
    for variant in VARIANTS:
        tensors, options = operands(variant, torch.float64)
        named, seed = all_options(options, torch.float64, 0.3), torch.tensor([5], device=DEVICE)
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        out = norm_gate_dropout_reference(*leaves, seed, **named)
        dout = torch.randn_like(out)
        expected = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], dout))
        for ours in norm_gate_dropout_backward_reference(dout, *tensors, seed, **named):
            if ours is not None:
                torch.testing.assert_close(ours, next(expected))


def test_mixed_dtypes_and_out_dtype():
    a, u = torch.randn(T, 64, device=DEVICE, dtype=torch.bfloat16), torch.randn(T, 64, device=DEVICE)
    weight = torch.randn(64, device=DEVICE)
    y = norm_gate_dropout(a, u, weight, norm_eps=EPS, out_dtype=torch.float32)
    expected = eager(a.float(), u, weight, None, {})
    assert_within_budget(y, expected, eager(a.double(), u.double(), weight.double(), None, {}), FORWARD)


def test_philox_known_answer():
    # Random123's test vector of philox4x32 with 7 rounds, counter and key all zero.
    seed = torch.zeros(1, dtype=torch.int64)
    expected = [x & 0x7FFFFFFF for x in (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)]
    assert random_bits(seed, 1, 0, 1, 4).flatten().tolist() == expected


def test_dropout_drops_its_share_and_nothing_else():
    seed = torch.tensor([2**63 - 25], device=DEVICE)
    a, u = torch.randn(512, 64, device=DEVICE), torch.randn(512, 64, device=DEVICE)
    options = {"concat_u": True, "concat_x": True, "norm_eps": EPS}
    dry = norm_gate_dropout(a, u, **options)
    wet = norm_gate_dropout(a, u, seed=seed, dropout_ratio=0.25, **options)
    dropped = wet == 0
    n = dropped.numel()
    assert abs(dropped.float().mean().item() - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5
    torch.testing.assert_close(wet[~dropped], dry[~dropped] / 0.75)
    assert torch.equal(wet, norm_gate_dropout(a, u, seed=seed, dropout_ratio=0.25, **options))
    assert not torch.equal(wet, norm_gate_dropout(a, u, seed=seed + 1, dropout_ratio=0.25, **options))
    # Rows, columns, and the pieces of the concatenation, are independent of each other.
    pieces = torch.stack([p.float() - 0.25 for p in dropped.split(64, dim=1)])
    for other in (pieces.roll(1, 0), pieces.roll(1, 1), pieces.roll(1, 2), pieces.roll(4, 2)):
        assert (pieces * other).mean().abs() < 5 * 0.1875 / n**0.5


@pytest.mark.parametrize("variant", ["layer norm", "group norm", "everything"])
def test_dropout_gradients(variant):
    tensors, options = operands(variant, torch.float32)
    seed = torch.tensor([11], device=DEVICE)
    ours = values_and_grads(
        lambda *t: norm_gate_dropout(*t, seed=seed, dropout_ratio=0.2, norm_eps=EPS, **options), tensors
    )
    check(ours, tensors, options, keep_of(seed, tensors, options, 0.2))


def keep_of(seed: Tensor, tensors: list[Tensor | None], options: dict, ratio: float) -> Tensor:
    groups, width = options.get("num_groups", 1), tensors[0][0].numel()
    pieces = [i for i, name in enumerate(("concat_u", "concat_x", "concat_norm")) if options.get(name)] + [3]
    size = (groups, width // groups)
    return torch.cat([keep_scale(seed, ratio, T, i, *size, torch.float64).flatten(1) for i in pieces], dim=1)


def test_no_rows():
    a, u, weight = (torch.randn(n, 64, device=DEVICE) for n in (0, 0, 1))
    out, da, du, dweight = values_and_grads(lambda *t: norm_gate_dropout(*t, norm_eps=EPS), [a, u, weight])
    assert out.shape == da.shape == du.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("layout", ["packed", "interleaved", "transposed"])
@pytest.mark.parametrize("variant", ["no affine", "Meta's concat", "everything"])
def test_opcheck(variant, layout):
    tensors, options = operands(variant, torch.float32, layout)
    tensors = [None if t is None else t.detach().requires_grad_() for t in tensors]
    seed = torch.tensor([3], device=DEVICE)
    args = (*tensors, seed, *(all_options(options, torch.float32, 0.1)[name] for name in _parameters()))
    torch.library.opcheck(torch.ops.hstu_compile.norm_gate_dropout, args)
    dy = torch.randn_like(norm_gate_dropout(*tensors, norm_eps=EPS, **options)).detach()
    detached = [t.detach() if isinstance(t, Tensor) else t for t in args]
    torch.library.opcheck(torch.ops.hstu_compile.norm_gate_dropout_forward, detached)
    torch.library.opcheck(torch.ops.hstu_compile.norm_gate_dropout_backward, (dy, *detached))


def _parameters() -> tuple[str, ...]:
    from hstu_compile.ops.norm_gate_dropout import PARAMETERS

    return PARAMETERS


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"a": torch.zeros(4)}, "the shape of a is"),
        ({"u": torch.zeros(4, 7)}, "the shape of u is"),
        ({"u": torch.zeros(4, 8, dtype=torch.int64)}, "the dtype of u is"),
        ({"num_groups": 3}, "num_groups is 3, expected a divisor of the row's width 8"),
        ({"weight": torch.zeros(7)}, "the shape of weight is"),
        ({"bias": torch.zeros(1, 1, 8)}, "the shape of bias is"),
        ({"dropout_ratio": 1.0}, "dropout_ratio is 1.0, expected in"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed is"),
        ({"gate_first": True, "concat_norm": True}, "concat_norm is True, expected False with gate_first"),
        ({"activation": "relu"}, "activation is relu, expected one of none, silu, sigmoid"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        norm_gate_dropout(**{"a": torch.zeros(4, 8), "u": torch.zeros(4, 8), "norm_eps": EPS, **changes})


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_kernel(variant, dtype):
    tensors, options = operands(variant, dtype)
    check(kernel(tensors, options), tensors, options)


@needs_kernel
@pytest.mark.parametrize("variant", ["layer norm", "odd width", "group norm", "everything"])
def test_kernel_takes_many_tiles_a_program(variant, monkeypatch):
    from hstu_compile.ops.kernels import norm_gate_dropout as module

    monkeypatch.setattr(module, "processors", lambda device: 1)
    (a, u, *affine), options = operands(variant, torch.bfloat16)
    tensors = [a.repeat(6, 1), u.repeat(6, 1), *affine]
    ours = kernel(tensors, options)
    check(ours, tensors, options)
    for once, again in zip(ours, kernel(tensors, options), strict=True):
        assert torch.equal(once, again)


@needs_kernel
@pytest.mark.parametrize("weight", [None, (1,), (16,), (4, 1), (1, 16), (4, 16)], ids=str)
@pytest.mark.parametrize("bias", [None, (16,), (4, 1)], ids=str)
def test_kernel_affine_shapes(weight, bias):
    """What broadcasts is summed over, in the dtype of its own."""
    a, u = (torch.randn(T, 64, device=DEVICE) for _ in range(2))
    affine = [None if shape is None else torch.randn(shape, device=DEVICE) for shape in (weight, bias)]
    check(kernel([a, u, *affine], {"num_groups": 4}), [a, u, *affine], {"num_groups": 4})


@needs_kernel
def test_kernel_without_rows():
    a, u, weight = (torch.randn(n, 64, device=DEVICE) for n in (0, 0, 1))
    *_, dweight = kernel([a, u, weight, None], {})
    assert torch.equal(dweight, torch.zeros_like(weight))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "groups, width, weight, bias",
    [(3, 75, (75,), (75,)), (4, 600, (4, 1), None), (2, 40, None, (1,)), (4, 600, (4, 600), (600,))],
)
def test_kernel_sums_shares(groups, width, weight, bias, dtype):
    """More of them than a tile has rows, or none; wider than it has columns. The results start as NaN."""
    from hstu_compile.ops.kernels.launch import Extent
    from hstu_compile.ops.kernels.sum_shares import sum_launches

    for programs in (0, 150):
        shares = torch.randn(2, programs, groups, width, device=DEVICE)
        grads = [None if s is None else torch.full(s, torch.nan, dtype=dtype, device=DEVICE) for s in (weight, bias)]
        for launch in sum_launches(shares, *grads, lambda extent: extent.rows, Extent(programs)):
            launch()
        for ours, share in zip(grads, shares, strict=True):
            if ours is not None:
                eager, exact = (x.sum(0).sum_to_size(ours.shape) for x in (share, share.double()))
                assert_within_budget(ours, eager.to(dtype), exact, BACKWARD)


@needs_kernel
def test_kernel_without_eps_keeps_the_rest_of_a_tile_out_of_the_sums():
    tensors, _ = operands("layer norm", torch.float32)
    assert all(t.isfinite().all() for t in kernel(tensors, {"norm_eps": 0.0}))


@needs_kernel
@pytest.mark.parametrize("layout", ["interleaved", "transposed"])
def test_kernel_strides(layout):
    tensors, options = operands("layer norm", torch.float32, layout)
    check(kernel(tensors, options), tensors, options)


@needs_kernel
@pytest.mark.parametrize("layout", ["packed", "interleaved"])
@pytest.mark.parametrize("variant", ["layer norm", "concat of the gate", "group norm"])
def test_kernel_writes_du_into_columns_of_longer_rows(variant, layout):
    from hstu_compile.ops.kernels import norm_gate_dropout as module

    (a, u, weight, bias), options = operands(variant, torch.float32, layout)
    dx = torch.full((T, 4 * a.shape[1:].numel()), torch.nan, device=DEVICE)
    du = dx.as_strided(u.shape, u.stride())  # as u lies in x
    dy = torch.randn(T, (1 + options.get("concat_u", False)) * a.shape[1:].numel(), device=DEVICE)
    call = (dy, a, u, weight, bias, None)
    (_, want, *_), (_, given, *_) = (module.backward(*call, du=t, **all_options(options, a.dtype)) for t in (None, du))
    assert given is du and torch.equal(du, want) and dx.isnan().sum() == dx.numel() - du.numel()


@needs_kernel
@pytest.mark.parametrize("variant", ["odd width", "group norm", "everything"])
def test_kernel_dropout(variant):
    tensors, options = operands(variant, torch.float32)
    seed = torch.tensor([2**62 + 12345], device=DEVICE)
    keep = keep_of(seed, tensors, options, 0.4)
    ours = kernel(tensors, options, seed, 0.4)
    assert torch.equal(ours[0] == 0, keep == 0)
    check(ours, tensors, options, keep)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the kernel tests run directly")
def test_kernel_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "test_kernel"]
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("ratio", [0.0, 0.2])
@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize("groups, width", [(1, 1024), (4, 128), (1, 4096)])
def test_compiled_kernels_stay_in_registers_and_load_16_bytes(groups, width, concat, ratio):
    pytest.importorskip("triton")
    from hstu_compile.ops.kernels import norm_gate_dropout as module
    from hstu_compile.ops.kernels.launch import Extent, Workspace
    from tests.compile_only import resources, target

    options = all_options({"num_groups": groups, "concat_u": concat, "concat_x": concat}, torch.bfloat16, ratio)
    loads = 5 if concat else 3
    a, dy = (torch.empty(16, n * groups * width, dtype=torch.bfloat16) for n in (1, loads - 2))
    u = torch.empty(16, 4 * groups * width, dtype=torch.bfloat16)[:, : groups * width]
    weight, seed = torch.empty(width), torch.empty(1, dtype=torch.int64) if ratio else None
    operands = a, u, weight, weight, seed
    workspace = Workspace(a.device, Extent(16))
    launches = [
        module.forward_launch(*operands, dy, Extent(16), **options),
        *module.backward_launches(dy, *operands, a, a, weight, weight, workspace, **options),
    ]
    with target(90):
        forward, backward, sums = (x.kernel.warmup(*x.arguments, **x.constants, grid=(1,)) for x in launches)
    assert resources(sums).spilled == 0 and "ld.global.v4.b32" in sums.asm["ptx"]
    for compiled in (forward, backward):
        assert resources(compiled).spilled == 0
        assert "st.global.v4.b32" in compiled.asm["ptx"] and "st.global.b16" not in compiled.asm["ptx"]
        assert "ld.global.b16" not in compiled.asm["ptx"]
    assert "ld.global.v4.b32" in forward.asm["ptx"]
    # Each operand's next tile is on its way in copies of 16 bytes: two before the loop, one in it.
    assert len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10,", backward.asm["ptx"])) == 3 * loads
    # All programs of a multiprocessor are there at once.
    per_multiprocessor = module.MAX_WARPS // launches[1].constants["num_warps"]
    assert resources(backward).registers <= module.BACKWARD_REGISTERS
    assert per_multiprocessor * resources(backward).shared <= module.SHARED_MEMORY + 4096
