"""The relative bias in the portable Triton attention: its arithmetic (relative_bias_cases.py), and that it compiles."""

import os
import subprocess
import sys
from pathlib import Path

import compile_only
import pytest
import torch
from relative_bias_problem import relative_bias
from test_attention_triton import compile_attention

from hstu_compile.ops.kernels import relative_bias as relative_kernels
from hstu_compile.ops.relative_bias import RelativeBias

CASES = Path(__file__).with_name("relative_bias_cases.py")

if torch.cuda.is_available():
    pytest.register_assert_rewrite("relative_bias_cases")
    from relative_bias_cases import *  # noqa: F403
else:

    def test_in_the_interpreter() -> None:
        """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


class CompileOnly:
    """Stands for a kernel; a launch compiles it."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **options) -> None:
            assert compile_only.resources(self.kernel.warmup(*args, **options, grid=grid)).spilled == 0

        return launch


# Bytes a thread that these may spill with one table for all heads and |d|; the others LEAST at most.
SPILLS = {(128, "product_kernel"): 192, (128, "dk_dv_kernel"): 80}
LEAST = 48


@pytest.mark.parametrize("dim, shared", [(64, False), (128, False), (128, True), (256, True)])
def test_compiles(dim: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CompileOnly(relative_kernels.time_ranges_kernel)
    monkeypatch.setattr(relative_kernels, "time_ranges_kernel", kernel)
    relative = RelativeBias(**relative_bias(1, 2, 16, num_boundaries=64, shared=shared, symmetric=shared))
    taken = compile_attention(90, dim, dim, torch.bfloat16, monkeypatch, relative_bias=relative)
    assert {"diagonal_kernel", "relative_grad_kernel", "position_grad_kernel"} < set(taken)
    for name, resources in taken.items():
        assert resources.shared <= compile_only.SHARED_MEMORY[90], name
        assert resources.spilled <= max(LEAST, SPILLS.get((dim, name), 0) if shared else 0), name
