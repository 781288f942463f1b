"""The portable Triton attention: its arithmetic (attention_triton_cases.py), and that it compiles for every target.

python tests/test_attention_triton.py       # registers, spills and shared memory for every target and head dimension
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import compile_only
import pytest
import torch

from hstu_compile.ops.kernels import attention_triton, mask_occupancy
from hstu_compile.ops.kernels.launch import Launch, Workspace
from hstu_compile.ops.kernels.mask_occupancy import TiledMask
from hstu_compile.ops.kernels.zero_tail import zero_tail_kernel
from hstu_compile.ops.mask_tile_states import GRAIN

NOTHING = dict.fromkeys(["seq_lengths", "num_targets", "num_contextuals", "attn_mask", "attn_bias"])
CASES = Path(__file__).with_name("attention_triton_cases.py")

if torch.cuda.is_available():
    pytest.register_assert_rewrite("attention_triton_cases")
    from attention_triton_cases import *  # noqa: F403
else:

    def test_in_the_interpreter() -> None:
        """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


STATES = torch.empty(1, 1, 1, 1, dtype=torch.uint8)
BY_KEYS = ["product_kernel BY_KEYS", "product_kernel dx_rows BY_KEYS"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Launches of the attention instead of doing them."""
    found: list[Launch] = []

    def run(memory, key, tensors, extent, launches) -> None:
        found.extend(launches(Workspace(tensors[0].device, extent)))

    monkeypatch.setattr(attention_triton, "run", run)
    return found


def compile_attention(
    launched: list[Launch],
    capability: int,
    attn_dim: int,
    hidden_dim: int,
    dtype: torch.dtype,
    monkeypatch: Any,
    **arguments: Any,
) -> dict[str, compile_only.Resources]:
    """What each kernel of a forward and a backward takes of a GPU, by its name and what it makes."""
    gpu = divmod(capability, 10), compile_only.SHARED_MEMORY[capability]
    monkeypatch.setattr(attention_triton, "capability_and_memory", lambda device: gpu)
    q, v = (torch.empty(16, 2, dim, dtype=dtype) for dim in (attn_dim, hidden_dim))
    sizes = dict.fromkeys(["contextual_seq_len", "max_attn_len", "min_full_attn_seq_len"], 0)
    arguments = {
        **NOTHING,
        **sizes,
        "seq_offsets": torch.tensor([0, 16]),
        "max_seq_len": 16,
        "alpha": 0.5,
        "scale": 0.1,
        "causal": True,
        "target_group_size": 1,
        "targets_share_position": False,
        **arguments,
    }
    with compile_only.target(capability):
        attention_triton.forward(q, q, v, **arguments)
        needs_bias_grad = arguments["attn_bias"] is not None
        attention_triton.backward(v, q, q, v, **arguments, needs_bias_grad=needs_bias_grad)
        return dict(taken_by(launch, dtype) for launch in launched if launch.kernel is not zero_tail_kernel)


def taken_by(launch: Launch, dtype: torch.dtype) -> tuple[str, compile_only.Resources]:
    constants = launch.constants | ({"FAST": dtype != torch.float32} if "FAST" in launch.constants else {})
    kinds = [kind for kind in ("dx_rows", "BY_KEYS") if constants.get(kind)]
    compiled = launch.kernel.warmup(*launch.arguments, **constants, grid=(1,))
    return " ".join([launch.kernel.__name__, *kinds]), compile_only.resources(compiled)


# Bytes a thread that these may spill, before the loop and not in it; what is not here spills nothing.
SPILLS = {(90, 128, "dk_dv_kernel"): 8}


@pytest.mark.parametrize(
    "capability, dim",
    [*((capability, 256) for capability in compile_only.SHARED_MEMORY), (90, 64), (90, 128), (86, 128)],
)
def test_compiles(launched: list[Launch], capability: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = compile_attention(launched, capability, dim, dim, torch.bfloat16, monkeypatch)
    split = capability == 90 and dim == 256
    assert list(taken) == ["product_kernel", "product_kernel dx_rows", *(BY_KEYS if split else ["dk_dv_kernel"])]
    for kernel, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[capability], kernel
        assert resources.spilled <= SPILLS.get((capability, dim, kernel), 0), kernel


@pytest.mark.parametrize("capability, dtype", [(86, torch.bfloat16), (90, torch.bfloat16), (86, torch.float32)])
def test_a_bias_fits_at_the_largest_head_dim(launched, capability: int, dtype: torch.dtype, monkeypatch) -> None:
    bias = torch.empty(1, 1, 16, 16)
    taken = compile_attention(launched, capability, 256, 256, dtype, monkeypatch, attn_bias=bias)
    assert "dbias_kernel" in taken
    for kernel, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[capability], kernel


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bias_and_mask_without_spills(launched, dim: int, monkeypatch) -> None:
    """Of a model that makes its own mask and a bias a sequence: [N, N] and [B, 1, N, N], rows aligned."""
    mask = TiledMask(torch.empty(16, 16).expand(1, 1, 16, 16), STATES, GRAIN)
    cells = {"attn_mask": mask, "attn_bias": torch.empty(1, 1, 16, 16)}
    taken = compile_attention(launched, 90, dim, dim, torch.bfloat16, monkeypatch, **cells)
    for kernel, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[90], kernel
        assert resources.spilled <= (24 if kernel == "dbias_kernel" else 0), kernel  # addresses, not tiles


def test_everything_at_once_compiles(launched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clause of the mask, a mask tensor and a bias; and the kernels that find the mask's occupied tiles."""
    counts = torch.ones(1, dtype=torch.int64)
    runtime = {"max_attn_len": 3, "min_full_attn_seq_len": 2, "target_group_size": 2, "targets_share_position": True}
    mask = TiledMask(torch.empty(1, 1, 16, 16, dtype=torch.bool), STATES, GRAIN)
    runtime |= {"num_targets": counts, "num_contextuals": counts}
    cells = {"attn_mask": mask, "attn_bias": torch.empty(1, 2, 16, 16)}
    taken = compile_attention(launched, 120, 96, 128, torch.float16, monkeypatch, **runtime, **cells)
    assert all(resources.shared <= compile_only.SHARED_MEMORY[120] for resources in taken.values())
    assert taken["list_tiles_kernel"].spilled == 0
    cells = torch.empty(1, 1, 16, 16, dtype=torch.uint8)
    with compile_only.target(120):
        states = mask_occupancy.tile_states_kernel.warmup(
            cells, cells.stride(), STATES, 16, 1, GRAIN, mask_occupancy.STRIP, grid=(1,)
        )
    assert compile_only.resources(states).spilled == 0


def test_changing_sizes_do_not_compile_again(launched: list[Launch]) -> None:
    """T, B, max_seq_len, window, contextual and group sizes: whatever their values, multiples of 16 and 1 included."""
    with compile_only.target(90):
        for T, B, N, size in ((1, 1, 1, 1), (16, 16, 16, 16), (37, 3, 17, 5)):
            q = torch.empty(T, 16, 64, dtype=torch.bfloat16)
            runtime = dict.fromkeys(
                ["contextual_seq_len", "target_group_size", "max_attn_len", "min_full_attn_seq_len"], size
            )
            attention_triton.forward(
                q, q, q, **NOTHING, **runtime, seq_offsets=torch.zeros(B + 1, dtype=torch.int64), max_seq_len=N,
                alpha=1.0 * size, scale=1.0, causal=True, targets_share_position=False,
            )  # fmt: skip
        compiled = {x.kernel.warmup(*x.arguments, **x.constants, grid=(1,)).hash for x in launched}
    assert len(launched) == 6 and len(compiled) == 2  # zeros are the second


def test_the_lists_of_a_mask_are_compiled_once_for_all_sizes() -> None:
    states, lists = torch.empty(1, 1, 1, 1, dtype=torch.uint8), [torch.empty(4, dtype=torch.int32) for _ in range(2)]
    shape = 64, 128, GRAIN, mask_occupancy.WIDTH
    with compile_only.target(90):
        hashes = {
            mask_occupancy.list_tiles_kernel.warmup(states, *[size] * 4, *lists, *[size] * 4, *shape, grid=(1,)).hash
            for size in (1, 16, 17)
        }
    assert len(hashes) == 1


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"capability": (7, 5)}, "compute capability 8.0"),
        ({"dtype": torch.float64}, "float64"),
        ({"attn_dim": 512}, "attn_dim (of a head of q and k) from 1 to 256, got 512"),
        ({"hidden_dim": 257}, "hidden_dim (of a head of v) from 1 to 256, got 257"),
        ({"capability": (12, 0), "attn_dim": 256, "dtype": torch.float32, "has_mask": True, "has_bias": True}, None),
    ],
)
def test_unsupported(change: dict, reason: str | None) -> None:
    call = {"dtype": torch.bfloat16, "attn_dim": 64, "hidden_dim": 64, "has_mask": False, "has_bias": False, **change}
    said = attention_triton.unsupported(call.pop("capability", (8, 0)), **call)
    assert said is None if reason is None else reason in said


if __name__ == "__main__":
    for capability in compile_only.SHARED_MEMORY:
        for dim in (64, 128, 256):
            with pytest.MonkeyPatch.context() as monkeypatch:
                bias = torch.empty(1, 1, 16, 16)
                for title, arguments in (("plain", {}), ("bias", {"attn_bias": bias})):
                    taken = compile_attention(capability, dim, dim, torch.bfloat16, monkeypatch, **arguments)
                    for kernel, resources in taken.items():
                        print(f"sm_{capability} dim {dim} {title}: {kernel} {resources}", flush=True)
