"""CUDA graphs of a step, one for each size of a grid; a request replays the smallest that holds it."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hstu_compile.kv_cache import KVCache
from hstu_compile.serving.step import Request, Step

if TYPE_CHECKING:
    from hstu_compile.serving.engine import Plan

log = logging.getLogger("hstu_compile")

Size = tuple[int, int]  # users, new tokens


def supported(device: torch.device) -> bool:
    return device.type == "cuda"


def record(launch: Callable[[], Sequence[Any]], pool: Any) -> tuple[Callable[[], None], Sequence[Any], int]:
    """A CUDA graph of a launch, as (replay, what it writes to, bytes that it has reserved)."""
    reserved, side = torch.cuda.memory_reserved(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles
            launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # the cache has threads
        outputs = launch()
    torch.cuda.synchronize()
    return graph.replay, outputs, torch.cuda.memory_reserved() - reserved


@dataclass
class _Recorded:
    replay: Callable[[], None]
    inputs: list[Any]  # the model's, tensors with addresses of their own
    plan: tuple[Tensor, ...]  # rows, row_offsets, cached_lengths
    outputs: Sequence[Any]
    seconds: float
    bytes: int


class CudaGraphs:
    """Recorded when a request first needs them, of one memory pool: two of them never run at a time.

    A graph is of the caller's numbers and of sizes other than tokens and sequences as they were when it was recorded:
    requests with others are launched. Where recording fails, the sizes are launched too, and `words` says why.
    """

    def __init__(
        self,
        step: Step,
        launch: Callable[..., Sequence[Any]],
        sizes: Sequence[Size],
        max_seq_len: int,
        cache: KVCache,
    ) -> None:
        self._step, self._launch, self._sizes, self._cache = step, launch, list(sizes), cache
        self._max_seq_len = max_seq_len
        self._recorded: dict[Size, _Recorded | str] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.gpu.device.type == "cuda" else None
        self.replays = self.launches = 0

    def size(self, request: Request, plan: "Plan") -> Size | None:
        """The smallest size that holds a request; None where it is to be launched."""
        fitting = [s for s in self._sizes if s[0] >= len(plan.cached) and s[1] >= max(len(plan.rows), 2)]
        found = min(fitting, key=lambda s: (s[1], s[0]), default=None)
        if found is not None:
            if found not in self._recorded:
                self._recorded[found] = self._record(found, request, plan)
            recorded = self._recorded[found]
            if isinstance(recorded, str) or not self._step.fits(recorded.inputs, request.inputs):
                found = None
        self.replays += found is not None
        self.launches += found is None
        return found

    def replay(self, size: Size, request: Request, plan: "Plan") -> Sequence[Any]:
        """The outputs of the size's graph; the next replay overwrites them."""
        recorded = self._recorded[size]
        assert isinstance(recorded, _Recorded)
        users, tokens = size
        self._step.fill(recorded.inputs, request.inputs, users * self._max_seq_len)
        for static, given in zip(recorded.plan, plan.tensors(tokens, users + 1, self._step), strict=True):
            static.copy_(given, non_blocking=True)
        recorded.replay()
        return recorded.outputs

    def _record(self, size: Size, request: Request, plan: "Plan") -> _Recorded | str:
        """A graph of no new rows: recording computes, and writes nowhere."""
        begin, device = time.perf_counter(), self._step.device
        users, tokens = size
        sequences, all_tokens = users + 1, users * self._max_seq_len  # the last sequence is padding
        padded = self._step.pad(request.inputs, all_tokens, sequences)
        if self._step.offsets(padded)[-1] != all_tokens:
            return "the model takes lengths, expected offsets: padding would belong to no sequence"
        inputs = self._step.blank(padded)
        static = tuple(x.to(device).zero_() for x in plan.tensors(tokens, sequences, self._step))
        rows, begins, cached = static
        table, valid = self._cache.page_table[:sequences], self._cache.cached_lengths[:sequences]
        given = (*inputs, rows, begins, table, cached, valid)
        try:
            replay, outputs, reserved = record(lambda: self._launch(*given), self._pool)
        except RuntimeError as error:
            log.exception("hstu_compile: a CUDA graph could not be recorded, requests are launched")
            return f"{type(error).__name__}: {error}"
        return _Recorded(replay, inputs, static, outputs, time.perf_counter() - begin, reserved)

    def words(self) -> list[str]:
        lines = [f"CUDA graphs: {self.replays} requests replayed, {self.launches} launched"]
        for (users, tokens), recorded in self._recorded.items():
            what = f"{users} users, {tokens} new tokens"
            if isinstance(recorded, str):
                lines.append(f"  {what}: not recorded: {recorded}")
            else:
                lines.append(f"  {what}: {recorded.seconds:.2f} s, {recorded.bytes / 2**20:.1f} MiB more reserved")
        return lines
