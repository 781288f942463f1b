"""Kernels that begin while the one before them ends: programmatic dependent launch (CUDA programming guide; sm_90 on).

A kernel launched so may start once every program of the kernel before has called `let_next_begin`, or has ended. Until
`wait_for_previous` returns it may read and write nothing in memory; then that kernel is over. One that calls
`let_next_begin` was itself launched when all before it were over.
"""

import functools

import torch
import triton
import triton.language as tl


@functools.cache
def may_begin_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_previous():
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def let_next_begin():
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip
