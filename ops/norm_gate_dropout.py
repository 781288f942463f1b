"""`hstu_compile::norm_gate_dropout`: what follows attention, up to the output projection, in one pass over memory."""

import importlib
import importlib.util
from collections.abc import Hashable
from types import ModuleType

import torch
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_composite
from hstu_compile.ops.norm_gate_dropout_reference import (
    norm_gate_dropout_backward_reference,
    norm_gate_dropout_reference,
)

KERNEL = "hstu_compile.ops.kernels.norm_gate_dropout"
ACTIVATIONS = ("none", "silu", "sigmoid")
MAX_GROUP_WIDTH = 16384  # the kernel holds one group of one row in registers
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Everything after the tensors. The order is the op's contract with the passes.
PARAMETERS = (
    "norm_eps",
    "num_groups",
    "rms",
    "activation",
    "gate_first",
    "concat_u",
    "concat_activated",
    "concat_x",
    "concat_norm",
    "dropout_ratio",
    "out_dtype",
)
WITHOUT_DROPOUT = PARAMETERS[:-2]
SCHEMA_WITHOUT_DROPOUT = (
    "float norm_eps, int num_groups, bool rms, str activation, bool gate_first, bool concat_u, bool concat_activated, "
    "bool concat_x, bool concat_norm"
)
GATE_SCHEMA = (
    f"Tensor? weight, Tensor? bias, Tensor? seed, {SCHEMA_WITHOUT_DROPOUT}, float dropout_ratio, ScalarType out_dtype"
)
SCHEMA = f"Tensor a, Tensor u, {GATE_SCHEMA}"
torch.library.define("hstu_compile::norm_gate_dropout", f"({SCHEMA}) -> Tensor")
torch.library.define("hstu_compile::norm_gate_dropout_forward", f"({SCHEMA}) -> Tensor")
torch.library.define(
    "hstu_compile::norm_gate_dropout_backward", f"(Tensor dy, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def norm_gate_dropout(
    a: Tensor,
    u: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    norm_eps: float,
    num_groups: int = 1,
    rms: bool = False,
    activation: str = "none",
    gate_first: bool = False,
    concat_u: bool = False,
    concat_activated: bool = False,
    concat_x: bool = False,
    concat_norm: bool = False,
    dropout_ratio: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(cat[u, a, norm(a), norm(a) * activation(u)]); the first three only where asked for. Or, if gate_first,
    norm(a * activation(u)) in the last place.

    Computed in fp32 (fp64 if an operand is), rounded once, to out_dtype.

    Args:
        a, u: [T, W] or [T, H, D] with H * D = W; fp32, fp16 or bf16, not necessarily the same. Any row and head stride
            (u is usually a slice of the packed uvqk buffer).
        weight, bias: broadcast against [num_groups, W // num_groups].
        seed: [1] int64, of which the dropout mask is a pure function; None: no dropout.
        norm_eps: added to the variance.
        num_groups: 1 normalises the whole row (layer norm), H each head (group norm).
        rms: divide by the root mean square; do not centre.
        activation: of u in the product: "none", "silu" or "sigmoid".
        gate_first: the product is normalised, not a.
        concat_u, concat_x, concat_norm: what stands before the last piece in a row of the output (norm(a) not if
            gate_first).
        concat_activated: it is activation(u) that concat_u joins, not u.
        dropout_ratio: in [0, 1).
        out_dtype: default the dtype of a.

    Returns:
        [T, k * W], contiguous, k = 1 + the pieces asked for. Deterministic in values and in gradients, given the seed.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
    """
    return torch.ops.hstu_compile.norm_gate_dropout(
        a,
        u,
        weight,
        bias,
        seed,
        norm_eps,
        num_groups,
        rms,
        activation,
        gate_first,
        concat_u,
        concat_activated,
        concat_x,
        concat_norm,
        dropout_ratio,
        a.dtype if out_dtype is None else out_dtype,
    )


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"norm_gate_dropout: {name} is {value}, expected {expected}")


def check_gate(
    a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, named: dict
) -> None:
    """`named` as in PARAMETERS; reads no tensor's content."""
    for name, x in (("a", a), ("u", u)):
        _expect(x.dim() in (2, 3), f"the shape of {name}", tuple(x.shape), "[T, W] or [T, H, D]")
        _expect(x.is_floating_point(), f"the dtype of {name}", x.dtype, "a floating point dtype")
    _expect(u.device == a.device, "the device of u", u.device, f"that of a, {a.device}")
    torch._check(u.shape[0] == a.shape[0], lambda: f"norm_gate_dropout: u has {u.shape[0]} rows, a {a.shape[0]}")
    width, groups = a.shape[1:].numel(), named["num_groups"]
    _expect(u.shape[1:].numel() == width, "the shape of u", tuple(u.shape), f"rows of {width} as in a")
    _expect(groups >= 1 and width % groups == 0, "num_groups", groups, f"a divisor of the row's width {width}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            fits = t.dim() in (1, 2) and all(
                n in (1, full) for n, full in zip(t.shape[::-1], (width // groups, groups), strict=False)
            )
            _expect(
                fits,
                f"the shape of {name}",
                tuple(t.shape),
                f"one that broadcasts against [{groups}, {width // groups}]",
            )
            _expect(t.device == a.device, f"the device of {name}", t.device, f"that of a, {a.device}")
    ratio = named["dropout_ratio"]
    _expect(0 <= ratio < 1, "dropout_ratio", ratio, "in [0, 1)")
    if seed is not None:
        _expect(tuple(seed.shape) == (1,) and seed.dtype == torch.int64, "seed", seed, "one int64, of shape [1]")
        _expect(seed.device == a.device, "the device of seed", seed.device, f"that of a, {a.device}")
    normalised = not (named["gate_first"] and named["concat_norm"])
    _expect(normalised, "concat_norm", True, "False with gate_first: a is not normalised")
    _expect(named["activation"] in ACTIVATIONS, "activation", named["activation"], f"one of {', '.join(ACTIVATIONS)}")


def empty_output(a: Tensor, named: dict) -> Tensor:
    """What is to be filled; `named` as in PARAMETERS."""
    pieces = 1 + named["concat_u"] + named["concat_x"] + named["concat_norm"]
    return a.new_empty(a.shape[0], pieces * a.shape[1:].numel(), dtype=named["out_dtype"])


def _empty_like(t: Tensor | None, a: Tensor) -> Tensor:
    return a.new_empty(0) if t is None else t.new_empty(t.shape)


@torch.library.register_fake("hstu_compile::norm_gate_dropout_forward")
def _forward_fake(a, u, weight, bias, seed, *args):
    named = dict(zip(PARAMETERS, args, strict=True))
    check_gate(a, u, weight, bias, seed, named)
    return empty_output(a, named)


@torch.library.register_fake("hstu_compile::norm_gate_dropout_backward")
def _backward_fake(dy, a, u, weight, bias, seed, *args):
    return tuple(_empty_like(t, a) for t in (a, u, weight, bias))


TRITON = "norm_gate_dropout (Triton)"


def runs_on(named: dict, a: Tensor, *others: Tensor | None) -> str:
    """Which kernel a call takes, and if it is not the Triton one, why. `named` as in PARAMETERS."""
    dtypes = {named["out_dtype"], *(t.dtype for t in (a, *others) if t is not None)}
    group_width = a.shape[1:].numel() // named["num_groups"]
    if a.device.type != "cuda":
        return f"plain PyTorch; no kernel for device type {a.device.type}"
    if not dtypes <= set(KERNEL_DTYPES):
        return f"plain PyTorch; no kernel for {', '.join(map(str, dtypes - set(KERNEL_DTYPES)))}"
    if group_width > MAX_GROUP_WIDTH:
        return f"plain PyTorch; a norm over {group_width} elements, the kernel holds {MAX_GROUP_WIDTH}"
    if importlib.util.find_spec("triton") is None:
        return "plain PyTorch; triton is not installed"
    return TRITON


def _checked_kernel(
    a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, args: tuple
) -> ModuleType | None:
    named = dict(zip(PARAMETERS, args, strict=True))
    check_gate(a, u, weight, bias, seed, named)
    return importlib.import_module(KERNEL) if runs_on(named, a, u, weight, bias) == TRITON else None


_kinds = Kinds(_checked_kernel)


def gate_features(a: Tensor, u: Tensor, affine_and_seed: tuple, args: tuple) -> Hashable:
    """All that checks ask for and launches differ in, but for addresses and their alignment and for T."""
    others = [None if t is None else (t.dtype, t.get_device(), t.shape, t.stride()) for t in affine_and_seed]
    return (
        a.shape[:1] == u.shape[:1], a.dtype, u.dtype, a.get_device(), u.get_device(), a.shape[1:], u.shape[1:],
        a.stride(), u.stride(), *others, *args,
    )  # fmt: skip


@torch.library.impl("hstu_compile::norm_gate_dropout_forward", ("CPU", "CUDA"))
def _forward(a, u, weight, bias, seed, *args):
    kind = _kinds.kind(gate_features(a, u, (weight, bias, seed), args), a, u, weight, bias, seed, args)
    named = dict(zip(PARAMETERS, args, strict=True))
    if kind.kernel is None:
        return norm_gate_dropout_reference(a, u, weight, bias, seed, **named)
    out = empty_output(a, named)
    kind.kernel.forward(a, u, weight, bias, seed, out, memory=kind.memory, **named)
    return out


@torch.library.impl("hstu_compile::norm_gate_dropout_backward", ("CPU", "CUDA"))
def _backward_impl(dy, a, u, weight, bias, seed, *args):
    return norm_gate_dropout_gradients(dy, a, u, weight, bias, seed, args)


def norm_gate_dropout_gradients(
    dy: Tensor, a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, args: tuple,
    du: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """da, du, dweight, dbias; empty where there is no weight or bias. du: like u, columns contiguous, to be filled."""
    kind = _kinds.kind(gate_features(a, u, (weight, bias, seed), args), a, u, weight, bias, seed, args)
    named = dict(zip(PARAMETERS, args, strict=True))
    if kind.kernel is None:
        grads = norm_gate_dropout_backward_reference(dy, a, u, weight, bias, seed, **named)
        grads = grads if du is None else (grads[0], du.copy_(grads[1]), *grads[2:])
    else:
        grads = kind.kernel.backward(dy, a, u, weight, bias, seed, du=du, memory=kind.memory, **named)
    return tuple(a.new_empty(0) if g is None else g for g in grads)


class _NormGateDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.save_for_backward(*inputs[:5])
        ctx.named = inputs[5:]
        return torch.ops.hstu_compile.norm_gate_dropout_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        _, _, weight, bias, _ = tensors = ctx.saved_tensors
        da, du, dweight, dbias = torch.ops.hstu_compile.norm_gate_dropout_backward(dy, *tensors, *ctx.named)
        affine = (None if weight is None else dweight, None if bias is None else dbias)
        return da, du, *affine, None, *[None] * len(PARAMETERS)


register_composite("norm_gate_dropout", torch.ops.hstu_compile.norm_gate_dropout_forward, _NormGateDropout.apply)
