"""The Hopper attention: it compiles for sm_90 without a GPU, its masks cell by cell; on a Hopper GPU, its numbers.

python tests/test_sm90_compiles.py      # registers, spills and shared memory of every kernel, head dimension and mask
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import compile_only
import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference, hstu_attention_reference
from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels.launch import Launch, Workspace
from hstu_compile.ops.kernels.mask_occupancy import list_tiles_kernel
from hstu_compile.ops.kernels.zero_tail import zero_tail_kernel

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
NOTHING: dict[str, Any] = {
    "seq_offsets": None,
    "seq_lengths": None,
    "num_targets": None,
    "num_contextuals": None,
    "attn_mask": None,
    "attn_bias": None,
    "causal": True,
    "contextual_seq_len": 0,
    "target_group_size": 1,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "targets_share_position": False,
}
LENGTHS = [0, 1, 127, 128, 129, 300, 63, 64, 65, 256, 0]
TARGETS = [0, 1, 0, 128, 70, 131, 5, 63, 1, 17, 0]
CONTEXTUALS = [0, 0, 3, 0, 1, 66, 0, 1, 5, 200, 0]
N, H = 305, 2
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "targets": {"num_targets": TARGETS},
    "target groups": {"num_targets": TARGETS, "target_group_size": 3},
    "large target groups": {"num_targets": TARGETS, "target_group_size": 50},
    "contextual": {"num_contextuals": CONTEXTUALS},
    "no history": {
        "num_targets": TARGETS,
        "target_group_size": 20,
        "num_contextuals": [3, 2, 130, 5, 70, 200, 60, 9, 100, 240, 0],
    },
    "one contextual": {"contextual_seq_len": 1},
    "window": {"max_attn_len": 40},
    "window, targets": {"max_attn_len": 9, "num_targets": TARGETS, "target_group_size": 20},
    "min full": {
        "max_attn_len": 33,
        "min_full_attn_seq_len": 70,
        "num_targets": TARGETS,
        "targets_share_position": True,
    },
    "full, min full": {"causal": False, "max_attn_len": 7, "min_full_attn_seq_len": 5, "num_targets": TARGETS},
    "everything": {
        "num_targets": TARGETS,
        "target_group_size": 4,
        "num_contextuals": CONTEXTUALS,
        "max_attn_len": 16,
        "min_full_attn_seq_len": 11,
        "targets_share_position": True,
    },
}


def compiled(dim: int, dtype: torch.dtype, mask: dict[str, Any]) -> dict[str, Any]:
    """The kernels of a forward and a backward, by name and product, compiled for sm_90."""
    x = torch.empty(16, 8 * H * dim, dtype=dtype)[:, : H * dim].view(16, H, dim)
    out = torch.empty(16, H, dim, dtype=dtype)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 16]), "max_seq_len": 16, "alpha": 0.5, "scale": 0.1}
    call |= {name: torch.tensor(value) if isinstance(value, list) else value for name, value in mask.items()}
    return kernels_of(x, out, call)


def kernels_of(x: Tensor, out: Tensor, call: dict[str, Any]) -> dict[str, Any]:
    """What a forward and a backward of such inputs and results launch, by name and product, compiled for sm_90.

    Of sequences however long they are.
    """
    kernels = {}
    for threshold in (0, sys.maxsize):
        with compile_only.target(90), mock.patch.object(attention_sm90, "ONE_KERNEL_FROM", threshold):
            workspace = Workspace(x.device, attention_sm90.extent_of(x, call))
            launches = attention_sm90.forward_launches(x, x, x, out, workspace, 132, **call)
            launches += attention_sm90.backward_launches(out, x, x, x, out, out, out, workspace, 132, **call)
            for launch in of_products(launches):
                name = launch.kernel.__name__ + " GRAD" * launch.constants.get("GRAD", False)
                kernels[name] = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
    return kernels


def of_products(launches: list[Launch]) -> list[Launch]:
    """Without what zeros counters and lists tiles first."""
    return [launch for launch in launches if launch.kernel not in (zero_tail_kernel, list_tiles_kernel)]


@pytest.mark.parametrize(
    "dim, dtype, mask",
    [
        (64, torch.bfloat16, "causal"),
        (64, torch.bfloat16, "targets"),
        (64, torch.float16, "everything"),
        (128, torch.bfloat16, "causal"),
        (128, torch.bfloat16, "everything"),
        (192, torch.float16, "causal"),
        (256, torch.bfloat16, "targets"),
        (256, torch.bfloat16, "everything"),
        (32, torch.bfloat16, "window"),
    ],
)
def test_compiles(dim: int, dtype: torch.dtype, mask: str) -> None:
    kernels = compiled(dim, dtype, MASKS[mask])
    assert len(kernels) == (4 if dim <= 64 else 3)
    for name, kernel in kernels.items():
        assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.bulk.tensor.5d" in kernel.asm["ptx"], name
        assert_fits(kernel, name)


def assert_fits(kernel: Any, name: str) -> None:
    """In shared memory, in registers, and so that no wgmma waits for another."""
    import triton

    resources = compile_only.resources(kernel)
    assert resources.shared <= compile_only.SHARED_MEMORY[90], name
    waits = kernel.asm["ptx"].count("wgmma.wait_group")
    assert compile_only.sass(kernel).count("WARPGROUP.DEPBAR") <= waits, f"{name}: ptxas waits for every wgmma"
    if triton.__version__.startswith("3.6."):  # what it takes of registers, each release decides anew
        assert resources.spilled == 0, name


def test_changing_sizes_do_not_compile_again() -> None:
    """T, B, max_seq_len, window, contextual and group sizes: whatever their values, multiples of 16 and 1 included."""
    hashes = set()
    with compile_only.target(90):
        for T, B, length, size in ((1, 1, 1, 1), (16, 16, 16, 16), (37, 3, 17, 5)):
            x = torch.empty(T, H, 64, dtype=torch.bfloat16)
            call = {**NOTHING, "seq_offsets": torch.zeros(B + 1, dtype=torch.int64), "max_seq_len": length}
            workspace = Workspace(x.device, attention_sm90.extent_of(x, call))
            call |= {"contextual_seq_len": size, "max_attn_len": size, "target_group_size": size}
            call |= {"alpha": 1.0 * size, "scale": 1.0}
            (launch,) = of_products(attention_sm90.forward_launches(x, x, x, x, workspace, 132, **call))
            hashes.add(launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,)).hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("name", ["mask_interval_cases.py", "mask_visit_cases.py", "slot_cases.py"])
def test_in_the_interpreter(name: str) -> None:
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    cases = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"attn_dim": 96, "hidden_dim": 192}, None),
        ({"capability": (10, 0)}, "sm_100"),
        ({"dtype": torch.float32}, "float32"),
        ({"attn_dim": 20}, "attn_dim 20"),
        ({"hidden_dim": 264}, "hidden_dim 264"),
        ({"has_mask": True, "has_bias": True}, None),
    ],
)
def test_unsupported(change: dict, reason: str | None) -> None:
    call = {"dtype": torch.bfloat16, "attn_dim": 64, "hidden_dim": 64, "has_mask": False, "has_bias": False, **change}
    said = attention_sm90.unsupported(call.pop("capability", (9, 0)), **call)
    assert said is None if reason is None else reason in said


def test_a_triton_without_these_names_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from hstu_compile.ops.kernels import gluon_compat

    monkeypatch.setattr(gluon_compat, "PROBLEM", "this triton lacks it")
    call = {"dtype": torch.bfloat16, "attn_dim": 64, "hidden_dim": 64, "has_mask": False, "has_bias": False}
    assert attention_sm90.unsupported((9, 0), **call) == "this triton lacks it"


def read_by_tma(descriptor: Any, coordinates: list[int]) -> float:
    """The element that TMA reads: 0 out of bounds, else at an address modulo 2^64 bytes."""
    if any(not 0 <= c < size for c, size in zip(coordinates, descriptor.shape, strict=True)):
        return 0.0
    x = descriptor.base
    at = sum(c * stride for c, stride in zip(coordinates, descriptor.strides, strict=True)) * x.element_size() % 2**64
    return x.as_strided((), (), x.storage_offset() + at // x.element_size()).item()


@pytest.mark.parametrize("layout", ["packed", "interleaved", "heads first", "one row", "misaligned", "expanded"])
def test_descriptors_read_any_layout(layout: str) -> None:
    """By the rules of TMA: every element of every sequence, and 0 beyond its end and beyond its head dim."""
    B, rows, dim, length = 3, 1 if layout == "one row" else 5, 24, 1 if layout == "one row" else 4
    shape = (B, rows, H, dim)
    x = {
        "packed": lambda: torch.randn(B, rows, 4 * H * dim)[..., H * dim : 2 * H * dim].view(shape),
        "interleaved": lambda: torch.randn(B, rows, H, 4 * dim)[..., dim : 2 * dim],
        "heads first": lambda: torch.randn(B, H, rows, dim).transpose(1, 2),
        "one row": lambda: torch.randn(B, 2, H, dim)[:, :1],
        "misaligned": lambda: torch.randn(B, rows, H, dim + 1)[..., 1:],
        "expanded": lambda: torch.randn(B, rows, 1, dim).expand(shape),
    }[layout]().to(torch.bfloat16)  # fmt: skip
    x = x if layout == "misaligned" else x.clone(memory_format=torch.preserve_format) if not x.is_contiguous() else x
    (ready,), batch_rows = attention_sm90.loadable(x)
    with compile_only.target(90):
        descriptor = attention_sm90.describe(ready, 64, 32)
    limit = attention_sm90.ROW_LIMIT
    for b in range(B):
        end = b * batch_rows + length
        for row in range(length + 2):
            for head in range(H):
                for d in (0, 7, dim - 1, dim, 31):
                    want = x[b, row, head, d].item() if row < length and d < dim else 0.0
                    assert read_by_tma(descriptor, [limit, end, limit - length + row, head, d]) == want


def slices(
    layout: str, dtype: torch.dtype, attn_dim: int, hidden_dim: int
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v, dout with NaN in every row of no sequence and between the heads, and where the sequences lie."""
    lengths = torch.tensor(LENGTHS, device="cuda")
    lead = (sum(LENGTHS) + 3,) if layout in ("packed", "interleaved") else (len(LENGTHS), N)
    tensors = []
    for dim in (attn_dim, attn_dim, hidden_dim, hidden_dim):
        if layout == "heads first":
            buffer = torch.full((lead[0], H, N + 8, dim), float("nan"), device="cuda", dtype=dtype)
            x = buffer[:, :, :N].transpose(1, 2)
        elif layout == "interleaved":
            x = torch.full((*lead, H, 3 * dim), float("nan"), device="cuda", dtype=dtype)[..., dim : 2 * dim]
        else:
            x = torch.full((*lead, 3 * H * dim), float("nan"), device="cuda", dtype=dtype)[..., H * dim : 2 * H * dim]
            x = x.unflatten(-1, (H, dim))
        x.copy_(torch.randn(x.shape, device="cuda"))
        tensors.append(x)
    if len(lead) == 1:
        unused = torch.arange(lead[0], device="cuda") >= sum(LENGTHS)
        where = {"seq_offsets": F.pad(lengths.cumsum(0), (1, 0))}
    else:
        unused = torch.arange(N, device="cuda") >= lengths[:, None]
        where = {"seq_lengths": lengths.int()}
    for x in tensors:
        x[unused] = float("nan")
    return tensors, where


