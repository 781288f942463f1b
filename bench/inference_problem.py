"""What is served in the benchmarks: models, users and their requests; and the ways to answer these."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hstu_compile
from bench.clock import Clock, Time, rest
from bench.native_jagged import HSTUBlock, Ranker
from bench.tables import write
from hstu_compile.serving import cuda_graphs

NUM_ITEMS = 100_000


class Shape(NamedTuple):
    """Of the model, and the limits of its engine; as published."""

    num_layers: int = 8
    num_heads: int = 4
    head_dim: int = 256
    max_batch: int = 16
    max_seq_len: int = 4096
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 32

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    def block(self, device: torch.device) -> HSTUBlock:
        torch.manual_seed(0)
        block = HSTUBlock(self.num_layers, self.width, self.num_heads, self.head_dim, self.max_seq_len)
        return block.to(device, self.dtype).eval()

    def ranker(self, device: torch.device) -> Ranker:
        model = Ranker(self.block(device), NUM_ITEMS, self.max_seq_len + 1, self.width)
        return model.to(device, self.dtype).eval()


class Sizes(NamedTuple):
    """Of a request: `batch` sequences of `seq_len` tokens, the last of which are new: history, then candidates."""

    batch: int
    seq_len: int
    new: int
    candidates: int

    @property
    def cached(self) -> int:
        return self.seq_len - self.new


def arguments(sizes: Sizes, tokens: Tensor, length: int, candidates: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """The first `length` of each sequence's tokens [batch, seq_len, ...], as the models take them, on the CPU."""
    offsets, num_targets = torch.arange(sizes.batch + 1) * length, torch.full((sizes.batch,), candidates)
    return tokens[:, :length].flatten(0, 1), offsets, num_targets, length


def on(device: torch.device, given: tuple) -> tuple:
    return tuple(x.to(device) if isinstance(x, Tensor) else x for x in given)


class Latency(NamedTuple):
    """Milliseconds from a request to its answer, host included; and medians of what the GPU works, and the host."""

    p50: float
    p99: float
    gpu: Time | None  # None: the host waits for the GPU in between


class Way(NamedTuple):
    """How a request is answered."""

    implementation: str  # native: eager, fused: hstu_compile.backend, cached: hstu_compile.serve
    cuda_graph: bool = False
    tier: str | None = None  # where the cache has the user: gpu, host, or miss


def latency(prepare: Callable[[int], Callable[[], Any]], device: torch.device, warm_up: int, rounds: int) -> Latency:
    """prepare(i): everything up to the i-th request; what it returns answers the request, and is measured."""
    for i in range(warm_up):
        prepare(i)()
    waits = []
    for i in range(warm_up, warm_up + rounds):
        answer = prepare(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        answer()
        if device.type == "cuda":  # pages may still be on their way to the host: the answer is there
            torch.cuda.current_stream(device).synchronize()
        waits.append(1e3 * (time.perf_counter() - began))
    return Latency(statistics.median(waits), _quantile(waits, 0.99), _work(prepare, device, warm_up + rounds, rounds))


def _work(prepare: Callable[[int], Callable[[], Any]], device: torch.device, first: int, rounds: int) -> Time | None:
    clock, works = Clock(device), []
    try:
        for i in range(first, first + rounds):
            works += clock.time(prepare(i))
            rest(works[-1].ms, device)
    except RuntimeError:
        return None
    return Time(*map(statistics.median, zip(*works, strict=True)))


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def graphed(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call, whose tensors stay where they are, as a replayed CUDA graph; itself where there is no GPU."""
    if not cuda_graphs.supported(device):
        return call
    return cuda_graphs.record(lambda: [call()]).replay


def engine_of(model: nn.Module, shape: Shape, grid: Sequence[tuple[int, int]], **options: Any) -> Any:
    return hstu_compile.serve(
        model,
        max_batch=shape.max_batch,
        max_seq_len=shape.max_seq_len,
        page_size=shape.page_size,
        cuda_graphs=grid,
        **options,
    )


def row(shape: Shape, sizes: Sizes, way: Way, found: Latency, device: torch.device) -> dict[str, Any]:
    """What is recorded."""
    return {
        **way._asdict(),
        "batch": sizes.batch,
        "seq_len": sizes.seq_len,
        "cached": sizes.cached if way.tier in ("gpu", "host") else 0,
        "new": sizes.new,
        "candidates": sizes.candidates,
        "ms": found.gpu and found.gpu.ms,
        "host_ms": found.gpu and found.gpu.host_ms,
        "p50_ms": found.p50,
        "p99_ms": found.p99,
        **{name: value for name, value in shape._asdict().items() if name != "dtype"},
        "dtype": str(shape.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def record(path: Path | None, what: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Into a results file, in the place of what it has of the same."""
    if path is not None:
        known = json.loads(path.read_text())["benchmarks"] if path.exists() else []
        kept = [row for row in (benchmark["extra_info"] for benchmark in known) if row["what"] != what]
        write(path, "bench.inference", [*kept, *({"what": what, **row} for row in rows)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the model and its engine, and of the measurement."""
    for name, default in Shape._field_defaults.items():
        if isinstance(default, int):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="results file to write to, beside what it has of other benchmarks")


def shape_of(args: argparse.Namespace) -> Shape:
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    return Shape(**{name: getattr(args, name) for name in Shape._fields if hasattr(args, name)}, dtype=dtype)


def served(engine: Any, sizes: Sizes, tokens: Tensor) -> Callable[[int], Callable[[], Any]]:
    """prepare(i) of `latency`: users of their own, whose first tokens the engine has seen."""
    before = arguments(sizes, tokens, sizes.cached, 0)
    whole = arguments(sizes, tokens, sizes.seq_len, sizes.candidates)

    def prepare(i: int) -> Callable[[], Any]:
        users = [f"{sizes}, request {i}, user {k}" for k in range(sizes.batch)]
        if sizes.cached:
            engine(users, *before)
        return lambda: engine(users, *whole)

    return prepare


def repeated(call: Callable[[], Any]) -> Callable[[int], Callable[[], Any]]:
    """prepare(i) of `latency`, of a call that remembers nothing."""
    return lambda i: call
