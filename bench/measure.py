"""A training step: its time, memory and error."""

import contextlib
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hstu_compile
from bench.clock import Clock, Time, rest
from hstu_compile.verify import BACKWARD, FORWARD, figures_of

IMPLEMENTATIONS = ("native", "inductor", "hstu")
Inputs = tuple[Tensor, Tensor, Tensor]  # x, lengths, and the gradient that comes in from above


def compiled(model: nn.Module, implementation: str, options: Mapping[str, Any] | None = None) -> Callable:
    """What is compared: the model as it is, through Inductor, and through this project with `options`."""
    if implementation == "native":
        return model
    backend = {"inductor": "inductor", "hstu": hstu_compile.backend}[implementation]
    return torch.compile(model, backend=backend, options=options and dict(options))


class TrainingStep:
    """Forward and backward, in turn on each of the sets of inputs; gradients are dropped in the end."""

    def __init__(self, model: Callable, parameters: Sequence[nn.Parameter], sets: Sequence[Inputs]) -> None:
        self.model, self.parameters, self.sets = model, parameters, itertools.cycle(sets)
        self.out: Tensor | None = None

    def forward(self) -> None:
        self.x, lengths, self.dout = next(self.sets)
        self.out = self.model(self.x, lengths)

    def backward(self) -> None:
        self.out.backward(self.dout)
        self.drop()

    def drop(self) -> None:
        """All that a step has made."""
        self.out = None
        for tensor in (self.x, *self.parameters):
            tensor.grad = None

    def __call__(self) -> None:
        self.forward()
        self.backward()


class StepTimes(NamedTuple):
    forward: Time
    backward: Time
    step: Time


def interleaved(
    steps: Mapping[str, TrainingStep], device: torch.device, rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, StepTimes]:
    """Medians over rounds in which every step runs once, on a GPU that has rested; compile and warm up before.

    advance: called after every step.
    """
    clock = Clock(device)
    samples: dict[str, list[tuple[Time, ...]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            halves = clock.time(step.forward, step.backward)
            samples[name].append((*halves, Time(*map(sum, zip(*halves, strict=True)))))
            rest(samples[name][-1][-1].ms, device)
            advance()
    return {name: StepTimes(*map(_median, zip(*found, strict=True))) for name, found in samples.items()}


def _median(times: Sequence[Time]) -> Time:
    return Time(*map(statistics.median, zip(*times, strict=True)))


class Memory(NamedTuple):
    """MiB beyond what was held before a call."""

    held: float  # after it
    peak: float  # the most at once


def memory(call: Callable[[], None], device: torch.device) -> Memory:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        after = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return Memory(*((size - before) / 2**20 for size in after))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = [0, *itertools.accumulate(change for _, change in changes)]
    return Memory(held[-1] / 2**20, max(held) / 2**20)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ code logs its start and stop to file descriptor 2, whatever its log level."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def results(model: Callable, named: dict[str, nn.Parameter], x: Tensor, lengths: Tensor, dout: Tensor) -> dict:
    """The output and the gradients of x and of every parameter, by name."""
    out = model(x, lengths)
    sources = {"x": x, **named}
    gradients = torch.autograd.grad(out, list(sources.values()), dout)
    return {"output": out.detach(), **{f"d {name}": grad for name, grad in zip(sources, gradients, strict=True)}}


def error_and_budget(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """max|ours - exact| and m * max|eager - exact|, at least m roundings of the largest value."""
    m = FORWARD if name == "output" else BACKWARD
    figures = figures_of((name, ours), (name, eager), (name, exact), m)
    return figures.error, figures.budget
