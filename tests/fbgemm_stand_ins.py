"""fbgemm's jagged ops, for machines without fbgemm_gpu: the same names, signatures and dispatch, from plain PyTorch.

Importing this module makes `torch.ops.fbgemm` usable: fbgemm_gpu itself where it can be imported, else these.
As in fbgemm_gpu, the public names are composites of the `_forward` ops, which carry the gradient.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor


def _rows(table: Tensor, index: Tensor, exists: Tensor, otherwise: float) -> Tensor:
    """table[index] where `exists`, else a row of one number; any index will do there."""
    if table.shape[0] == 0:
        return table.new_full((*index.shape, table.shape[1]), otherwise)
    found = table.index_select(0, torch.where(exists, index, 0).flatten()).view(*index.shape, table.shape[1])
    return found.masked_fill_(~exists[..., None], otherwise)


def pad(values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0.0) -> Tensor:
    """[T, D] -> [B, N, D]"""
    start, end = offsets[0][:-1, None], offsets[0][1:, None]
    token = start + torch.arange(max_lengths[0], device=start.device)
    return _rows(values, token, token < end, padding_value)


def unpad(dense: Tensor, x_offsets: list[Tensor], total_L: int | None = None) -> Tensor:
    """[B, N, D] -> [T, D]; waits for the device where it is not told T."""
    (offsets,), (B, N, _) = x_offsets, dense.shape
    total = int(offsets[-1]) if total_L is None else total_L
    token = torch.arange(total, device=offsets.device, dtype=offsets.dtype)
    sequence = torch.searchsorted(offsets, token, right=True) - 1  # -1 and B: a token of none
    column = token - offsets[sequence.clamp(0, B)]
    exists = (sequence >= 0) & (sequence < B) & (column < N)
    return _rows(dense.flatten(0, 1), sequence * N + column, exists, 0.0)


@contextlib.contextmanager
def in_plain_pytorch() -> Iterator[None]:
    """Models call the plain functions above: for float64, which fbgemm_gpu does not have everywhere."""
    with (
        mock.patch.object(torch.ops.fbgemm, "jagged_to_padded_dense", pad),
        mock.patch.object(torch.ops.fbgemm, "dense_to_jagged", lambda *args: (unpad(*args), args[1])),
    ):
        yield


def _register() -> torch.library.Library:
    library = torch.library.Library("fbgemm", "FRAGMENT")
    # No defaults where there is a gradient: an argument that equals its default would not reach the backward.
    padded = "(Tensor values, Tensor[] offsets, SymInt[] max_lengths, float padding_value{}) -> Tensor"
    library.define("jagged_to_padded_dense" + padded.format("=0."))
    library.define("jagged_to_padded_dense_forward" + padded.format(""))
    library.define("dense_to_jagged(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) -> (Tensor, Tensor[])")
    library.define("dense_to_jagged_forward(Tensor dense, Tensor[] x_offsets, SymInt? total_L) -> Tensor")

    def pad_fake(values, offsets, max_lengths, padding_value=0.0):
        return values.new_empty(offsets[0].shape[0] - 1, max_lengths[0], values.shape[1])

    def unpad_fake(dense, x_offsets, total_L=None):
        total = torch.library.get_ctx().new_dynamic_size() if total_L is None else total_L
        return dense.new_empty(total, dense.shape[2])

    def keep_for_backward(ctx, inputs, output):
        tensor, offsets, *_ = inputs
        ctx.save_for_backward(*offsets)
        ctx.size = tensor.shape[0] if output.dim() == 3 else tensor.shape[1]

    def pad_backward(ctx, grad):
        return torch.ops.fbgemm.dense_to_jagged_forward(grad, list(ctx.saved_tensors), ctx.size), [None], None, None

    def unpad_backward(ctx, grad):
        padded = torch.ops.fbgemm.jagged_to_padded_dense_forward(grad, list(ctx.saved_tensors), [ctx.size], 0.0)
        return padded, [None], None

    for name, forward, fake, backward in (
        ("jagged_to_padded_dense_forward", pad, pad_fake, pad_backward),
        ("dense_to_jagged_forward", unpad, unpad_fake, unpad_backward),
    ):
        library.impl(name, forward, "CPU")
        library.impl(name, forward, "CUDA")
        torch.library.register_fake(f"fbgemm::{name}", fake, lib=library)
        torch.library.register_autograd(f"fbgemm::{name}", backward, setup_context=keep_for_backward, lib=library)

    def public_pad(values, offsets, max_lengths, padding_value=0.0):
        return torch.ops.fbgemm.jagged_to_padded_dense_forward(values, offsets, max_lengths, padding_value)

    def public_unpad(dense, x_offsets, total_L=None):
        return torch.ops.fbgemm.dense_to_jagged_forward(dense, x_offsets, total_L), x_offsets

    library.impl("jagged_to_padded_dense", public_pad, "CompositeImplicitAutograd")
    library.impl("dense_to_jagged", public_unpad, "CompositeImplicitAutograd")
    return library


try:
    import fbgemm_gpu  # noqa: F401
except ImportError:
    _library = _register()  # lives as long as the module
