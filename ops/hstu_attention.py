"""`hstu_compile::hstu_attention`: HSTU attention, jagged or dense, with its backward, as a torch.library op."""

from collections.abc import Callable, Hashable
from types import ModuleType

import torch
from torch import Tensor

from hstu_compile.ops import kernel_table
from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_composite, save_inputs, saved_inputs
from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference, hstu_attention_reference
from hstu_compile.ops.mask_tile_states import GRAIN
from hstu_compile.ops.validation import check_attention_arguments, check_attention_values, checks_values

# Everything after q, k, v. The order is the op's contract with the passes.
PARAMETERS = (
    "seq_offsets",
    "seq_lengths",
    "num_targets",
    "num_contextuals",
    "attn_mask",
    "attn_bias",
    "mask_tile_states",
    "max_seq_len",
    "alpha",
    "scaling_seq_len",
    "causal",
    "contextual_seq_len",
    "target_group_size",
    "max_attn_len",
    "min_full_attn_seq_len",
    "targets_share_position",
)
ATTN_MASK, ATTN_BIAS, MASK_TILE_STATES = (
    3 + PARAMETERS.index(name) for name in ("attn_mask", "attn_bias", "mask_tile_states")
)

SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? seq_offsets, Tensor? seq_lengths, Tensor? num_targets, "
    "Tensor? num_contextuals, Tensor? attn_mask, Tensor? attn_bias, Tensor? mask_tile_states, SymInt max_seq_len, "
    "float alpha, Scalar scaling_seq_len, bool causal, SymInt contextual_seq_len, SymInt target_group_size, "
    "SymInt max_attn_len, SymInt min_full_attn_seq_len, bool targets_share_position"
)
torch.library.define("hstu_compile::hstu_attention", f"({SCHEMA}) -> Tensor")
torch.library.define("hstu_compile::hstu_attention_forward", f"({SCHEMA}) -> Tensor")
torch.library.define(
    "hstu_compile::hstu_attention_backward",
    f"(Tensor dout, {SCHEMA}, bool needs_bias_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq_offsets: Tensor | None = None,
    seq_lengths: Tensor | None = None,
    num_targets: Tensor | None = None,
    num_contextuals: Tensor | None = None,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    max_seq_len: int,
    alpha: float,
    scaling_seq_len: float,
    causal: bool = True,
    contextual_seq_len: int = 0,
    target_group_size: int = 1,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    targets_share_position: bool = False,
) -> Tensor:
    """silu(alpha * q kT + attn_bias) / scaling_seq_len * mask @ v, per sequence and head; no softmax.

    Zhai et al., "Actions Speak Louder than Words", arXiv:2402.17152. The mask family is `ops/attention_mask.py`.

    Args:
        q, k: [T, H, attn_dim] (jagged) or [B, N, H, attn_dim] (dense); fp32, fp16 or bf16. The last dimension is
            contiguous, every other stride is free: slices of a packed uvqk buffer are used in place.
        v: [T, H, hidden_dim] or [B, N, H, hidden_dim], the dtype of q.
        seq_offsets: [B + 1] int32 or int64, from 0, never decreasing, at most T. Jagged layout only. Rows of q beyond
            the last offset belong to no sequence: they are never read, their output and gradients are 0.
        seq_lengths: [B], dense layout only: rows and columns from there on are unused, as above. Default: all N.
        num_targets: [B], the candidates at the end of each sequence.
        num_contextuals: [B], the contextual tokens at the start of each; or `contextual_seq_len`, the same for all.
        attn_mask: [B|1, H|1, N, N], bool or a number that multiplies the attention weight (not differentiable).
        attn_bias: [B|1, H|1, N, N], added to the scaled scores, differentiable. N = max_seq_len, also when jagged.
        max_seq_len: at least the longest sequence (it bounds the launch); N when dense.
        alpha: multiplies q kT.
        scaling_seq_len: the divisor.
        causal, target_group_size, max_attn_len, min_full_attn_seq_len, targets_share_position: see `attention_mask`.

    Returns:
        [T, H, hidden_dim] or [B, N, H, hidden_dim], contiguous, the dtype of q, accumulated in fp32. Deterministic.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
    """
    return torch.ops.hstu_compile.hstu_attention(
        q,
        k,
        v,
        seq_offsets,
        seq_lengths,
        num_targets,
        num_contextuals,
        attn_mask,
        attn_bias,
        None,  # mask_tile_states
        max_seq_len,
        alpha,
        scaling_seq_len,
        causal,
        contextual_seq_len,
        target_group_size,
        max_attn_len,
        min_full_attn_seq_len,
        targets_share_position,
    )


def _output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@torch.library.register_fake("hstu_compile::hstu_attention_forward")
def _forward_fake(q, k, v, *args):
    check_attention_arguments(q, k, v, **dict(zip(PARAMETERS, args, strict=True)))
    return _output(q, v)


