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
from hstu_compile.ops.kernels.silu_backward import silu_backward_launch
from hstu_compile.ops.packed_slices import Slice

if torch.cuda.is_available():
    from silu_backward_cases import *  # noqa: F403
else:

    def test_in_the_interpreter() -> None:
        cases = Path(__file__).with_name("silu_backward_cases.py")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# Each takes seconds to compile: every layout at the width with the fewest registers left, half of them at the others.
LAYOUTS = [("uvqk", False, False), ("u", False, True), ("uvqk", True, True), ("vk", True, False)]


@pytest.mark.parametrize(
    "dim, mask, activated, interleaved, has_bias",
    [
        *((64, "causal", *layout) for layout in LAYOUTS[::2]),
        *((128, "causal", *layout) for layout in LAYOUTS[1::2]),
        *((256, "targets", *layout) for layout in LAYOUTS),
    ],
)
def test_compiles(dim: int, mask: str, activated: str, interleaved: bool, has_bias: bool) -> None:
    H = 2
    x, dx, act = (torch.empty(16, 4 * H * dim, dtype=torch.bfloat16) for _ in range(3))
    dout = torch.empty(16, H, dim, dtype=torch.bfloat16)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 16]), "max_seq_len": 16, "alpha": 0.5, "scale": 0.1}
    call |= {name: torch.tensor(v) if isinstance(v, list) else v for name, v in MASKS[mask].items()}
    if has_bias:
        call["attn_bias"] = torch.empty(1, 1, 16, 16, dtype=torch.bfloat16)
    places = {
        name: Slice(i * dim, 4 * dim, True) if interleaved else Slice(i * H * dim, dim, True)
        for i, name in enumerate("uvqk")
    }
    q, k, v = (places[name].of(act, H, dim) for name in "qkv")
    grads = {name: place.of(dx, H, dim) for name, place in places.items()}
    silu_of = {name: place.of(x, H, dim) if name in activated else None for name, place in places.items()}
    extent = attention_sm90.extent_of(q, call)
    with compile_only.target(90), mock.patch.object(attention_sm90, "ONE_KERNEL_FROM", 0):
        workspace = Workspace(q.device, extent)
        of_qkv = [grads[name] for name in "qkv"], [silu_of[name] for name in "qkv"]
        launches = attention_sm90.backward_launches(dout, q, k, v, *of_qkv[0], workspace, 132, of_qkv[1], **call)
        launches.append(silu_backward_launch(dout, (grads["u"], silu_of["u"]), extent))
        for launch in of_products(launches):
            name = launch.kernel.__name__
            kernel = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
            assert_fits(kernel, name)
