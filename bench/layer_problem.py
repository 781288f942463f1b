"""HSTU layers to measure: shape, inputs, the ways to run them; and what is measured of each."""

import gc
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from bench.measure import Inputs, StepTimes, TrainingStep, compiled, interleaved, memory
from bench.native_layer import HSTUStack
from hstu_compile.passes import NAMES

SETS = 2  # of inputs, used in turn


class Problem(NamedTuple):
    seq_len: int
    batch: int = 32
    num_heads: int = 4
    head_dim: int = 256
    num_layers: int = 1
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.2
    embedding_dim: int | None = None  # default: num_heads * head_dim
    full: bool = True  # every sequence has seq_len tokens; else 1 to seq_len, at random

    def model(self, device: torch.device) -> HSTUStack:
        shape = self.num_layers, self._width, self.num_heads, self.head_dim
        return HSTUStack(*shape, self.dropout).to(device, self.dtype)

    def inputs(self, device: torch.device) -> Inputs:
        x, dout = (
            torch.empty(self.batch, self.seq_len, self._width, device=device, dtype=self.dtype).normal_()
            for _ in range(2)
        )
        shortest = self.seq_len if self.full else 1
        return x.requires_grad_(), torch.randint(shortest, self.seq_len + 1, (self.batch,), device=device), dout

    @property
    def _width(self) -> int:
        return self.embedding_dim or self.num_heads * self.head_dim


class Variant(NamedTuple):
    """A way to run a layer."""

    implementation: str  # native, inductor, hstu
    recompute: tuple[str, ...] = ()  # what hstu computes again: its options, without their prefix
    passes: tuple[str, ...] = NAMES  # of hstu

    def compiled(self, model: HSTUStack) -> Callable:
        if self.implementation != "hstu":
            return compiled(model, self.implementation)
        options: dict[str, Any] = {"strict": True, "expect": len(model.layers), "enable": self.passes}
        return compiled(model, "hstu", options | {f"recompute_{name}": True for name in self.recompute})


class Measured(NamedTuple):
    step: TrainingStep
    times: StepTimes
    held_mib: float  # after the forward: its output, and what it keeps for the backward
    forward_peak_mib: float
    step_peak_mib: float


def measure(
    problem: Problem,
    variants: Mapping[str, Variant],
    device: torch.device,
    warm_up: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Measured | str]:
    """Of each variant, interleaved; of one that does not fit into the GPU's memory, the words that say so.

    advance: called after each of the warm_up + rounds steps of each.
    """
    torch._dynamo.reset()  # each length is compiled for itself
    torch.manual_seed(0)
    model = problem.model(device)
    sets = [problem.inputs(device) for _ in range(SETS)]
    found: dict[str, Measured | str] = {}
    steps, memories = {}, {}
    for name, variant in variants.items():
        step = TrainingStep(variant.compiled(model), list(model.parameters()), sets)
        try:
            for _ in range(warm_up):
                step()
                advance()
            forward = memory(step.forward, device)
            step.backward()
            steps[name], memories[name] = step, (*forward, memory(step, device).peak)
        except torch.OutOfMemoryError as error:
            step.drop()
            found[name] = f"{name} at N={problem.seq_len} does not fit: {str(error).splitlines()[0]}"
        if name in found:  # here, where the error and the frames that it holds are gone
            gc.collect()
            torch.cuda.empty_cache()
    for name, times in interleaved(steps, device, rounds, advance).items():
        found[name] = Measured(steps[name], times, *memories[name])
    return {name: found[name] for name in variants}


def rows(problem: Problem, variant: Variant, measured: Measured) -> list[dict[str, Any]]:
    """What is recorded of the forward and of the step."""
    times, device = measured.times, measured.step.parameters[0].device
    common = {
        "implementation": variant.implementation,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "seq_len": problem.seq_len,
        "batch": problem.batch,
        "num_heads": problem.num_heads,
        "head_dim": problem.head_dim,
        "num_layers": problem.num_layers,
        "recompute": list(variant.recompute),
        "dropout": problem.dropout,
        "full_sequence": problem.full,
        "held_mib": measured.held_mib,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }
    if variant.passes != NAMES:
        common["passes"] = list(variant.passes)
    return [
        {**common, "direction": direction, "ms": time.ms, "host_ms": time.host_ms, "peak_mib": peak}
        for direction, time, peak in (
            ("forward", times.forward, measured.forward_peak_mib),
            ("step", times.step, measured.step_peak_mib),
        )
    ]
