"""Time, peak memory and error of one step."""

import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

import hstu_compile
from hstu_compile.verify import BACKWARD, FORWARD, figures_of


def compiled(model: nn.Module) -> dict[str, Callable]:
    """The implementations that are compared: the model as it is, through Inductor, and through this project."""
    return {
        "native": model,
        "inductor": torch.compile(model, backend="inductor"),
        "hstu": torch.compile(model, backend=hstu_compile.backend),
    }


def training_step(model: Callable, parameters: list[nn.Parameter], x: Tensor, lengths: Tensor, dout: Tensor) -> None:
    """Forward and backward; the gradients of x and of every parameter are dropped in the end."""
    model(x, lengths).backward(dout)
    for tensor in (x, *parameters):
        tensor.grad = None


def interleaved_milliseconds(steps: Mapping[str, Callable[[], None]], device: torch.device, rounds: int) -> dict:
    """Median time of each step in ms, over rounds in which every step runs once; compile and warm up before."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device))
    return {name: statistics.median(values) for name, values in times.items()}


def milliseconds(step: Callable[[], None], device: torch.device, head_start: int = 0) -> float:
    """head_start: cycles that the GPU waits first, so that the host's time for the first launch is not in it."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    if head_start:
        torch.cuda._sleep(head_start)  # private; in torch 2.11, 2.13 and 2.15
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(step: Callable[[], None], device: torch.device) -> float:
    """The most memory that a step holds at once beyond what was held before it, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / 2**20


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
