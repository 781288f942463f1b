"""The second half of a sum without atomics: what each program has summed for itself, added up in a fixed order."""

import functools
from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch

TILE = 4096  # elements
COLUMNS = 32  # of a tile whose columns are sums of their own: a line of memory
MAX_COLUMNS = 512  # of a tile that is one sum
WARPS = 8

Programs = Callable[[Extent], int]  # how many programs have a share


@triton.jit
def sum_columns(shares, out, tile, rows, N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The `tile`-th COLS elements of out; or, where those are sums of K columns each, its `tile`-th element."""
    first = tile * COLS if K == 1 else tile * K
    end = N if K == 1 else first + K
    sums = tl.zeros((ROWS, COLS), tl.float32)
    for row0 in range(0, rows, ROWS):
        row = row0 + tl.arange(0, ROWS)
        for col0 in range(0, K, COLS):
            col = first + col0 + tl.arange(0, COLS)
            inside = (row < rows)[:, None] & (col < end)[None, :]
            sums += tl.load(shares + row[:, None] * (N * K) + col[None, :], mask=inside, other=0.0)
    columns = tl.sum(sums, axis=0)
    if K == 1:
        col = first + tl.arange(0, COLS)
        tl.store(out + col, columns.to(out.dtype.element_ty), mask=col < end)
    else:
        tl.store(out + tile, tl.sum(columns, axis=0).to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["rows"])
def sum_shares_kernel(
    shares, first, second, rows, N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """first [N], second [N] = shares [2, rows, N, K] summed over rows and K; each of them may be None."""
    tile = tl.program_id(0)
    if tile < TILES:
        if first is not None:
            sum_columns(shares, first, tile, rows, N, K, ROWS, COLS)
    else:
        if second is not None:
            sum_columns(shares + rows * (N * K), second, tile - TILES, rows, N, K, ROWS, COLS)


def sum_launches(
    shares: Tensor, first: Tensor | None, second: Tensor | None, programs: Programs, extent: Extent
) -> list[Launch]:
    """shares [2, programs(extent), groups, width] fp32, summed to the shapes of `first` and `second`.

    Those are contiguous, broadcast against [groups, width], and may be absent. One launch, if they have one shape.
    """
    if first is not None and second is not None and first.shape != second.shape:
        return [
            *sum_launches(shares, first, None, programs, extent),
            *sum_launches(shares, None, second, programs, extent),
        ]
    like = second if first is None else first
    groups, width = shares.shape[2:]
    size, per_sum = like.numel(), 1 if like.shape[-1] == width else width
    rows_a_program = 1 if like.dim() == 2 and like.shape[0] == groups else groups
    cols = COLUMNS if per_sum == 1 else min(triton.next_power_of_2(per_sum), MAX_COLUMNS)
    tiles = triton.cdiv(size, cols) if per_sum == 1 else size
    sizes = functools.partial(sum_sizes, programs, rows_a_program, 2 * tiles)
    number, rows = sizes(extent)
    constants = {"N": size, "K": per_sum, "TILES": tiles, "ROWS": TILE // cols, "COLS": cols, "num_warps": WARPS}
    return [Launch(sum_shares_kernel, number, (shares, first, second, rows["rows"]), constants, sizes)]


def sum_sizes(programs: Programs, rows_a_program: int, number: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return number, {"rows": programs(extent) * rows_a_program}
