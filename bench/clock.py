"""Time of what a host enqueues on a GPU: the GPU's own, and the host's beside it."""

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

HEAD_START = 20_000_000  # clock cycles that the GPU waits, some 10 ms; doubled where the host takes longer
LONGEST_HEAD_START = 100 * HEAD_START
PAUSE = 2  # after what is measured, in times of it

Call = Callable[[], object]


class Time(NamedTuple):
    """Milliseconds."""

    ms: float  # of the GPU; without one, of the host
    host_ms: float  # until all is enqueued


class Clock:
    """Times calls that enqueue work. The GPU waits until all of it is enqueued, so a slow host is not in its time."""

    def __init__(self, device: torch.device, head_start: int = HEAD_START) -> None:
        """head_start: clock cycles, to begin with."""
        self.device, self.head_start = device, head_start

    def time(self, *calls: Call) -> list[Time]:
        """Of each of the calls, which run one after the other.

        Raises:
            RuntimeError: the calls wait for the GPU, or fill its queue, so that it cannot wait for them.
        """
        if self.device.type != "cuda":
            return [Time(ms, ms) for ms in _host_milliseconds(calls)]
        while self.head_start <= LONGEST_HEAD_START:
            times = self._on_gpu(calls)
            if times is not None:
                return times
            self.head_start *= 2
        raise RuntimeError("the calls wait for the GPU or fill its queue: its time cannot be told from the host's")

    def _on_gpu(self, calls: Sequence[Call]) -> list[Time] | None:
        """None: the GPU began before all was enqueued."""
        start, *ends = marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(self.head_start)  # private; read in torch 2.11 and 2.13
        start.record()
        host = _host_milliseconds(calls, ends)
        in_time = not start.query()
        ends[-1].synchronize()
        gpu = (before.elapsed_time(end) for before, end in zip(marks, ends, strict=False))
        return [Time(*both) for both in zip(gpu, host, strict=True)] if in_time else None


def _host_milliseconds(calls: Sequence[Call], ends: Sequence[torch.cuda.Event] = ()) -> list[float]:
    times = []
    for call, end in zip_longest(calls, ends):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
        if end is not None:
            end.record()
    return times


def rest(ms: float, device: torch.device) -> None:
    """After `ms` of work: else the power limit lowers the clock, and with it what is measured next."""
    if device.type == "cuda":
        time.sleep(PAUSE * ms / 1e3)
