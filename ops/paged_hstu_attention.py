"""`hstu_compile::paged_hstu_attention`: new tokens attend to cached history and to themselves; a torch.library op."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hstu_compile.ops import kernel_table
from hstu_compile.ops.call_kinds import Kind, Kinds
from hstu_compile.ops.composite import register_inference_only
from hstu_compile.ops.paged_call import paged_features
from hstu_compile.ops.paged_reference import paged_hstu_attention_reference
from hstu_compile.ops.paged_validation import check_paged_arguments, check_paged_values
from hstu_compile.ops.validation import checks_values

# Everything after the tensors of keys and values. The order is the op's contract with the passes.
PARAMETERS = (
    "seq_offsets",
    "num_targets",
    "num_contextuals",
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

SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor pool, Tensor page_table, Tensor cached_lengths, Tensor seq_offsets, "
    "Tensor? num_targets, Tensor? num_contextuals, SymInt max_seq_len, float alpha, Scalar scaling_seq_len, "
    "bool causal, SymInt contextual_seq_len, SymInt target_group_size, SymInt max_attn_len, "
    "SymInt min_full_attn_seq_len, bool targets_share_position"
)
torch.library.define("hstu_compile::paged_hstu_attention", f"({SCHEMA}) -> Tensor")


def paged_hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    *,
    seq_offsets: Tensor,
    num_targets: Tensor | None = None,
    num_contextuals: Tensor | None = None,
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
    """The last rows of `hstu_attention` of whole sequences: those of the new tokens. Inference only.

    A sequence is `cached_lengths` tokens of history in pages, then its new tokens: fresh history, then candidates. Of
    the pool nothing is read beyond `cached_lengths`: whether `append_kv` has run in between makes no difference.

    Args:
        q, k, v: [T, H, D], the new tokens; fp32, fp16 or bf16. The last dimension is contiguous, the other strides
            are free.
        pool: [num_pages, 2, page_size, H, D], contiguous, the dtype of q: see `append_kv`.
        page_table: [B, max_pages] int32: page i of a sequence holds its tokens i * page_size ... . What lies beyond
            `cached_lengths` is not read.
        cached_lengths: [B] int32 or int64.
        seq_offsets: [B + 1] int32 or int64, of the new tokens. Rows of q beyond the last offset belong to no sequence:
            they are never read, their output is 0.
        num_targets: [B], the candidates at the end of each sequence, at most its new tokens.
        max_seq_len: at least the longest whole sequence.
        num_contextuals, alpha, scaling_seq_len and the mask: as in `hstu_attention`, for whole sequences and the
            positions of the new tokens in them.

    Returns:
        [T, H, D], contiguous, the dtype of q, accumulated in fp32. Deterministic.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
        RuntimeError: autograd is on and an input requires a gradient.
    """
    return torch.ops.hstu_compile.paged_hstu_attention(
        q,
        k,
        v,
        pool,
        page_table,
        cached_lengths,
        seq_offsets,
        num_targets,
        num_contextuals,
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


@torch.library.register_fake("hstu_compile::paged_hstu_attention")
def _paged_fake(q, k, v, pool, page_table, cached_lengths, *args):
    named = dict(zip(PARAMETERS, args, strict=True))
    check_paged_arguments(q, k, v, pool, page_table, cached_lengths, **named)
    return q.new_empty(q.shape)


def checked_kernel(args: tuple) -> ModuleType | None:
    """The kernel for such calls, whose arguments are checked; None for the reference."""
    q, named = args[0], dict(zip(PARAMETERS, args[6:], strict=True))
    check_paged_arguments(*args[:6], **named)
    kernel = kernel_table.choose_paged_attention(q.device, q.dtype, q.shape[-1])
    return None if kernel.is_reference else kernel.module()


def attention_features(args: tuple) -> tuple:
    """What calls of one kind, and no others, have in common."""
    _, _, _, pool, page_table, cached_lengths, seq_offsets, num_targets, num_contextuals, max_seq_len = args[:10]
    per_sequence = (seq_offsets, cached_lengths, num_targets, num_contextuals)
    tensors = paged_features(args[:3], pool, page_table, per_sequence)
    return tensors, max_seq_len >= 0, *args[10:], kernel_table.forced


def _named(args: tuple) -> dict[str, Any]:
    """By name, what comes after the tensors of keys and values, the values checked."""
    named = dict(zip(PARAMETERS, args[6:], strict=True))
    if checks_values(args[0].device):
        check_paged_values(args[0], *args[3:6], **named)
    return named


def run_kernel(kind: Kind, args: tuple, gate: dict[str, Any] | None = None) -> Tensor:
    """Of a kind that has a kernel. gate: what comes behind the attention, as the kernel takes it."""
    named, kernel = _named(args), kind.kernel
    assert kernel is not None
    return kernel.forward(*args[:6], memory=kind.memory, gate=gate, scale=1.0 / named.pop("scaling_seq_len"), **named)


_kinds = Kinds(checked_kernel)


@torch.library.impl("hstu_compile::paged_hstu_attention", ("CPU", "CUDA"))
def _paged(*args):
    kind = _kinds.kind(attention_features(args), args)
    if kind.kernel is not None:
        return run_kernel(kind, args)
    return paged_hstu_attention_reference(*args[:6], **_named(args))


register_inference_only("paged_hstu_attention")
