"""GPU time without host time: CUDA graphs of launches, replayed between two events on a warm, idle GPU, interleaved.

Idle: a launch alone is followed by a pause, else the power limit lowers the clock and with it what is measured (an
H200 at 700 W runs at 1.65 GHz instead of 1.98). Launches back to back are what shows that. Without a GPU the launches
are calls, timed by the clock.
"""

import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch

from bench.clock import Clock, rest

SUSTAINED = 10  # launches back to back
HEAD_START = 200_000  # clock cycles, 0.1 ms: a graph is replayed in less
WARM_UP = 3

Call = Callable[[], Any]


class Times(NamedTuple):
    """Milliseconds a launch, medians."""

    ms: float  # alone
    sustained_ms: float  # of SUSTAINED back to back


class Launches(NamedTuple):
    """One implementation: a launch for every set of inputs, and SUSTAINED of them over all sets."""

    single: Sequence[Call]
    sustained: Call


class Replay(NamedTuple):
    graph: torch.cuda.CUDAGraph
    calls: Sequence[Call]  # they hold what the graph reads

    def __call__(self) -> None:
        self.graph.replay()


class Recorder:
    """Turns calls into CUDA graphs, which share memory: their results are not kept."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)

    def launches(self, make_calls: Callable[[], Sequence[Call]]) -> Launches:
        """make_calls: makes a call for every set of inputs, on the graphs' stream: autograd's backward stays there."""
        if self.device.type != "cuda":
            calls = make_calls()
            return Launches(calls, lambda: [call() for call in _repeated(calls)])
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            calls = make_calls()
            for call in calls:
                call()  # compiles
        return Launches([self._record([call]) for call in calls], self._record(_repeated(calls)))

    def _record(self, calls: Sequence[Call]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            for call in calls:
                call()
        return Replay(graph, calls)


def _repeated(calls: Sequence[Call]) -> list[Call]:
    return [calls[i % len(calls)] for i in range(SUSTAINED)]


def interleaved(launches: Mapping[str, Launches], device: torch.device, seconds: float) -> dict[str, Times]:
    """Times of each, over rounds in which each runs once, about `seconds` of them alone and `seconds` sustained."""
    clock = Clock(device, HEAD_START)
    for one in launches.values():
        one.sustained()
    single: dict[str, list[float]] = {name: [] for name in launches}
    sustained: dict[str, list[float]] = {name: [] for name in launches}

    def a_round(number: int) -> None:
        for name, one in launches.items():
            single[name].append(clock.time(one.single[number % len(one.single)])[0].ms)
            rest(single[name][-1], device)

    for number in range(WARM_UP):
        a_round(number)
    per_round = sum(min(times) for times in single.values()) / 1e3
    for times in single.values():
        times.clear()
    for number in range(_within(seconds / per_round, 5, 20)):
        a_round(number)
    for _ in range(_within(seconds / per_round / SUSTAINED, 2, 5)):
        for name, one in launches.items():
            sustained[name].append(clock.time(one.sustained)[0].ms / SUSTAINED)
    return {name: Times(statistics.median(single[name]), statistics.median(sustained[name])) for name in launches}


def _within(x: float, least: int, most: int) -> int:
    return max(least, min(most, int(x)))


def in_parallel(function: Callable[..., None], arguments: Iterable[tuple]) -> None:
    """function(*arguments) in processes of their own: kernels compile on every core, into the cache on disk."""
    calls = list(arguments)
    if not calls:
        return
    workers = min(os.cpu_count() or 1, len(calls))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(function, *call) for call in calls]:
            done.result()
