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
from hstu_compile.ops.kernels.mask_occupancy import TiledMask
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


def empty_lists(mask, rows, cols) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(1, 1, 1, 1, dtype=torch.int32), torch.empty(1, 1, 1, 2, dtype=torch.int32)


def compile_attention(
    capability: int, attn_dim: int, hidden_dim: int, dtype: torch.dtype, monkeypatch: Any, **arguments: Any
) -> dict[str, compile_only.Resources]:
    """What each kernel of a forward and a backward takes of a GPU, by its name and what it makes."""
    taken = {}

    def compile_instead(kernel, like, programs, tile, **arguments) -> None:
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if "FAST" in arguments:
            arguments["FAST"] = dtype != torch.float32
        kinds = [kind for kind in ("dx_rows", "BY_KEYS") if arguments.get(kind)]
        compiled = kernel.warmup(**arguments, **options, grid=(1,))
        taken[" ".join([kernel.__name__, *kinds])] = compile_only.resources(compiled)

    gpu = divmod(capability, 10), compile_only.SHARED_MEMORY[capability]
    monkeypatch.setattr(attention_triton, "launch", compile_instead)
    monkeypatch.setattr(attention_triton, "zero_tail", lambda outs, seq_offsets: None)
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
    return taken


# Bytes a thread that these may spill, before the loop and not in it; what is not here spills nothing.
SPILLS = {(90, 128, "dk_dv_kernel"): 8}


@pytest.mark.parametrize(
    "capability, dim",
    [*((capability, 256) for capability in compile_only.SHARED_MEMORY), (90, 64), (90, 128), (86, 128)],
)
def test_compiles(capability: int, dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = compile_attention(capability, dim, dim, torch.bfloat16, monkeypatch)
    split = capability == 90 and dim == 256
    assert list(taken) == ["product_kernel", "product_kernel dx_rows", *(BY_KEYS if split else ["dk_dv_kernel"])]
    for kernel, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[capability], kernel
        assert resources.spilled <= SPILLS.get((capability, dim, kernel), 0), kernel


@pytest.mark.parametrize("capability, dtype", [(86, torch.bfloat16), (90, torch.bfloat16), (86, torch.float32)])
def test_a_bias_fits_at_the_largest_head_dim(capability: int, dtype: torch.dtype, monkeypatch) -> None:
    taken = compile_attention(capability, 256, 256, dtype, monkeypatch, attn_bias=torch.empty(1, 1, 16, 16))
    assert "dbias_kernel" in taken
    for kernel, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[capability], kernel


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bias_and_mask_without_spills(dim: int, monkeypatch) -> None:
    """Of a model that makes its own mask and a bias a sequence: [N, N] and [B, 1, N, N], rows aligned."""
    monkeypatch.setattr(attention_triton, "occupied_tiles", empty_lists)
    mask = TiledMask(torch.empty(16, 16).expand(1, 1, 16, 16), STATES, GRAIN)
    cells = {"attn_mask": mask, "attn_bias": torch.empty(1, 1, 16, 16)}
    taken = compile_attention(90, dim, dim, torch.bfloat16, monkeypatch, **cells)
    for kernel, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[90], kernel
        assert resources.spilled <= (24 if kernel == "dbias_kernel" else 0), kernel  # addresses, not tiles


def test_everything_at_once_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clause of the mask, a mask tensor and a bias; and the kernels that find the mask's occupied tiles."""

    def occupied_tiles(mask, rows, cols) -> tuple[torch.Tensor, torch.Tensor]:
        lists = empty_lists(mask, rows, cols)
        cells, states, widths = mask.cells.view(torch.uint8), mask.states, (GRAIN, mask_occupancy.STRIP)
        shape = rows, cols, GRAIN, mask_occupancy.WIDTH
        for compiled in (
            mask_occupancy.tile_states_kernel.warmup(cells, cells.stride(), states, 16, 1, *widths, grid=(1,)),
            mask_occupancy.list_tiles_kernel.warmup(
                states, *states.stride(), *lists, 1, 1, 1, 1, *shape, grid=(1,), num_warps=1
            ),
        ):
            assert compile_only.resources(compiled).spilled == 0
        return lists

    monkeypatch.setattr(attention_triton, "occupied_tiles", occupied_tiles)
    counts = torch.ones(1, dtype=torch.int64)
    runtime = {"max_attn_len": 3, "min_full_attn_seq_len": 2, "target_group_size": 2, "targets_share_position": True}
    mask = TiledMask(torch.empty(1, 1, 16, 16, dtype=torch.bool), STATES, GRAIN)
    cells = {"attn_mask": mask, "attn_bias": torch.empty(1, 2, 16, 16)}
    taken = compile_attention(
        120, 96, 128, torch.float16, monkeypatch, num_targets=counts, num_contextuals=counts, **runtime, **cells
    )
    assert all(resources.shared <= compile_only.SHARED_MEMORY[120] for resources in taken.values())


def test_changing_sizes_do_not_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """T, B, max_seq_len, window, contextual and group sizes: whatever their values, multiples of 16 and 1 included."""
    compiled = set()

    def record(kernel, like, programs, tile, **arguments) -> None:
        compiled.add(kernel.warmup(**arguments, num_warps=4, num_stages=2, grid=(1,)).hash)

    monkeypatch.setattr(attention_triton, "launch", record)
    monkeypatch.setattr(attention_triton, "zero_tail", lambda *_: None)
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
    assert len(compiled) == 1


def test_the_lists_of_a_mask_are_compiled_once_for_all_sizes() -> None:
    states, lists = torch.empty(1, 1, 1, 1, dtype=torch.uint8), empty_lists(None, 64, 64)
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