def check(monkeypatch: Any, layout: str, mask: str, dtype: torch.dtype, attn_dim: int, hidden_dim: int) -> None:
    """Output and gradients within the budget, from memory full of NaN, the same bits twice."""
    (q, k, v, dout), where = slices(layout, dtype, attn_dim, hidden_dim)
    call = {**NOTHING, **where, "max_seq_len": N, "alpha": attn_dim**-0.5}
    call |= {n: torch.tensor(x, device="cuda") if isinstance(x, list) else x for n, x in MASKS[mask].items()}
    plain = {**call, "scaling_seq_len": 300.0}
    used = torch.arange(q.shape[0], device="cuda") < sum(LENGTHS) if layout in ("packed", "interleaved") else None
    reference = [t.double() for t in (q, k, v)]
    want = [hstu_attention_reference(*reference, **plain)]
    want += hstu_attention_backward_reference(dout.double(), *reference, **plain, needs_bias_grad=False)[:3]
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out = eager_attention(*leaves, **plain)
    eager = [out, *torch.autograd.grad(out, leaves, dout.nan_to_num(0.0))]

    empty = torch.empty

    def poisoned(*args: Any, **keywords: Any) -> torch.Tensor:
        x = empty(*args, **keywords)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    monkeypatch.setattr(attention_sm90.torch, "empty", poisoned)
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", 0)  # more than one: test_attention_grid.py

    def run() -> list[torch.Tensor]:
        out = attention_sm90.forward(q, k, v, **call, scale=1 / 300)
        return [out, *attention_sm90.backward(dout, q, k, v, **call, scale=1 / 300, needs_bias_grad=False)[:3]]

    for name, ours, again, theirs, reference64 in zip(
        ("out", "dq", "dk", "dv"), run(), run(), eager, want, strict=True
    ):
        if used is not None:  # rows of no sequence are not the kernels' to write
            ours, again, theirs, reference64 = (t[used] for t in (ours, again, theirs, reference64))
        assert_within_budget(ours, theirs, reference64, FORWARD if name == "out" else BACKWARD, name)
        assert torch.equal(ours, again), f"{name} differs from run to run"