@torch.library.register_fake("hstu_compile::hstu_attention_backward")
def _backward_fake(dout, q, k, v, *args):
    attn_bias, needs_bias_grad = args[PARAMETERS.index("attn_bias")], args[-1]
    dbias = q.new_empty(0) if not needs_bias_grad or attn_bias is None else attn_bias.new_empty(attn_bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def checked_attention_kernel(q: Tensor, k: Tensor, v: Tensor, args: tuple) -> ModuleType | None:
    named = dict(zip(PARAMETERS, args, strict=True))
    check_attention_arguments(q, k, v, **named)
    pairs = {"has_mask": named["attn_mask"] is not None, "has_bias": named["attn_bias"] is not None}
    kernel = kernel_table.choose_attention(q.device, q.dtype, q.shape[-1], v.shape[-1], **pairs)
    return None if kernel.is_reference else kernel.module()


_kinds = Kinds(checked_attention_kernel)


def attention_features(q: Tensor, k: Tensor, v: Tensor, args: tuple) -> Hashable:
    """All that checks ask for, kernels are chosen by and launches differ in, but for addresses and their alignment and,
    jagged, but for T, and without bias or mask tensor B and N (of which it matters that all arguments agree)."""
    seq_offsets, attn_mask, attn_bias, max_seq_len = args[0], args[4], args[5], args[7]
    shape, batch = q.shape, 0
    sizes: tuple = (shape, k.shape, v.shape, max_seq_len)
    if seq_offsets is not None:
        tokens = shape[:1]
        of_k, of_v = (None if x == shape else (x[:1] == tokens, x[1:]) for x in (k.shape, v.shape))
        sizes = (shape[1:], of_k, of_v, tokens > (1,))
        if attn_bias is None and attn_mask is None:
            batch = seq_offsets.numel()
            sizes = (*sizes, batch > 0, max_seq_len >= 0)
        else:
            sizes = (*sizes, max_seq_len)
    per_sequence = [None if t is None else (t.dtype, t.get_device(), t.numel() - batch, t.stride()) for t in args[:4]]
    cells = [None if t is None else (t.dtype, t.get_device(), t.shape, t.stride(), t.requires_grad) for t in args[4:7]]
    return (
        sizes, q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(), q.stride(), k.stride(),
        v.stride(), *per_sequence, *cells, *args[8:], kernel_table.forced,
    )  # fmt: skip


def for_kernel(named: dict) -> dict:
    states = named.pop("mask_tile_states")
    if states is not None:
        from hstu_compile.ops.kernels.mask_occupancy import TiledMask

        named["attn_mask"] = TiledMask(named["attn_mask"], states, GRAIN)
    scaling_seq_len = named.pop("scaling_seq_len")
    named["scale"] = 1.0 / scaling_seq_len
    return named


def for_reference(named: dict) -> dict:
    del named["mask_tile_states"]
    return named


@torch.library.impl("hstu_compile::hstu_attention_forward", ("CPU", "CUDA"))
def _forward(q, k, v, *args):
    kind = _kinds.kind(attention_features(q, k, v, args), q, k, v, args)
    named = dict(zip(PARAMETERS, args, strict=True))
    if checks_values(q.device):
        check_attention_values(q, **named)
    if kind.kernel is None:
        return hstu_attention_reference(q, k, v, **for_reference(named))
    return kind.kernel.forward(q, k, v, memory=kind.memory, **for_kernel(named))


@torch.library.impl("hstu_compile::hstu_attention_backward", ("CPU", "CUDA"))
def _backward_impl(dout, q, k, v, *args):
    args, needs_bias_grad = args[:-1], args[-1]
    kind = _kinds.kind(attention_features(q, k, v, args), q, k, v, args)
    named = dict(zip(PARAMETERS, args, strict=True))
    if kind.kernel is None:
        named = for_reference(named)
        grads = hstu_attention_backward_reference(dout, q, k, v, needs_bias_grad=needs_bias_grad, **named)
    else:
        named = for_kernel(named)
        grads = kind.kernel.backward(dout, q, k, v, memory=kind.memory, needs_bias_grad=needs_bias_grad, **named)
    dq, dk, dv, dbias = grads
    return dq, dk, dv, q.new_empty(0) if dbias is None else dbias


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        save_inputs(ctx, inputs)
        return torch.ops.hstu_compile.hstu_attention_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        needs_bias_grad = ctx.needs_input_grad[ATTN_BIAS]
        dq, dk, dv, dbias = torch.ops.hstu_compile.hstu_attention_backward(dout, *saved_inputs(ctx), needs_bias_grad)
        grads = [dq, dk, dv] + [None] * len(PARAMETERS)
        if needs_bias_grad:
            grads[ATTN_BIAS] = dbias
        return tuple(grads)


def _with_tile_states(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """hstu_attention by an implementation that wants the tile states of its mask tensor."""

    def call(*inputs):
        if inputs[ATTN_MASK] is not None and inputs[MASK_TILE_STATES] is None:
            mask = _unexpanded(inputs[ATTN_MASK])
            states = torch.ops.hstu_compile.mask_tile_states(mask)
            changed = {ATTN_MASK: mask, MASK_TILE_STATES: states}
            inputs = tuple(changed.get(i, value) for i, value in enumerate(inputs))
        return attention(*inputs)

    return call


def _unexpanded(mask: Tensor) -> Tensor:
    """[B|1, H|1, N, N] with every expanded leading dimension back at size 1."""
    for dim, step in enumerate(mask.stride()[:2]):
        if isinstance(step, int) and step == 0:
            mask = mask[(slice(None),) * dim + (slice(1),)]
    return mask


register_composite(
    "hstu_attention",
    _with_tile_states(torch.ops.hstu_compile.hstu_attention_forward),
    _with_tile_states(_Attention.apply),
)
