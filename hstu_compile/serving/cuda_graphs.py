"""CUDA graphs of a step, one for each size of a grid; a request replays the smallest that holds it."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hstu_compile.kv_cache import KVCache
from hstu_compile.ops import waiting
from hstu_compile.serving.padding import Rows
from hstu_compile.serving.plan import Plan
from hstu_compile.serving.staging import Staging
from hstu_compile.serving.step import Request, Step

log = logging.getLogger("hstu_compile")

Size = tuple[int, int]  # users, new tokens
STAGED_BYTES = 1 << 20  # of an input at most: larger ones are copied by themselves, as much of them as there is


def supported(device: torch.device) -> bool:
    return device.type == "cuda"


@dataclass
class Recording:
    """A launch as CUDA graphs, which write to `outputs`."""

    graphs: list[torch.cuda.CUDAGraph]
    layers: list[int]  # before each graph but the first, the layer that it reads first
    outputs: Sequence[Any]
    bytes: int  # that are reserved for them

    def replay(self, wait: Callable[[int], None] | None = None) -> None:
        """wait(layer): before what reads the pages of a layer, where the recording is by layers."""
        self.graphs[0].replay()
        for layer, graph in zip(self.layers, self.graphs[1:], strict=True):
            assert wait is not None
            wait(layer)
            graph.replay()


def record(launch: Callable[[], Sequence[Any]], pool: Any = None, by_layers: bool = False) -> Recording:
    """Record a launch.

    Args:
        by_layers: as one graph up to each `wait_layer` in it, as no graph can wait in its midst.
    """
    reserved, side = torch.cuda.memory_reserved(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles
            launch()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    graphs, layers = list[torch.cuda.CUDAGraph](), list[int]()

    def begin() -> None:
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool, capture_error_mode="thread_local")  # the cache has threads

    @torch.compiler.disable
    def cut(layer: int) -> None:
        graphs[-1].capture_end()
        layers.append(layer)
        begin()

    torch.cuda.synchronize()
    with torch.cuda.stream(side), waiting(cut) if by_layers else contextlib.nullcontext():
        begin()
        try:
            outputs = launch()
        finally:
            graphs[-1].capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return Recording(graphs, layers, outputs, torch.cuda.memory_reserved() - reserved)


@dataclass
class _Recorded:
    whole: Recording
    by_layers: Recording | None  # where there is a host to load from
    inputs: list[Any]  # the model's, tensors with addresses of their own
    staged: list[int]  # which of them go with the staging
    others: list[int]  # which other tensors there are
    staging: Staging  # of these, and of a plan
    seconds: float


class CudaGraphs:
    """Recorded when a request first needs them, of one memory pool: two of them never run at a time.

    A graph is of the numbers that it reads, and of sizes other than tokens and sequences, as they were when it was
    recorded: requests with others are launched. So are all of a size that can't be recorded, and `words` says why.
    """

    def __init__(
        self,
        step: Step,
        launch: Callable[..., Sequence[Any]],
        sizes: Sequence[Size],
        max_seq_len: int,
        cache: KVCache,
    ) -> None:
        self._step, self._launch, self._cache = step, launch, cache
        self._sizes = sorted(sizes, key=lambda size: (size[1], size[0]))
        self._max_seq_len = max_seq_len
        self._recorded: dict[Size, _Recorded | str] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.gpu.device.type == "cuda" else None
        self.replays = self.launches = 0

    def size(self, request: Request, plan: Plan) -> Size | None:
        """The smallest size that holds a request; None where it is to be launched."""
        sequences, rows = plan.num_sequences, max(plan.num_rows, 2)
        found = next((size for size in self._sizes if size[0] >= sequences and size[1] >= rows), None)
        if found is not None:
            if found not in self._recorded:
                self._recorded[found] = self._record(found, request, plan)
            recorded = self._recorded[found]
            if isinstance(recorded, str) or not self._step.padding.fits(recorded.inputs, request.inputs):
                found = None
        self.replays += found is not None
        self.launches += found is None
        return found

    def replay(
        self, size: Size, request: Request, plan: Plan, wait: Callable[[int], None] | None = None
    ) -> Sequence[Any]:
        """The outputs of the size's graphs; the next replay overwrites them.

        Args:
            wait: for what is loaded of a layer.
        """
        recorded = self._recorded[size]
        assert isinstance(recorded, _Recorded)
        padding, tokens = self._step.padding, size[0] * self._max_seq_len
        rooms, on_device, count = recorded.staging.rooms(), recorded.others, len(recorded.staged)
        plan.fill(rooms[count:])
        rows = Rows(torch.from_numpy(rooms[count]), recorded.staging.tensors[count])
        for i, room in zip(recorded.staged, rooms, strict=False):
            if request.inputs[i].is_cuda:
                on_device = [*on_device, i]
            else:
                padding.fill_host(i, room, request.inputs[i], rows, tokens)
        recording = recorded.whole
        if wait is not None:
            assert recorded.by_layers is not None
            recording = recorded.by_layers
        recorded.staging.send()
        try:
            for i in on_device:
                padding.fill(i, recorded.inputs[i], request.inputs[i], rows, tokens)
            recording.replay(wait)
        finally:
            recorded.staging.sent()
        return recording.outputs

    def _record(self, size: Size, request: Request, plan: Plan) -> _Recorded | str:
        """Graphs of no new rows: recording computes, and writes nowhere."""
        begin, device = time.perf_counter(), self._step.device
        users, tokens = size
        sequences, all_tokens = users + 1, users * self._max_seq_len  # the last sequence is padding
        planned = plan.tensors(tokens, sequences, self._step, self._cache.max_pages)
        rows = Rows(planned[0], planned[0].to(device))
        padded = self._step.padding.pad(request.inputs, rows, all_tokens, sequences)
        if self._step.offsets(padded)[-1] != all_tokens:
            return "the model takes lengths, expected offsets: padding would belong to no sequence"
        inputs = self._step.padding.blank(padded)
        staged = [
            i for i, x in enumerate(inputs) if isinstance(x, Tensor) and not x.is_cuda and x.nbytes <= STAGED_BYTES
        ]
        others = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and i not in staged]
        staging = Staging([*(inputs[i] for i in staged), *(x.zero_() for x in planned)], device)
        for i, x in zip(staged, staging.tensors, strict=False):
            inputs[i] = x
        inputs = [x.to(device) if isinstance(x, Tensor) else x for x in inputs]
        planned = staging.tensors[len(staged) :]

        def launch() -> Sequence[Any]:
            return self._launch(*inputs, *planned)

        try:
            whole = record(launch, self._pool)
            by_layers = record(launch, self._pool, by_layers=True) if self._cache.host is not None else None
        except RuntimeError as error:
            log.exception("hstu_compile: a CUDA graph could not be recorded, requests are launched")
            return f"{type(error).__name__}: {error}"
        return _Recorded(whole, by_layers, inputs, staged, others, staging, time.perf_counter() - begin)

    def words(self) -> list[str]:
        lines = [f"CUDA graphs: {self.replays} requests replayed, {self.launches} launched"]
        for (users, tokens), recorded in self._recorded.items():
            what = f"{users} users, {tokens} new tokens"
            if isinstance(recorded, str):
                lines.append(f"  {what}: not recorded: {recorded}")
            else:
                reserved = recorded.whole.bytes + (recorded.by_layers.bytes if recorded.by_layers is not None else 0)
                lines.append(f"  {what}: {recorded.seconds:.2f} s, {reserved / 2**20:.1f} MiB more reserved")
        return lines
