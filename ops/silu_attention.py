"""`hstu_compile::silu_attention`: HSTU attention of slices of x or of silu(x), whose backward gives the gradient of x.

The backward of attention alone gives dq, dk and dv; on the way to x, they and du are concatenated and, where silu was
applied, multiplied by silu'(x), which are more passes over all of it. Here they go into their columns of one dx,
multiplied.
"""

from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_composite, save_inputs, saved_inputs
from hstu_compile.ops.hstu_attention import (
    ATTN_BIAS,
    PARAMETERS,
    SCHEMA,
    attention_features,
    checked_attention_kernel,
    for_kernel,
    for_reference,
)
from hstu_compile.ops.packed_slices import PLACES_SCHEMA, Slice, as_arguments, check_slices, from_arguments
from hstu_compile.ops.silu_attention_reference import silu_attention_backward_reference
from hstu_compile.ops.validation import check_attention_values, checks_values

torch.library.define(
    "hstu_compile::silu_attention", f"(Tensor x, Tensor(a) u, {SCHEMA}, {PLACES_SCHEMA}) -> (Tensor(a), Tensor)"
)
torch.library.define(
    "hstu_compile::silu_attention_backward",
    f"(Tensor dout, Tensor du, Tensor x, {SCHEMA}, {PLACES_SCHEMA}, bool needs_bias_grad) -> (Tensor, Tensor)",
)


def silu_attention(
    x: Tensor, u: Tensor, q: Tensor, k: Tensor, v: Tensor, *, attention: dict[str, Any], slices: dict[str, Slice]
) -> tuple[Tensor, Tensor]:
    """u, and hstu_attention(q, k, v): the one gradient, of both results, is that of x; beside it, that of a bias.

    Args:
        x: [T, W] (jagged) or [B, N, W] (dense), any strides. u, q, k and v are slices of it, together all of it, or of
            silu(x).
        u: [T, Hu, Du] or [B, N, Hu, Du]; of one head where it lies in one piece.
        q, k, v: as in `hstu_attention`; for autograd they and u are functions of x that this op differentiates.
        attention: all of `hstu_attention.PARAMETERS`. attn_mask comes with its mask_tile_states.
        slices: where u, q, k and v lie in x, by their names, and which of them are slices of silu(x).

    Returns:
        u (an alias of it), and the attention's output. The gradient of x is contiguous. In rows that belong to no
        sequence the columns of q, k and v are never read and get 0; those of u are as in any other row.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
    """
    given = (attention[name] for name in PARAMETERS)
    return torch.ops.hstu_compile.silu_attention(x, u, q, k, v, *given, *as_arguments(slices))


def _named(args: tuple) -> tuple[dict[str, Any], dict[str, Slice]]:
    """The attention's parameters, and the slices."""
    count = len(PARAMETERS)
    return dict(zip(PARAMETERS, args[:count], strict=True)), from_arguments(args[count:])


def check_call(x: Tensor, q: Tensor, k: Tensor, v: Tensor, args: tuple, **of_u: Tensor) -> None:
    """of_u: u or its gradient, by its name."""
    ((name, u),) = of_u.items()
    check_slices(x, args[len(PARAMETERS) :], {"u": u, "q": q, "k": k, "v": v}, u=name)


def _forward(x, u, q, k, v, *args):
    check_call(x, q, k, v, args, u=u)
    out = torch.ops.hstu_compile.hstu_attention_forward(q, k, v, *args[: len(PARAMETERS)])
    return torch.ops.aten.alias(u), out


@torch.library.register_fake("hstu_compile::silu_attention_backward")
def _backward_fake(dout, du, x, q, k, v, *args):
    args, needs_bias_grad = args[:-1], args[-1]
    check_call(x, q, k, v, args, du=du)
    return x.new_empty(x.shape), empty_bias_grad(q, args, needs_bias_grad)


def empty_bias_grad(q: Tensor, args: Sequence, needs_bias_grad: bool) -> Tensor:
    """Of the bias among the attention's parameters, with which args begin; empty where none is wanted."""
    bias = args[PARAMETERS.index("attn_bias")]
    return bias.new_empty(bias.shape) if needs_bias_grad and bias is not None else q.new_empty(0)


def _checked_kernel(
    dout: Tensor, du: Tensor, x: Tensor, q: Tensor, k: Tensor, v: Tensor, args: tuple
) -> ModuleType | None:
    check_call(x, q, k, v, args, du=du)
    return checked_attention_kernel(q, k, v, args[: len(PARAMETERS)])


_kinds = Kinds(_checked_kernel)


def _features(dout: Tensor, u: Tensor, x: Tensor, q: Tensor, k: Tensor, v: Tensor, args: tuple) -> Hashable:
    """Those of the attention, and the same of what is only here."""
    count = len(PARAMETERS)
    rows = q.shape[:1]
    others = [(t.dtype, t.get_device(), t.shape[:1] == rows, t.shape[1:], t.stride()) for t in (dout, u, x)]
    return attention_features(q, k, v, args[:count]), *others, *args[count:]


@torch.library.impl("hstu_compile::silu_attention_backward", ("CPU", "CUDA"))
def _backward(dout, du, x, q, k, v, *args):
    x = x.contiguous()
    dx = torch.empty_like(x)
    return dx, fill_gradient(dx, dout, du, x, du, q, k, v, args[:-1], needs_bias_grad=args[-1])


def fill_gradient(
    dx: Tensor, dout: Tensor, du: Tensor | None, x: Tensor, u: Tensor, q: Tensor, k: Tensor, v: Tensor, args: tuple, *,
    needs_bias_grad: bool,
) -> Tensor:  # fmt: skip
    """The gradient of x into dx, both contiguous. du: None leaves the columns of u, a tensor like them, as they are.

    Returns the gradient of the bias; empty where none is wanted.
    """
    kind = _kinds.kind(_features(dout, u, x, q, k, v, args), dout, u, x, q, k, v, args)
    named, slices = _named(args)
    if checks_values(q.device):
        check_attention_values(q, **named)

    def into(role: str, like: Tensor) -> tuple[Tensor, Tensor | None]:
        one, sizes = slices[role], like.shape[-2:]
        return one.of(dx, *sizes), one.of(x, *sizes) if one.activated else None

    of_attention = [into(*one) for one in (("q", q), ("k", k), ("v", v))]
    of_u = None if du is None else (du, into("u", du))
    if kind.kernel is None:
        backward, named = silu_attention_backward_reference, for_reference(named)
    else:
        backward, named = kind.kernel.silu_backward, {**for_kernel(named), "memory": kind.memory}
    dbias = backward(dout, q, k, v, of_attention, of_u, needs_bias_grad=needs_bias_grad, **named)
    return q.new_empty(0) if dbias is None else dbias


class _SiluAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, u, *inputs):
        save_inputs(ctx, (x, *inputs))
        return _forward(x, u, *inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, du, dout):
        x, *inputs = saved_inputs(ctx)
        needs_bias_grad = ctx.needs_input_grad[2 + ATTN_BIAS]
        dx, dbias = torch.ops.hstu_compile.silu_attention_backward(dout, du, x, *inputs, needs_bias_grad)
        grads = [None] * len(inputs)
        grads[ATTN_BIAS] = dbias if needs_bias_grad else None
        return dx, None, *grads


register_composite("silu_attention", _forward, _SiluAttention.apply)
