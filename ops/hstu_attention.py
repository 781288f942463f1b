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
from hstu_compile.ops.relative_bias import PARAMETERS as RELATIVE_BIAS
from hstu_compile.ops.relative_bias import SCHEMA as RELATIVE_BIAS_SCHEMA
from hstu_compile.ops.relative_bias import RelativeBias
from hstu_compile.ops.validation import check_attention_arguments, check_attention_values, checks_values

# Everything after q, k, v. The order is the op's contract with the passes.
PARAMETERS = (
    "seq_offsets",
    "seq_lengths",
    "num_targets",
    "num_contextuals",
    "attn_mask",
    "attn_bias",
    *RELATIVE_BIAS,
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
ATTN_MASK, MASK_TILE_STATES = (3 + PARAMETERS.index(name) for name in ("attn_mask", "mask_tile_states"))
BIASES = tuple(3 + PARAMETERS.index(name) for name in ("attn_bias", "position_bias", "time_bias"))  # with a gradient

SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? seq_offsets, Tensor? seq_lengths, Tensor? num_targets, "
    f"Tensor? num_contextuals, Tensor? attn_mask, Tensor? attn_bias, {RELATIVE_BIAS_SCHEMA}, "
    "Tensor? mask_tile_states, SymInt max_seq_len, float alpha, Scalar scaling_seq_len, bool causal, "
    "SymInt contextual_seq_len, SymInt target_group_size, SymInt max_attn_len, SymInt min_full_attn_seq_len, "
    "bool targets_share_position"
)
NEEDS = ("needs_bias_grad", "needs_position_bias_grad", "needs_time_bias_grad")
torch.library.define("hstu_compile::hstu_attention", f"({SCHEMA}) -> Tensor")
torch.library.define("hstu_compile::hstu_attention_forward", f"({SCHEMA}) -> Tensor")
torch.library.define(
    "hstu_compile::hstu_attention_backward",
    f"(Tensor dout, {SCHEMA}, {', '.join(f'bool {name}' for name in NEEDS)}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
    position_bias: Tensor | None = None,
    time_bias: Tensor | None = None,
    row_times: Tensor | None = None,
    col_times: Tensor | None = None,
    time_boundaries: Tensor | None = None,
    time_symmetric: bool = False,
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
    """silu(alpha * q kT + bias) / scaling_seq_len * mask @ v, per sequence and head; no softmax.

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
        position_bias: [H|1, 2N - 1], floating point, any strides, differentiable. To the scaled score of row i and
            column j position_bias[h, N - 1 + i - j] is added.
        time_bias: [H|1, K + 1], the same: time_bias[h, bucket(row_times[b, i] - col_times[b, j])]. bucket(d) is
            the number of time_boundaries <= d (of |d|, if time_symmetric; see `relative_bias` for what wraps around).
        row_times, col_times: [B|1, N], any strides, int32, int64, fp32 or fp64; also when jagged. What lies beyond a
            sequence is never read.
        time_boundaries: [K], never decreasing, the dtype of the times.
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
        position_bias,
        time_bias,
        row_times,
        col_times,
        time_boundaries,
        time_symmetric,
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
    biases = (args[at - 3] for at in BIASES)
    grads = [
        q.new_empty(0) if bias is None or not needed else bias.new_empty(bias.shape)
        for bias, needed in zip(biases, args[-3:], strict=True)
    ]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), *grads


def checked_attention_kernel(q: Tensor, k: Tensor, v: Tensor, args: tuple) -> ModuleType | None:
    named = dict(zip(PARAMETERS, args, strict=True))
    check_attention_arguments(q, k, v, **named)
    pairs = {"has_mask": named["attn_mask"] is not None, "has_bias": named["attn_bias"] is not None}
    kernel = kernel_table.choose_attention(q.device, q.dtype, q.shape[-1], v.shape[-1], **pairs)
    return None if kernel.is_reference else kernel.module()


_kinds = Kinds(checked_attention_kernel)


def attention_features(q: Tensor, k: Tensor, v: Tensor, args: tuple) -> Hashable:
    """All that checks ask for, kernels are chosen by and launches differ in, but for addresses and their alignment and,
    jagged without mask tensor, but for T, and without bias B and N (of which it matters that all arguments agree)."""
    seq_offsets, attn_mask, max_seq_len = args[0], args[4], args[13]
    shape = q.shape
    tokens, batch = shape[:1], 0
    sizes: tuple = (shape, k.shape, v.shape, max_seq_len)
    if seq_offsets is not None and attn_mask is None:
        sizes = (tokens == k.shape[:1] == v.shape[:1], tokens > (1,), max_seq_len)
        if args[5] is None and args[6] is None and args[7] is None:
            batch = seq_offsets.numel()
            sizes = (*sizes[:2], batch > 0, max_seq_len >= 0)
    per_sequence = [None if t is None else (t.dtype, t.get_device(), t.numel() - batch, t.stride()) for t in args[:4]]
    cells = [None if t is None else (t.dtype, t.get_device(), t.shape, t.stride(), t.requires_grad) for t in args[4:11]]
    states = None if args[12] is None else (args[12].dtype, args[12].get_device(), args[12].shape, args[12].stride())
    return (
        sizes, q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(), shape[1:], k.shape[1:],
        v.shape[1:], q.stride(), k.stride(), v.stride(), *per_sequence, *cells, args[11], states, *args[14:],
        kernel_table.forced,
    )  # fmt: skip


def for_kernel(named: dict) -> dict:
    states = named.pop("mask_tile_states")
    if states is not None:
        from hstu_compile.ops.kernels.mask_occupancy import TiledMask

        named["attn_mask"] = TiledMask(named["attn_mask"], states, GRAIN)
    relative_bias = RelativeBias(*(named.pop(name) for name in RELATIVE_BIAS))
    named["relative_bias"] = relative_bias if relative_bias.is_given else None
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
    args, needs = args[:-3], dict(zip(NEEDS, args[-3:], strict=True))
    kind = _kinds.kind(attention_features(q, k, v, args), q, k, v, args)
    named = dict(zip(PARAMETERS, args, strict=True))
    if kind.kernel is None:
        named = for_reference(named)
        grads = hstu_attention_backward_reference(dout, q, k, v, **needs, **named)
    else:
        named = for_kernel(named)
        grads = kind.kernel.backward(dout, q, k, v, memory=kind.memory, **needs, **named)
    return tuple(q.new_empty(0) if grad is None else grad for grad in grads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        save_inputs(ctx, inputs)
        return torch.ops.hstu_compile.hstu_attention_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        needs = [ctx.needs_input_grad[at] for at in BIASES]
        dq, dk, dv, *dbiases = torch.ops.hstu_compile.hstu_attention_backward(dout, *saved_inputs(ctx), *needs)
        grads = [dq, dk, dv] + [None] * len(PARAMETERS)
        for at, needed, dbias in zip(BIASES, needs, dbiases, strict=True):
            grads[at] = dbias if needed else None
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
