"""The packed gradient of the attention kernels (silu_backward_cases.py), and that it compiles for Hopper."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import compile_only
import pytest
import torch
from test_sm90_compiles import MASKS, NOTHING, assert_fits, of_products

from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels.launch import Workspace
from hstu_compile.ops.kernels.silu_backward import silu_backward_launch, slices_of, u_slices

if torch.cuda.is_available():
    from silu_backward_cases import *  # noqa: F403
else:

    def test_in_the_interpreter() -> None:
        cases = Path(__file__).with_name("silu_backward_cases.py")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dim, mask", [(64, "causal"), (128, "causal"), (256, "targets")])
def test_compiles(dim: int, mask: str) -> None:
    H = 2
    x, dx, act = (torch.empty(16, 4 * H * dim, dtype=torch.bfloat16) for _ in range(3))
    dout = torch.empty(16, H, dim, dtype=torch.bfloat16)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 16]), "max_seq_len": 16, "alpha": 0.5, "scale": 0.1}
    call |= {name: torch.tensor(v) if isinstance(v, list) else v for name, v in MASKS[mask].items()}
    columns = {f"{name}_at": i * H * dim for i, name in enumerate("uvqk")}
    du = dout.flatten(1)
    (q, k, v), grads, silu_of = (slices_of(t, dout, dout, dout, columns) for t in (act, dx, x))
    extent = attention_sm90.extent_of(q, call)
    with compile_only.target(90), mock.patch.object(attention_sm90, "ONE_KERNEL_FROM", 0):
        workspace = Workspace(q.device, extent)
        launches = attention_sm90.backward_launches(dout, q, k, v, *grads, workspace, 132, silu_of, **call)
        launches.append(silu_backward_launch(*u_slices(du, x, dx, columns["u_at"]), extent))
        for launch in of_products(launches):
            name = launch.kernel.__name__
            kernel = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
            assert_fits(kernel, name)
