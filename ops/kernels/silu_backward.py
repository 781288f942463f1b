"""dx = dy * silu'(x), between slices of longer rows; dy and dx may be the same."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch
from hstu_compile.ops.kernels.silu import silu_and_grad

BLOCK = 2048  # elements a program


@triton.jit(do_not_specialize=["rows"])
def silu_backward_kernel(
    dy, x, dx, dy_stride, x_stride, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr
):
    """dy, x, dx [rows, WIDTH]; x and dx have one stride."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = i // WIDTH
    col = i % WIDTH
    inside = row < rows
    half = 0.5 * tl.load(x + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    # 0 stays 0: what lies in unused rows of x may be NaN.
    grad = tl.where(grad == 0.0, 0.0, grad * silu_and_grad(half, FAST)[1])
    tl.store(dx + row * x_stride + col, grad.to(dx.dtype.element_ty), mask=inside)


def silu_backward_launch(dy: Tensor, x: Tensor, dx: Tensor, extent: Extent) -> Launch:
    """dy, x, dx: [T, WIDTH] or [B, N, WIDTH], rows evenly apart; x lies as dx does. Extents as in attention."""
    width = dx.shape[-1]
    sizes = functools.partial(silu_backward_sizes, dx.dim() == 3, width)
    programs, numbers = sizes(extent)
    constants = {"WIDTH": width, "BLOCK": BLOCK, "FAST": dx.is_cuda and dx.element_size() == 2}
    arguments = (dy, x, dx, dy.stride(-2), x.stride(-2), numbers["rows"])
    return Launch(silu_backward_kernel, programs, arguments, constants, sizes)


def silu_backward_sizes(dense: bool, width: int, extent: Extent) -> tuple[int, dict[str, int]]:
    rows = extent.rows * (extent.max_seq_len if dense else 1)
    return -(-rows * width // BLOCK), {"rows": rows}


def evenly_apart(t: Tensor) -> Tensor:
    """t, or a copy whose rows are all as far apart as two of them."""
    even = t.stride(-1) == 1 and (t.dim() == 2 or t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
    return t if even else t.clone(memory_format=torch.contiguous_format)


def slices_of(t: Tensor, q: Tensor, k: Tensor, v: Tensor, columns: dict[str, int]) -> tuple[Tensor, ...]:
    """The columns of t from q_at, k_at and v_at on, in the shapes of q, k and v."""
    return tuple(
        t.narrow(-1, columns[f"{name}_at"], like.shape[-2] * like.shape[-1]).unflatten(-1, like.shape[-2:])
        for name, like in (("q", q), ("k", k), ("v", v))
    )


def u_slices(du: Tensor, x: Tensor, dx: Tensor, u_at: int) -> tuple[Tensor, Tensor, Tensor]:
    """du, and its columns of x and dx."""
    return evenly_apart(du), *(t.narrow(-1, u_at, du.shape[-1]) for t in (x, dx))
