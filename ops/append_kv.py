"""`hstu_compile::append_kv`: new keys and values into the pages of a paged cache, as a torch.library op."""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_inference_only
from hstu_compile.ops.paged_call import paged_features
from hstu_compile.ops.paged_reference import append_kv_reference
from hstu_compile.ops.paged_validation import check_pages, check_per_sequence

torch.library.define(
    "hstu_compile::append_kv",
    "(Tensor(a!) pool, Tensor k, Tensor v, Tensor seq_offsets, Tensor page_table, Tensor cached_lengths, "
    "Tensor? num_targets, Tensor? valid_lengths) -> ()",
)


def append_kv(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None = None,
    valid_lengths: Tensor | None = None,
) -> None:
    """Write the new history tokens' keys and values to their places in the pool; nothing else is written.

    Args:
        pool: [num_pages, 2, page_size, H, D], contiguous: pages of keys and of values of one layer. Page sizes 16, 32,
            64, 128 and 256.
        k, v: [T, H, D], the new tokens; the dtype of pool. The last dimension is contiguous, the other strides are
            free.
        seq_offsets: [B + 1] int32 or int64: where each sequence's new tokens begin. Rows of k and v beyond the last
            offset belong to no sequence.
        page_table: [B, max_pages] int32: page i of a sequence holds its tokens i * page_size ... .
        cached_lengths: [B] int32 or int64: tokens that the pages held before; the first new one stands there.
        num_targets: [B], the candidates at the end of each sequence, which are not stored.
        valid_lengths: [B] int32 or int64: tokens that the pages hold already, of which some may be new tokens again.
            Pages that these fill are not written.

    A token whose page is not in the table, or not in the pool, is not stored. No page may be in two places of the
    table that are written.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
    """
    torch.ops.hstu_compile.append_kv(pool, k, v, seq_offsets, page_table, cached_lengths, num_targets, valid_lengths)


def _check(pool, k, v, seq_offsets, page_table, cached_lengths, num_targets, valid_lengths) -> None:
    check_pages(k, v, pool, page_table, cached_lengths, seq_offsets)
    check_per_sequence("num_targets", num_targets, seq_offsets)
    check_per_sequence("valid_lengths", valid_lengths, seq_offsets)


@torch.library.register_fake("hstu_compile::append_kv")
def _append_kv_fake(*args):
    _check(*args)


def _checked_kernel(*args) -> ModuleType | None:
    _check(*args)
    if not args[0].is_cuda or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("hstu_compile.ops.kernels.append_kv")


_kinds = Kinds(_checked_kernel)


@torch.library.impl("hstu_compile::append_kv", ("CPU", "CUDA"))
def _append_kv(*args):
    pool, k, v, seq_offsets, page_table, *per_sequence = args
    kind = _kinds.kind(paged_features((k, v), pool, page_table, (seq_offsets, *per_sequence)), *args)
    if kind.kernel is None:
        append_kv_reference(*args)
    else:
        kind.kernel.append(*args, memory=kind.memory)


register_inference_only("append_kv")