@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(monkeypatch: pytest.MonkeyPatch, mask: str, dim: int) -> None:
    check(monkeypatch, "packed", mask, torch.bfloat16, dim, dim)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(32, 32), (96, 96), (192, 192), (64, 128), (256, 64), (16, 40)])
def test_head_dims(monkeypatch: pytest.MonkeyPatch, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(monkeypatch, "packed", "targets", dtype, *dims)


@on_hopper
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("layout", ["interleaved", "dense", "heads first"])
def test_layouts(monkeypatch: pytest.MonkeyPatch, layout: str, dim: int) -> None:
    for mask in ("causal", "full", "everything"):
        check(monkeypatch, layout, mask, torch.float16, dim, dim)


@on_hopper
def test_nothing_to_do() -> None:
    for T, B, length in ((0, 0, 4), (0, 3, 4), (5, 0, 4), (5, 2, 0)):
        x = torch.randn(T, H, 64, device="cuda", dtype=torch.bfloat16)
        call = {**NOTHING, "seq_offsets": torch.zeros(B + 1, dtype=torch.int64, device="cuda"), "max_seq_len": length}
        out = attention_sm90.forward(x, x, x, **call, alpha=1.0, scale=1.0)
        grads = attention_sm90.backward(out, x, x, x, **call, alpha=1.0, scale=1.0, needs_bias_grad=False)
        assert [t.shape for t in (out, *grads[:3])] == [x.shape] * 4


if __name__ == "__main__":
    for dim in (32, 64, 128, 256):
        for dtype in (torch.bfloat16, torch.float16):
            for mask, arguments in MASKS.items():
                for name, kernel in compiled(dim, dtype, arguments).items():
                    print(f"dim {dim} {dtype} {mask}: {name} {compile_only.resources(kernel)}", flush=True)
