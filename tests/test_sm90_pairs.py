"""The Hopper attention with a bias and a mask tensor: it compiles for sm_90 without a GPU, its cells are those of the
matrix; on a Hopper GPU, its numbers.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compile_only
import pytest
import torch
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from test_sm90_compiles import LENGTHS, MASKS, NOTHING, H, assert_fits, kernels_of, on_hopper, slices
from tiled_masks import tiled
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import (
    hstu_attention_backward_reference,
    hstu_attention_reference,
    live_cells,
)
from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels.mask_occupancy import TiledMask
from hstu_compile.ops.mask_tile_states import GRAIN

BF16, FP16, FP32, FP64, BOOL = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.bool
B = len(LENGTHS)
NAN = float("nan")


def compiled(dim: int, dtype: torch.dtype, mask: str, bias: Any, weight: Any) -> dict[str, Any]:
    """The kernels of a forward and a backward with a bias and a mask tensor of these dtypes (None: without)."""
    rows = 32
    x = torch.empty(rows, H, dim, dtype=dtype)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, rows]), "max_seq_len": rows, "alpha": 0.5, "scale": 0.1}
    call |= {name: torch.tensor(value) if isinstance(value, list) else value for name, value in MASKS[mask].items()}
    call["attn_bias"] = None if bias is None else torch.empty(1, 1, rows, rows, dtype=bias)
    if weight is not None:
        states = torch.empty(1, H, 1, 1, dtype=torch.uint8)
        call["attn_mask"] = TiledMask(torch.empty(1, H, rows, rows, dtype=weight), states, GRAIN)
    return kernels_of(x, x, call)


@pytest.mark.parametrize(
    "dim, dtype, mask, bias, weight",
    [
        (32, FP16, "everything", FP16, FP32),
        (64, BF16, "causal", BF16, BOOL),
        (64, BF16, "causal", FP32, None),
        (128, BF16, "causal", BF16, BOOL),
        (128, BF16, "targets", BF16, None),
        (128, FP16, "causal", None, FP32),
        (256, BF16, "causal", BF16, None),
        (256, BF16, "targets", None, BOOL),
    ],
)
def test_compiles(dim: int, dtype: torch.dtype, mask: str, bias: Any, weight: Any) -> None:
    kernels = compiled(dim, dtype, mask, bias, weight)
    assert len(kernels) == 3
    for name, kernel in kernels.items():
        assert_fits(kernel, name)
        if bias in (BF16, FP16) and weight is None and "product" in name:
            assert "ld.global.b16" not in kernel.asm["ptx"], f"{name} loads one cell at a time"


def test_cells_are_those_of_the_matrix() -> None:
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    cases = Path(__file__).with_name("pair_cell_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def pairs(kind: str, batches: int, heads: int, N: int, dtype: torch.dtype) -> Tensor:
    """[batches, heads, N, N] of random numbers, in memory as `kind` says."""
    shape = batches, heads, N, N
    if kind == "transposed":
        x = torch.randn(shape, device="cuda").mT
    elif kind == "heads last":
        x = torch.randn(batches, N, N, heads, device="cuda").permute(0, 3, 1, 2)
    elif kind == "sliced":
        x = torch.full((batches, heads, N + 3, N + 5), NAN, device="cuda")[:, :, 3:, 1 : N + 1]
        x.copy_(torch.randn(shape, device="cuda"))
    else:
        x = torch.randn(shape, device="cuda")
    order = sorted(range(4), key=lambda d: -x.stride(d))  # the strides too
    if kind == "sliced":
        storage = torch.full((batches, heads, N + 3, N + 5), NAN, device="cuda", dtype=dtype)
        return storage[:, :, 3:, 1 : N + 1].copy_(x)
    back = [order.index(d) for d in range(4)]
    return x.permute(order).contiguous().to(dtype).permute(back)


def weights(kind: str, batches: int, heads: int, N: int) -> Tensor:
    """A mask tensor with empty tiles, tiles of ones and others."""
    shape = batches, heads, N, N
    if kind == "tril":
        return torch.ones(N, N, device="cuda").tril().expand(shape)
    if kind == "sparse":
        return torch.randn(shape, device="cuda") * (torch.rand(shape, device="cuda") < 0.01)
    if kind == "dense":
        return torch.randn(shape, device="cuda")
    tiles = torch.randint(0, 3, (batches, heads, N // 64 + 1, N // 64 + 1), device="cuda")
    tiles[..., 0, :] = 0  # queries that see nothing
    tiles[..., 2:4, 0:2] = 0
    cells = tiles.repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :N, :N].float()
    return torch.where(cells == 2, (torch.rand(shape, device="cuda") < 0.5).float(), cells)


def check(
    monkeypatch: Any, family: str, dtype: torch.dtype, dims: tuple[int, int], N: int, bias: Any, weight: Any,
    layout: str = "packed",
) -> None:  # fmt: skip
    """Output and gradients within the budget, from memory full of NaN, with NaN in dead cells, the same bits twice."""
    (q, k, v, dout), where = slices(layout, dtype, *dims)
    call = {**NOTHING, **where, "max_seq_len": N, "alpha": dims[0] ** -0.5}
    call |= {n: torch.tensor(x, device="cuda") if isinstance(x, list) else x for n, x in MASKS[family].items()}
    clauses = {n: x for n, x in call.items() if n not in (*where, "max_seq_len", "alpha", "seq_offsets", "seq_lengths")}
    del clauses["attn_mask"], clauses["attn_bias"]
    live = live_cells(torch.tensor(LENGTHS, device="cuda"), N, **clauses)[:, None].expand(B, H, N, N)
    if weight is not None:
        weight = poisoned(weight, live) if weight.is_floating_point() else weight
        live = live & (weight != 0)
    if bias is not None:
        bias = poisoned(bias, live)
    call |= {"attn_bias": bias, "attn_mask": weight}
    plain = {**call, "scaling_seq_len": 300.0}
    exact = {**plain, "attn_bias": bias if bias is None else bias.double()}
    exact["attn_mask"] = weight if weight is None else weight.double()
    reference = [t.double() for t in (q, k, v)]
    needs = bias is not None
    want = [hstu_attention_reference(*reference, **exact)]
    want += hstu_attention_backward_reference(dout.double(), *reference, **exact, needs_bias_grad=needs)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *([bias] if needs else []))]
    # Eager code multiplies its mask: NaN in dead cells is ours to survive, not its own.
    finite = {"attn_bias": leaves[3].nan_to_num(0.0) if needs else None}
    finite["attn_mask"] = weight.nan_to_num(0.0) if weight is not None and weight.is_floating_point() else weight
    out = eager_attention(*leaves[:3], **{**plain, **finite})
    eager = [out, *torch.autograd.grad(out, leaves, dout.nan_to_num(0.0))]

    empty = torch.empty
    monkeypatch.setattr(attention_sm90.torch, "empty", lambda *a, **kw: fill(empty(*a, **kw)))

    call["attn_mask"] = tiled(weight)

    def run() -> list[Tensor]:
        out = attention_sm90.forward(q, k, v, **call, scale=1 / 300)
        return [out, *attention_sm90.backward(dout, q, k, v, **call, scale=1 / 300, needs_bias_grad=needs)]

    names = ["out", "dq", "dk", "dv", *(["dbias"] if needs else [])]
    for name, ours, again, theirs, reference64 in zip(names, run(), run(), eager, want, strict=False):
        if name != "dbias" and layout == "packed":  # rows of no sequence are not the kernels' to write
            ours, again, theirs, reference64 = (t[: sum(LENGTHS)] for t in (ours, again, theirs, reference64))
        assert_within_budget(ours, theirs, reference64, FORWARD if name == "out" else BACKWARD, name)
        assert torch.equal(ours, again), f"{name} differs from run to run"


def fill(x: Tensor) -> Tensor:
    return x.fill_(NAN) if x.is_floating_point() else x


def poisoned(x: Tensor, live: Tensor) -> Tensor:
    """x with NaN wherever every pair that shares the cell is dead; expanded dimensions stay so."""
    dims = [d for d in (0, 1) if x.shape[d] == 1 or x.stride(d) == 0]
    dead = ~live.any(dims, keepdim=True) if dims else ~live
    storage = x
    for d in dims:
        storage = storage.narrow(d, 0, 1)
    strided = storage.clone(memory_format=torch.preserve_format)
    kept = storage if strided.stride() != storage.stride() else strided  # a slice stays one
    kept[dead] = NAN
    return kept.expand(x.shape)


@on_hopper
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("family", ["causal", "everything"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_bias(monkeypatch: pytest.MonkeyPatch, dim: int, family: str, dtype: torch.dtype) -> None:
    check(monkeypatch, family, BF16, (dim, dim), 304, pairs("plain", B, 1, 304, dtype), None)


@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("family", ["full", "everything"])
@pytest.mark.parametrize("kind", ["tril", "sparse", "dense", "tiles"])
@pytest.mark.parametrize("dtype", [BOOL, FP32])
def test_mask_tensor(monkeypatch: pytest.MonkeyPatch, dim: int, family: str, kind: str, dtype: torch.dtype) -> None:
    check(monkeypatch, family, BF16, (dim, dim), 304, None, weights(kind, 1, 1, 304).to(dtype))


@on_hopper
@pytest.mark.parametrize("N", [301, 304, 306])
@pytest.mark.parametrize("kind", ["plain", "transposed", "heads last", "sliced"])
@pytest.mark.parametrize("dim, dtype, batches, heads", [(64, BF16, 1, H), (128, FP16, B, H), (256, FP64, 1, 1)])
def test_any_strides(
    monkeypatch: pytest.MonkeyPatch, N: int, kind: str, dim: int, dtype: torch.dtype, batches: int, heads: int
) -> None:
    """And mask tensors for all sequences, for all heads, for each."""
    weight = weights("tiles", batches, heads, N)
    weight = weight.bool() if dim == 128 else weight.to(BF16)
    check(monkeypatch, "full", FP16, (dim, dim), N, pairs(kind, batches, heads, N, dtype), weight.mT)


@on_hopper
@pytest.mark.parametrize("dims", [(96, 96), (192, 192), (64, 128), (256, 64), (16, 40)])
@pytest.mark.parametrize("layout", ["packed", "dense", "heads first"])
def test_head_dims_and_layouts(monkeypatch: pytest.MonkeyPatch, dims: tuple[int, int], layout: str) -> None:
    N = 305
    bias = pairs("plain", B, 1, N, FP16).expand(B, H, N, N)
    check(monkeypatch, "everything", FP16, dims, N, bias, weights("tiles", B, 1, N).bool(), layout)


@on_hopper
def test_nothing_to_do() -> None:
    for T, sequences, length in ((0, 0, 4), (0, 3, 4), (5, 0, 4), (5, 2, 0)):
        x = torch.randn(T, H, 64, device="cuda", dtype=BF16)
        cells = torch.ones(1, 1, length, length, device="cuda")
        call = {**NOTHING, "seq_offsets": torch.zeros(sequences + 1, dtype=torch.int64, device="cuda")}
        call |= {
            "max_seq_len": length,
            "attn_bias": cells,
            "attn_mask": tiled(cells.long()),
            "alpha": 1.0,
            "scale": 1.0,
        }
        out = attention_sm90.forward(x, x, x, **call)
        grads = attention_sm90.backward(out, x, x, x, **call, needs_bias_grad=True)
        assert [t.shape for t in (out, *grads)] == [x.shape] * 4 + [cells.shape]


if __name__ == "__main__":
    for dim in (32, 64, 128, 256):
        for dtype in (BF16, FP16):
            for bias, weight in ((BF16, None), (FP32, None), (None, BOOL), (None, FP32), (BF16, BOOL), (FP32, FP32)):
                with pytest.MonkeyPatch.context() as patch:
                    for name, kernel in compiled(patch, dim, dtype, "causal", bias, weight).items():
                        used = compile_only.resources(kernel)
                        print(f"dim {dim} {dtype} bias {bias} mask {weight}: {name} {used}", flush=True)
