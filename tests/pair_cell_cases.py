"""Cells of a bias or mask tensor as the Hopper kernels address them, against the matrix, from memory between NaN.

`test_sm90_pairs.py` runs this in the Triton interpreter, in a process of its own: see mask_interval_cases.py.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
import triton
import triton.language as tl

from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels.attention_sm90_pairs import read_cells

NAN = float("nan")


@triton.jit
def read_tile(
    out, cells, z, head, row0, col0, length, N, KEYS_FIRST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    values = read_cells(cells, z, head, row0 + rows, col0, cols, length, N, KEYS_FIRST)
    tl.store(out + rows * COLS + cols, values)


@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("N", [19, 22, 32])
@pytest.mark.parametrize("kind", ["plain", "transposed", "sliced", "expanded", "rows"])
def test_tiles(kind: str, N: int, keys_first: bool) -> None:
    B, H, rows, cols = 2, 3, 8, 16
    storage = torch.full((B, H, N + 2, N + 4), NAN)
    x = {
        "plain": storage[:, :, :N, :N],
        "transposed": storage[:, :, :N, :N].mT,
        "sliced": storage[:, :, 1 : N + 1, 1 : N + 1],
        "expanded": storage[:, :1, :N, :N],
        "rows": torch.full((B, 1, N, 1), NAN),
    }[kind]
    x.copy_(torch.randn(x.shape))
    x = x.expand(-1, -1, N, N)
    cells = attention_sm90.cells_of(x, B, H)
    matrix = x.expand(B, H, N, N).mT if keys_first else x.expand(B, H, N, N)
    for length in (N, N - 3):
        for row0 in range(0, N, rows):
            for col0 in range(0, length, cols):
                out = torch.full((rows, cols), NAN)
                read_tile[(1,)](out, cells, 1, 2, row0, col0, length, N, KEYS_FIRST=keys_first, ROWS=rows, COLS=cols)
                used_rows, used_cols = min(rows, N - row0), min(cols, length - col0)
                want = matrix[1, 2, row0 : row0 + used_rows, col0 : col0 + used_cols]
                assert torch.equal(out[:used_rows, :used_cols], want)


def test_two_adjacent_cells_are_one_load_where_all_rows_are_aligned() -> None:
    grains = {
        1: [torch.empty(1, 1, 19, 19), torch.empty(1, 1, 32, 33)[..., 1:], torch.empty(2, 1, 32, 35)[..., :32]],
        2: [torch.empty(2, 3, 22, 22), torch.empty(1, 1, 32, 32).mT, torch.empty(2, 1, 32, 32).expand(2, 3, 32, 32)],
    }
    for grain, tensors in grains.items():
        for x in tensors:
            assert attention_sm90.cells_of(x.bfloat16() if x.is_contiguous() else x, 2, 3).GRAIN == grain
