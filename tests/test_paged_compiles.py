"""The kernels of a paged cache compile for every target without a GPU, in its registers and shared memory.

python tests/test_paged_compiles.py      # what every kernel takes of a GPU
"""

from typing import Any
from unittest import mock

import compile_only
import pytest
import torch
from paged_cases import H
from test_sm90_compiles import MASKS

from hstu_compile.ops.kernels import append_kv, paged_attention_triton
from hstu_compile.ops.kernels.launch import Extent
from hstu_compile.ops.kernels.paged_parts import partial_sums

PAGE_SIZES = [16, 32, 64, 128, 256]
NOTHING: dict[str, Any] = {
    "num_targets": None,
    "num_contextuals": None,
    "causal": True,
    "contextual_seq_len": 0,
    "target_group_size": 1,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "targets_share_position": False,
}


def operands(dim: int, dtype: torch.dtype, parts: int) -> tuple:
    """As `paged_launches` takes them."""
    q, k, v = (torch.empty(16, 4, H, dim, dtype=dtype)[:, i] for i in range(3))
    pool = torch.empty(512, H, dim, dtype=dtype)
    table, cached = torch.zeros(1, 16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    out = torch.empty(16, H, dim, dtype=dtype)
    return q, k, v, pool, table, cached, out, partial_sums(out, parts)


def call_of(mask: dict[str, Any]) -> dict[str, Any]:
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 16]), "max_seq_len": 4096, "alpha": 0.5, "scale": 0.1}
    return call | {name: torch.tensor(x) if isinstance(x, list) else x for name, x in mask.items()}


def portable(capability: int, dim: int, dtype: torch.dtype, page_size: int, mask: str, parts: int) -> dict[str, Any]:
    gpu = divmod(capability, 10), compile_only.SHARED_MEMORY[capability]
    with (
        compile_only.target(capability),
        mock.patch.object(paged_attention_triton, "capability_and_memory", lambda device: gpu),
    ):
        args = operands(dim, dtype, parts)
        launches = paged_attention_triton.paged_launches(*args, page_size, 132, **call_of(MASKS[mask]))
        launches.append(
            append_kv.append_launch(
                args[3], *args[1:3], torch.tensor([0, 16]), *args[4:6], None, Extent(16, 1), 9, page_size
            )
        )
        compiled = {}
        for launch in launches:
            constants = launch.constants | ({"FAST": dtype != torch.float32} if "FAST" in launch.constants else {})
            compiled[launch.kernel.__name__] = launch.kernel.warmup(*launch.arguments, **constants, grid=(1,))
    return compiled


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize(
    "dim, dtype, page_size, mask, parts",
    [
        (256, torch.bfloat16, 32, "targets", 3),
        (128, torch.float16, 16, "everything", 1),
        (64, torch.bfloat16, 256, "causal", 1),
        (256, torch.float32, 64, "targets", 1),
    ],
)
def test_portable(capability: int, dim: int, dtype: torch.dtype, page_size: int, mask: str, parts: int) -> None:
    for name, kernel in portable(capability, dim, dtype, page_size, mask, parts).items():
        resources = compile_only.resources(kernel)
        assert resources.shared <= compile_only.SHARED_MEMORY[capability], name
        assert resources.spilled <= 64, f"{name}: {resources}"


if __name__ == "__main__":
    for capability in (90, 80, 86):
        for dim in (64, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                for page_size, mask, parts in ((16, "targets", 1), (64, "everything", 4)):
                    for name, kernel in portable(capability, dim, dtype, page_size, mask, parts).items():
                        print(capability, dim, dtype, page_size, mask, parts, name, compile_only.resources(kernel))
