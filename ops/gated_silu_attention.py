"""`hstu_compile::gated_silu_attention`: HSTU attention and the gate that follows it, of slices of one x.

    y = norm_gate_dropout(hstu_attention(q, k, v), x[u])        q, k, v = slices of x or of silu(x)

The gate applies its activation to the columns of u itself: silu(u) is in memory neither in the forward nor for the
backward. And the backward writes du where it belongs, into the columns of the one dx that dq, dk and dv go into.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_compile.ops.composite import register_composite, save_inputs, saved_inputs
from hstu_compile.ops.hstu_attention import ATTN_BIAS, PARAMETERS, SCHEMA
from hstu_compile.ops.norm_gate_dropout import GATE_SCHEMA, norm_gate_dropout_gradients
from hstu_compile.ops.norm_gate_dropout import PARAMETERS as GATE_PARAMETERS
from hstu_compile.ops.packed_slices import PLACES, PLACES_SCHEMA, Slice, as_arguments, from_arguments
from hstu_compile.ops.silu_attention import check_call, empty_bias_grad, fill_gradient

_SCHEMA = f"Tensor x, {SCHEMA}, {PLACES_SCHEMA}, {GATE_SCHEMA}"
torch.library.define("hstu_compile::gated_silu_attention", f"({_SCHEMA}) -> Tensor")
torch.library.define(
    "hstu_compile::gated_silu_attention_backward",
    f"(Tensor dy, Tensor a, {_SCHEMA}, bool needs_bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)

# Among the arguments after x: the attention's, places, the gate's tensors, the gate's others.
_PLACES = 3 + len(PARAMETERS)
_WEIGHT = _PLACES + len(PLACES)
_GATE = _WEIGHT + 3


def gated_silu_attention(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    attention: dict[str, Any],
    slices: dict[str, Slice],
    gate: dict[str, Any],
) -> Tensor:
    """norm_gate_dropout(hstu_attention(q, k, v), x's columns of u); the one gradient of u, q, k and v is that of x.

    Args:
        x: [T, W] (jagged) or [B, N, W] (dense), any strides. q, k and v are slices of it or of silu(x), u is the rest
            of x, of as many heads as v and as wide.
        q, k, v: as in `hstu_attention`; for autograd they are functions of x that this op differentiates.
        weight, bias, seed: as in `norm_gate_dropout`.
        attention: all of `hstu_attention.PARAMETERS`. attn_mask comes with its mask_tile_states.
        slices: where u, q, k and v lie in x, by their names, and which of q, k and v are slices of silu(x).
        gate: all of `norm_gate_dropout.PARAMETERS`; the activation is applied to u as it is in x, before silu.

    Returns:
        [T, k * Wu] or [B * N, k * Wu] as of `norm_gate_dropout`. In rows that belong to no sequence, the gradient's
        columns of q, k and v are 0; those of u are as in any other row.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
    """
    given = [attention[name] for name in PARAMETERS]
    given += as_arguments(slices)
    given += [weight, bias, seed, *(gate[name] for name in GATE_PARAMETERS)]
    return torch.ops.hstu_compile.gated_silu_attention(x, q, k, v, *given)


class _Arguments(NamedTuple):
    """What comes after x."""

    attention: tuple  # q, k, v and its parameters
    places: tuple
    affine_and_seed: tuple
    gate: tuple


def _split(args: tuple) -> _Arguments:
    return _Arguments(args[:_PLACES], args[_PLACES:_WEIGHT], args[_WEIGHT:_GATE], args[_GATE:])


def _columns_of_u(x: Tensor, args: tuple) -> Tensor:
    """[.., H, D]"""
    return from_arguments(args[_PLACES:_WEIGHT])["u"].of(x, *args[2].shape[-2:])


def _rows(t: Tensor) -> Tensor:
    """[.., H, D] as the gate takes it: [T, H, D] or [B * N, H, D]."""
    return t.flatten(0, -3)


def _rows_of_u(t: Tensor) -> Tensor:
    """The same, [.., W] where heads stand side by side."""
    return _rows(t).flatten(1) if t.stride(-2) == t.shape[-1] else _rows(t)


def _check(x: Tensor, args: tuple) -> None:
    q, k, v = args[:3]
    check_call(x, q, k, v, args[3:_WEIGHT], u=_columns_of_u(x, args))


def _attention_and_gate(x: Tensor, args: tuple) -> tuple[Tensor, Tensor]:
    _check(x, args)
    given = _split(args)
    a = torch.ops.hstu_compile.hstu_attention_forward(*given.attention)
    operands = _rows(a), _rows_of_u(_columns_of_u(x, args))
    return a, torch.ops.hstu_compile.norm_gate_dropout_forward(*operands, *given.affine_and_seed, *given.gate)


def _forward(x, *args):
    return _attention_and_gate(x, args)[1]


@torch.library.register_fake("hstu_compile::gated_silu_attention_backward")
def _backward_fake(dy, a, x, *args):
    args, needs_bias_grad = args[:-1], args[-1]
    _check(x, args)
    affine = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[_WEIGHT : _WEIGHT + 2])
    return x.new_empty(x.shape), *affine, empty_bias_grad(a, args[3:], needs_bias_grad)


@torch.library.impl("hstu_compile::gated_silu_attention_backward", ("CPU", "CUDA"))
def _backward(dy, a, x, *args):
    args, needs_bias_grad = args[:-1], args[-1]
    given = _split(args)
    x = x.contiguous()
    dx = torch.empty_like(x)
    u, du = _columns_of_u(x, args), _columns_of_u(dx, args)
    weight, bias, seed = given.affine_and_seed
    operands = _rows(a), _rows_of_u(u), weight, bias, seed
    da, _, dweight, dbias = norm_gate_dropout_gradients(dy, *operands, given.gate, du=_rows_of_u(du))
    q, k, v, *others = given.attention
    call = dx, da.view(a.shape), None, x, u, q, k, v, (*others, *given.places)
    return dx, dweight, dbias, fill_gradient(*call, needs_bias_grad=needs_bias_grad)


class _GatedSiluAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *inputs):
        a, y = _attention_and_gate(x, inputs)
        save_inputs(ctx, (a, x, *inputs))
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        a, x, *inputs = saved_inputs(ctx)
        needs_bias_grad = ctx.needs_input_grad[1 + ATTN_BIAS]
        gradients = torch.ops.hstu_compile.gated_silu_attention_backward(dy, a, x, *inputs, needs_bias_grad)
        dx, dweight, dbias, dattn_bias = gradients
        grads = [None] * len(inputs)
        for at, grad in ((_WEIGHT, dweight), (_WEIGHT + 1, dbias)):
            grads[at] = None if inputs[at] is None else grad
        grads[ATTN_BIAS] = dattn_bias if needs_bias_grad else None
        return dx, *grads


register_composite("gated_silu_attention", _forward, _GatedSiluAttention.apply)
