"""`hstu_compile::table_lookup`: a gather from a tiny table whose gradient needs no atomics.

The forward is the ATen gather itself, under autograd as without, so that the compiler fuses it with its neighbours.
Only the backward is an op of ours, `hstu_compile::table_grad`: millions of gradients fall on a few hundred entries,
which as a scatter with atomics costs a hundred times the reading of the bytes.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_composite

torch.library.define("hstu_compile::table_lookup", "(Tensor table, Tensor index) -> Tensor")
torch.library.define("hstu_compile::table_grad", "(Tensor grad, Tensor index, SymInt table_size) -> Tensor")


def table_lookup(table: Tensor, index: Tensor) -> Tensor:
    """table[index], differentiable once in `table`.

    Args:
        table: [V] or [V, C], floating point.
        index: [...] int32 or int64, 0 <= index < V: the compiler's gather checks that on a CPU and on a GPU.

    Returns:
        [...] or [..., C], the dtype of `table`.

    Raises:
        ValueError: a rank or dtype does not fit.
        IndexError: an index is out of range (on a CPU; a device-side assertion on a GPU).
    """
    return torch.ops.hstu_compile.table_lookup(table, index)


def table_grad(grad: Tensor, index: Tensor, table_size: int) -> Tensor:
    """The gradient of `table_lookup`: out[v] = sum of grad[k] over all k with index[k] = v.

    Args:
        grad: [*index.shape] or [*index.shape, C], floating point, any strides (copied unless contiguous).
        index: [...] int16, int32 or int64; entries outside 0 <= index < table_size count for nothing.
        table_size: V.

    Returns:
        [V] or [V, C], the dtype of `grad`, accumulated in fp32 (fp64 for fp64). Deterministic.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    return torch.ops.hstu_compile.table_grad(grad, index, table_size)


def _gather(table: Tensor, index: Tensor) -> Tensor:
    if not table.is_floating_point() or table.dim() not in (1, 2):
        raise ValueError(f"table: expected floating point [V] or [V, C], got {table.dtype} {list(table.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index: expected int32 or int64, got {index.dtype}")
    return torch.index_select(table, 0, index.reshape(-1)).view(*index.shape, *table.shape[1:])


class _TableLookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, index):
        ctx.table_size = table.shape[0]
        # Saved narrow: the backward reads it once for every gradient element.
        narrow = torch.int16 if ctx.table_size <= torch.iinfo(torch.int16).max else torch.int32
        ctx.save_for_backward(index.to(narrow))
        return _gather(table, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        # Made contiguous here, in ATen, where the compiler fuses the copy into whatever computes grad.
        return table_grad(grad.contiguous(), index, ctx.table_size), None


register_composite("table_lookup", _gather, _TableLookup.apply)


def _check_grad(grad: Tensor, index: Tensor) -> None:
    if (
        not grad.is_floating_point()
        or grad.dim() - index.dim() not in (0, 1)
        or grad.shape[: index.dim()] != index.shape
    ):
        raise ValueError(
            f"grad: expected floating point of the index's shape {list(index.shape)}, or that and [C]; "
            f"got {grad.dtype} {list(grad.shape)}"
        )
    if index.dtype not in (torch.int16, torch.int32, torch.int64):
        raise ValueError(f"index: expected int16, int32 or int64, got {index.dtype}")


def table_grad_reference(grad: Tensor, index: Tensor, table_size: int) -> Tensor:
    """`table_grad` in plain PyTorch."""
    inside = (index >= 0) & (index < table_size)
    out = grad.new_zeros(table_size, *grad.shape[index.dim() :], dtype=torch.promote_types(grad.dtype, torch.float32))
    return out.index_add_(0, index[inside].long(), grad[inside].to(out.dtype)).to(grad.dtype)


@torch.library.register_fake("hstu_compile::table_grad")
def _table_grad_fake(grad, index, table_size):
    _check_grad(grad, index)
    return grad.new_empty(table_size, *grad.shape[index.dim() :])


def _checked_kernel(grad: Tensor, index: Tensor) -> ModuleType | None:
    _check_grad(grad, index)
    has_kernel = grad.is_cuda and importlib.util.find_spec("triton") is not None
    return importlib.import_module("hstu_compile.ops.kernels.table_grad") if has_kernel else None


_kinds = Kinds(_checked_kernel)


def _features(grad: Tensor, index: Tensor, table_size: int) -> tuple:
    """All that checks ask for and launches differ in, but for how many lookups there are."""
    shape, dims = grad.shape, index.dim()
    tensors = (grad.dtype, grad.get_device(), index.dtype, index.get_device())
    return *tensors, shape[:dims] == index.shape, shape[dims:], dims, table_size


@torch.library.impl("hstu_compile::table_grad", ("CPU", "CUDA"))
def _table_grad(grad, index, table_size):
    kind = _kinds.kind(_features(grad, index, table_size), grad, index)
    if kind.kernel is None:
        return table_grad_reference(grad, index, table_size)
    return kind.kernel.table_grad(grad, index, table_size, kind.memory)
