"""fbgemm's jagged ops, for machines without fbgemm_gpu: the same names, signatures and dispatch, from plain PyTorch.

Importing this module makes `torch.ops.fbgemm` usable: fbgemm_gpu itself where it can be imported, else these.
As in fbgemm_gpu, the public names are composites of the `_forward` ops, which carry the gradient.
"""

import torch
from torch import Tensor

try:
    import fbgemm_gpu  # noqa: F401
except ImportError:
    _library = torch.library.Library("fbgemm", "FRAGMENT")
    for _suffix in ("", "_forward"):
        _library.define(
            f"jagged_to_padded_dense{_suffix}"
            "(Tensor values, Tensor[] offsets, SymInt[] max_lengths, float padding_value=0.) -> Tensor"
        )
    _library.define("dense_to_jagged(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) -> (Tensor, Tensor[])")
    _library.define("dense_to_jagged_forward(Tensor dense, Tensor[] x_offsets, SymInt? total_L=None) -> Tensor")

    def _places(offsets: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """[B, N]: which token stands at a padded place, and whether one does."""
        column = torch.arange(max_length, device=offsets.device)
        used = column < (offsets[1:] - offsets[:-1])[:, None]
        return torch.where(used, offsets[:-1, None] + column, 0), used

    def _pad(values: Tensor, offsets: list[Tensor], max_lengths: list[int], padding_value: float = 0.0) -> Tensor:
        source, used = _places(offsets[0], max_lengths[0])
        if values.shape[0] == 0:
            return values.new_full((*source.shape, values.shape[1]), padding_value)
        return torch.where(used[..., None], values[source], padding_value)

    def _unpad(dense: Tensor, x_offsets: list[Tensor], total_L: int | None = None) -> Tensor:
        source, used = _places(x_offsets[0], dense.shape[1])
        total = int(x_offsets[0][-1]) if total_L is None else total_L
        return dense.new_zeros(total, dense.shape[2]).index_put((source[used],), dense[used])

    def _pad_fake(values, offsets, max_lengths, padding_value=0.0):
        return values.new_empty(offsets[0].shape[0] - 1, max_lengths[0], values.shape[1])

    def _unpad_fake(dense, x_offsets, total_L=None):
        total = torch.library.get_ctx().new_dynamic_size() if total_L is None else total_L
        return dense.new_empty(total, dense.shape[2])

    def _keep_for_backward(ctx, inputs, output):
        tensor, offsets, *rest = inputs
        ctx.save_for_backward(*offsets)
        ctx.size = tensor.shape[0] if output.dim() == 3 else tensor.shape[1]

    def _pad_backward(ctx, grad):
        return torch.ops.fbgemm.dense_to_jagged_forward(grad, list(ctx.saved_tensors), ctx.size), None, None, None

    def _unpad_backward(ctx, grad):
        padded = torch.ops.fbgemm.jagged_to_padded_dense_forward(grad, list(ctx.saved_tensors), [ctx.size], 0.0)
        return padded, None, None

    for _name, _forward, _fake, _backward in (
        ("jagged_to_padded_dense_forward", _pad, _pad_fake, _pad_backward),
        ("dense_to_jagged_forward", _unpad, _unpad_fake, _unpad_backward),
    ):
        _library.impl(_name, _forward, "CPU")
        _library.impl(_name, _forward, "CUDA")
        torch.library.register_fake(f"fbgemm::{_name}", _fake, lib=_library)
        torch.library.register_autograd(f"fbgemm::{_name}", _backward, setup_context=_keep_for_backward, lib=_library)

    def _public_pad(values, offsets, max_lengths, padding_value=0.0):
        return torch.ops.fbgemm.jagged_to_padded_dense_forward(values, offsets, max_lengths, padding_value)

    def _public_unpad(dense, x_offsets, total_L=None):
        return torch.ops.fbgemm.dense_to_jagged_forward(dense, x_offsets, total_L), x_offsets

    _library.impl("jagged_to_padded_dense", _public_pad, "CompositeImplicitAutograd")
    _library.impl("dense_to_jagged", _public_unpad, "CompositeImplicitAutograd")
