"""Attention problems to measure: lengths, mask, inputs, FLOPs of the live cells; and the kernels that run them."""

import functools
import importlib
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_compile.ops import kernel_table
from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference, hstu_attention_reference

DIRECTIONS = ("forward", "backward")
TARGETS, WINDOW = 256, 512
GIANT, NEIGHBOURS = 8192, 2000  # one long sequence among short ones of 16 to 64 tokens


class Problem(NamedTuple):
    """What is measured. `seq_len` is the longest history; targets come on top of it.

    lengths: `full`: all the longest; `zipf`: a power law whose mean is a fifth of the longest, the same sum of squares
    as `full`; `giant`: see GIANT; `tiny`: 10 000 sequences, all the longest.
    mask: `causal`; `targets`: TARGETS candidates behind each history; `window`: WINDOW positions back.
    """

    head_dim: int
    seq_len: int
    lengths: str = "full"
    mask: str = "causal"
    width: int = 1024  # heads * head_dim, at most
    batch: int = 32  # sequences of full length

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def num_targets(self) -> int:
        return TARGETS if self.mask == "targets" else 0

    @property
    def window(self) -> int:
        return WINDOW if self.mask == "window" else 0

    def histories(self) -> list[int]:
        if self.lengths == "zipf":
            # u^4, u uniform on [0, 1]: density x^(-3/4), mean 1/5, mean square 1/9.
            count = 9 * self.batch
            lengths = [math.ceil(self.seq_len * ((i + 0.5) / count) ** 4) for i in range(count)]
            random.Random(0).shuffle(lengths)
            return lengths
        if self.lengths == "giant":
            lengths = [16 + 11 * i % 49 for i in range(NEIGHBOURS)]
            return [*lengths[: NEIGHBOURS // 2], self.seq_len, *lengths[NEIGHBOURS // 2 :]]
        return [self.seq_len] * (10_000 if self.lengths == "tiny" else self.batch)

    def flops(self, direction: str) -> int:
        """Two matrix products a live cell forward, five backward."""
        cells = sum(
            live_cells(history + self.num_targets, self.num_targets, self.window) for history in self.histories()
        )
        return (4 if direction == "forward" else 10) * self.num_heads * self.head_dim * cells

    def inputs(self, device: torch.device, dtype: torch.dtype) -> "Inputs":
        lengths = [history + self.num_targets for history in self.histories()]
        targets = torch.full((len(lengths),), TARGETS, device=device) if self.num_targets else None
        mask = {"num_targets": targets, "max_attn_len": self.window}
        return inputs(lengths, self.num_heads, self.head_dim, device, dtype, **mask)


def live_cells(length: int, num_targets: int, window: int) -> int:
    """Of one causal sequence; targets attend to history and themselves (a window is for sequences without)."""
    history = length - num_targets
    reach = window or length
    return sum(min(row, reach) + 1 for row in range(history)) + num_targets * (history + 1)


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    call: dict[str, Any]  # everything else that a kernel is called with


def inputs(
    lengths: list[int], num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, **mask: Any
) -> Inputs:
    """q, k, v: slices of one packed [T, 4 * H * D] buffer."""
    total = sum(lengths)
    packed = torch.empty(total, 4 * num_heads * head_dim, device=device, dtype=dtype).normal_()
    _, v, q, k = (part.unflatten(1, (num_heads, head_dim)) for part in packed.chunk(4, dim=1))
    call = {
        "seq_offsets": torch.tensor([0, *itertools.accumulate(lengths)], device=device),
        "seq_lengths": None,
        "num_targets": None,
        "num_contextuals": None,
        "attn_mask": None,
        "attn_bias": None,
        "max_seq_len": max(lengths),
        "alpha": head_dim**-0.5,
        "scale": 1 / max(lengths),
        "causal": True,
        "contextual_seq_len": 0,
        "target_group_size": 1,
        "max_attn_len": 0,
        "min_full_attn_seq_len": 0,
        "targets_share_position": False,
    }
    dout = torch.empty(total, num_heads, head_dim, device=device, dtype=dtype).normal_()
    return Inputs(q, k, v, dout, {**call, **mask})


class Reference:
    """Plain PyTorch, called as a kernel module is."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **call: Any) -> Tensor:
        return hstu_attention_reference(q, k, v, scaling_seq_len=1 / scale, **call)

    @staticmethod
    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **call: Any) -> tuple:
        return hstu_attention_backward_reference(dout, q, k, v, scaling_seq_len=1 / scale, **call)


def kernels() -> dict[str, Any]:
    """Every implementation of ours that runs on this machine, by name."""
    if not torch.cuda.is_available():
        return {"reference": Reference}
    modules = {"sm90": kernel_table.ATTENTION[9], "portable": kernel_table.PORTABLE}
    found = {name: importlib.import_module(f"{kernel_table.KERNELS}.{module}") for name, module in modules.items()}
    capability = torch.cuda.get_device_capability()
    plain = {"dtype": torch.bfloat16, "attn_dim": 64, "hidden_dim": 64, "has_mask": False, "has_bias": False}
    return {name: module for name, module in found.items() if module.unsupported(capability, **plain) is None}


def calls_of(kernel: Any, direction: str, sets: Sequence[Inputs]) -> list[Callable[[], Any]]:
    """One for every set of inputs."""
    if direction == "forward":
        return [functools.partial(kernel.forward, q, k, v, **call) for q, k, v, _, call in sets]
    backward = functools.partial(kernel.backward, needs_bias_grad=False)
    return [functools.partial(backward, dout, q, k, v, **call) for q, k, v, dout, call in sets]


def run_once(kernel: Any, inputs: Inputs) -> list[Tensor]:
    """out, dq, dk, dv"""
    (forward,), (backward,) = (calls_of(kernel, direction, [inputs]) for direction in DIRECTIONS)
    return [forward(), *backward()[:3]]


def compile_kernels(name: str, problem: Problem) -> None:
    """On a small problem, whose kernels are those of the large one."""
    small = problem._replace(seq_len=64, batch=2, lengths="full")
    run_once(kernels()[name], small.inputs(torch.device("cuda"), torch.bfloat16))
