"""dx = dy * silu'(x), or dx = dy, between slices of longer rows; dy and dx may be the same."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch
from hstu_compile.ops.kernels.silu import silu_and_grad
from hstu_compile.ops.kernels.strides import in_one_piece

BLOCK = 2048  # elements a program


# Where the gradient of a slice of x, or of its silu, goes, [..., H, D] with rows evenly apart; and what it is the silu
# of, which lies as that does, or None.
Into = tuple[Tensor, Tensor | None]


@triton.jit(do_not_specialize=["rows"])
def silu_backward_kernel(
    dy, x, dx, dy_stride, x_stride, rows, WIDTH: tl.constexpr, DIM: tl.constexpr, DY_HEAD: tl.constexpr,
    X_HEAD: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dy, x, dx [rows, WIDTH / DIM, DIM]; x, which may be None, and dx have the same strides."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = i // WIDTH
    col = i % WIDTH
    inside = row < rows
    dy_col = col
    x_col = col
    if DIM < WIDTH:
        dy_col = col // DIM * DY_HEAD + col % DIM
        x_col = col // DIM * X_HEAD + col % DIM
    if x is not None:
        half = 0.5 * tl.load(x + row * x_stride + x_col, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_stride + dy_col, mask=inside, other=0.0).to(tl.float32)
        # 0 stays 0: what lies in unused rows of x may be NaN.
        grad = tl.where(grad == 0.0, 0.0, grad * silu_and_grad(half, FAST)[1])
    else:
        grad = tl.load(dy + row * dy_stride + dy_col, mask=inside, other=0.0)
    tl.store(dx + row * x_stride + x_col, grad.to(dx.dtype.element_ty), mask=inside)


def silu_backward_launch(dy: Tensor, into: Into, extent: Extent) -> Launch:
    """dy: [T, H, D] or [B, N, H, D], rows evenly apart. Extents as in attention."""
    dx, x = into
    heads, dim = dx.shape[-2:]
    width = heads * dim
    sizes = functools.partial(silu_backward_sizes, dx.dim() == 4, width)
    programs, numbers = sizes(extent)
    steps = {"DIM": dim, "DY_HEAD": dy.stride(-2), "X_HEAD": dx.stride(-2)}
    if in_one_piece(dy) and in_one_piece(dx):
        steps = {"DIM": width, "DY_HEAD": width, "X_HEAD": width}
    constants = {"WIDTH": width, **steps, "BLOCK": BLOCK, "FAST": dx.is_cuda and dx.element_size() == 2}
    arguments = (dy, x, dx, dy.stride(-3), dx.stride(-3), numbers["rows"])
    return Launch(silu_backward_kernel, programs, arguments, constants, sizes)


def silu_backward_sizes(dense: bool, width: int, extent: Extent) -> tuple[int, dict[str, int]]:
    rows = extent.rows * (extent.max_seq_len if dense else 1)
    return -(-rows * width // BLOCK), {"rows": rows}
