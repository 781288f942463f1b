"""A soak of serving: an hour's traffic one request behind the other, and what has to hold checked after each of them.

    python -m bench.soak --requests 100000 --seconds 1200

Users come again by a Zipf law, with histories that grow, are cut, or are others; the GPU has pages for a tenth of what
they hold, the host for some more. Weights are loaded anew, loads fail or are late, free pages become NaN. After every
request pages, users and counters are held against a ledger of what was asked for; of every `--check-every`-th the
answer against the model without a cache, by the error budget. The first violation ends the run: the same seed repeats
its requests and faults, and with `--settled`, where copies are over before the next request begins, all else too.
"""

import argparse
import logging
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.inference_problem import Shape, engine_of, shape_of
from bench.show import progress, table
from bench.soak_checks import Ledger, Uncached, Violation, poison, settle
from bench.soak_traffic import FailingMemory, Request, Traffic
from bench.tables import write
from hstu_compile.kv_cache import HostKVStorageManager, PageLayout
from hstu_compile.serving import Answer

SHAPES = {  # where the flags do not say otherwise
    "cuda": Shape(max_batch=8),
    "cpu": Shape(num_layers=2, num_heads=2, head_dim=16, max_batch=4, max_seq_len=64, page_size=16),
}
LATE = 0.02  # seconds until a load that is late counts as failed
POISONED = 0.01  # of the requests: free pages become NaN behind them


class Soak:
    """An engine under traffic."""

    def __init__(self, args: argparse.Namespace, shape: Shape) -> None:
        self.args, self.shape, self.device = args, shape, args.device
        self.traffic = Traffic(
            args.seed, args.users, args.zipf, shape.max_batch, shape.max_seq_len, shape.num_layers, args.faults
        )
        self.model = shape.ranker(self.device)
        pages = sum(-(-len(history) // shape.page_size) for history in self.traffic.histories)
        most = shape.max_batch * -(-self.traffic.max_history // shape.page_size)
        self.num_pages = max(most, int(args.gpu_share * pages))  # the largest request fits
        self.host_pages = max(most, int(args.host_share * pages))
        grid = [(1, shape.max_seq_len // 8), *((shape.max_batch, shape.max_seq_len // n) for n in (4, 1))]
        engine = engine_of(self.model, shape, grid, num_pages=self.num_pages, host=self._host)
        self.ledger = Ledger(engine)
        self.uncached = Uncached(self.model, self.traffic.max_history, shape.max_seq_len, self.device)
        self.latencies: list[float] = []  # ms
        self.reloads = self.changed = 0
        self._rng = random.Random(args.seed)

    def step(self) -> None:
        """One request, and the checks behind it.

        Raises:
            Violation
        """
        args, number = self.args, len(self.latencies)
        if number and number % args.reload_every == 0:
            self.ledger.reload({name: x.roll(1, 0) for name, x in self.model.state_dict().items()})
            self.uncached.reloaded()
            self.reloads += 1
        request = self.traffic.request()
        self.ledger.forget(request.changed)
        self.changed += len(request.changed)
        try:
            answer = self._answer(request)
            self.ledger.check(request, answer)
            if number % args.check_every == 0:
                self.uncached.check(request, answer)
                self.ledger.check_settled()
        except Exception as error:
            raise Violation(
                f"request {number}, seed {args.seed}, {request.fault or 'no fault'}: {type(error).__name__}: {error}"
            ) from error
        if args.settled:
            settle(self.ledger.cache)
        if self._rng.random() < POISONED:
            poison(self.ledger.cache)

    def row(self, seconds: float) -> dict[str, Any]:
        """What is recorded; times are the engine's, without the checks, but for `seconds`."""
        ledger, (gpu, host) = self.ledger, self.ledger.cache.counters.values()
        users = sum(ledger.tiers.values())
        times = self.latencies[1:] or self.latencies  # the first compiles
        return {
            "requests": len(self.latencies),
            "seconds": seconds,
            "requests_per_s": 1e3 * len(times) / sum(times),
            **dict(zip(("p50_ms", "p99_ms"), np.percentile(times, [50, 99]).tolist(), strict=True)),
            "gpu_hit_rate": ledger.tiers["gpu"] / users,
            "host_hit_rate": ledger.tiers["host"] / users,
            "miss_rate": ledger.tiers["miss"] / users,
            "gpu_evictions": gpu.evictions,
            "host_evictions": host.evictions,
            "reloads": self.reloads,
            "histories_changed": self.changed,
            "reads_failed": self._storage.met,
            "failures": host.failures,
            "samples": self.uncached.samples,
            "worst_of_budget": self.uncached.worst,
            "seed": self.args.seed,
            "users": self.args.users,
            "zipf": self.args.zipf,
            "num_pages": self.num_pages,
            "host_pages": self.host_pages,
            **{name: value for name, value in self.shape._asdict().items() if name != "dtype"},
            "dtype": str(self.shape.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None,
        }

    def _host(self, layout: PageLayout) -> HostKVStorageManager:
        self._storage = FailingMemory(layout, self.host_pages)
        return HostKVStorageManager(self._storage, self.host_pages)

    def _answer(self, request: Request) -> Answer:
        engine = self.ledger.engine
        self._synchronize()
        began = time.perf_counter()
        if engine._cache is None:  # the first request makes it
            answer = engine(request.users, *request.arguments)
        else:
            timeout = engine._cache.load_timeout
            engine._cache.load_timeout = LATE if request.fault and request.fault.kind == "late" else timeout
            with self._storage.failing(request.fault):
                answer = engine(request.users, *request.arguments)
            engine._cache.load_timeout = timeout
        self._synchronize()
        self.latencies.append(1e3 * (time.perf_counter() - began))
        return answer

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def quiet() -> Iterator[None]:
    """Loads that fail are no news here."""
    log = logging.getLogger("hstu_compile")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1200, help="no request but the first begins later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=1000)
    parser.add_argument("--zipf", type=float, default=1.0, help="the n-th user comes n^-zipf times as often")
    parser.add_argument("--gpu-share", type=float, default=0.1, help="of the users' pages that the GPU has room for")
    parser.add_argument("--host-share", type=float, default=0.2)
    parser.add_argument("--check-every", type=int, default=50, help="requests until an answer is compared")
    parser.add_argument("--reload-every", type=int, default=2000, help="requests until there are new weights")
    parser.add_argument("--faults", type=float, default=0.02, help="of the requests whose loads would fail")
    parser.add_argument("--settled", action="store_true", help="wait for all copies behind each request")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="results file to write")
    sizes = [name for name, value in Shape._field_defaults.items() if isinstance(value, int)]
    for name in sizes:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    args = parser.parse_args(argv)
    for name in sizes:
        if getattr(args, name) is None:
            setattr(args, name, getattr(SHAPES[args.device.type], name))
    began = time.monotonic()
    with quiet(), progress("requests", args.requests) as advance:
        soak = Soak(args, shape_of(args))
        try:
            for number in range(args.requests):
                if number and time.monotonic() - began > args.seconds:
                    break
                soak.step()
                advance()
            soak.ledger.check_settled()
            row = soak.row(time.monotonic() - began)
        finally:
            soak.ledger.engine.close()
    print(table(["", ""], [[name, f"{x:.4g}" if isinstance(x, float) else str(x)] for name, x in row.items()]))
    if args.json is not None:
        write(args.json, "bench.soak", [row])
    return row


if __name__ == "__main__":
    main()
