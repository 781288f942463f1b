"""A whole ranking model in inference: embeddings, HSTU layers, a head, and users who come again.

    python -m bench.inference_e2e --batch 1 8 --seq-len 1024 4096

Each user has sent a request before; the next one brings some more history and new candidates. It is answered by the
unmodified model, eager, from every token (`native`); by the same model through hstu_compile.serve, from a cache of keys
and values: on the GPU, launched and as CUDA graph; in host memory, from where it is loaded layer by layer while the
layers before compute; and without anything cached (`miss`). p50 and p99 are from a request to its answer.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.inference_problem import (
    NUM_ITEMS,
    Shape,
    Sizes,
    Way,
    add_arguments,
    arguments,
    engine_of,
    latency,
    on,
    record,
    repeated,
    row,
    served,
    shape_of,
)
from bench.show import progress, table


class Ways:
    """The ways to answer a request, each compiled once for requests of all sizes."""

    def __init__(self, shape: Shape, requests: Sequence[Sizes], device: torch.device) -> None:
        self.shape, self.device, self.model = shape, device, shape.ranker(device)
        grid = sorted({(s.batch, s.batch * n) for s in requests for n in (s.new, s.seq_len)})
        self.launched, self.replayed = engine_of(self.model, shape, ()), engine_of(self.model, shape, grid)
        # Pages for one batch: who was there before it is in host memory.
        self.pages = max(s.batch * -(-s.seq_len // shape.page_size) for s in requests)
        users = 4 * max(s.batch for s in requests)
        held = users * shape.max_seq_len * 2 * shape.num_layers * shape.width * shape.dtype.itemsize
        self.evicting = engine_of(self.model, shape, grid, num_pages=self.pages, host=held)

    def of(self, sizes: Sizes, items: Tensor) -> dict[Way, Callable[[int], Callable[[], Any]]]:
        """prepare(i) of each."""
        whole = on(self.device, arguments(sizes, items, sizes.seq_len, sizes.candidates))
        uncached = sizes._replace(new=sizes.seq_len)
        return {
            Way("native"): repeated(lambda: self.model(*whole)),
            Way("cached", tier="gpu"): served(self.launched, sizes, items),
            Way("cached", cuda_graph=True, tier="gpu"): served(self.replayed, sizes, items),
            Way("cached", cuda_graph=True, tier="host"): self._from_host(sizes, items),
            Way("cached", cuda_graph=True, tier="miss"): served(self.replayed, uncached, items),
        }

    def _from_host(self, sizes: Sizes, items: Tensor) -> Callable[[int], Callable[[], Any]]:
        """prepare(i) of users whom other batches have driven out of the GPU's pages."""
        prepare = served(self.evicting, sizes, items)
        others = arguments(sizes, items, sizes.seq_len, 0)
        needed = -(-self.pages // (sizes.batch * -(-sizes.seq_len // self.shape.page_size)))

        def evicted(i: int) -> Callable[[], Any]:
            answer = prepare(i)
            for n in range(needed):
                self.evicting([f"{sizes}, other {i}, {n}, user {k}" for k in range(sizes.batch)], *others)
            self.evicting.drain()
            return answer

        return evicted


def link_ms(shape: Shape, sizes: Sizes, device: torch.device, copies: int = 10) -> float | None:
    """What the link takes from pinned memory for what is loaded of a request's users: the least that there is."""
    if device.type != "cuda":
        return None
    layer = sizes.batch * (sizes.cached // shape.page_size) * shape.page_size * 2 * shape.width
    host = torch.empty(layer, dtype=shape.dtype, pin_memory=True)
    there = torch.empty_like(host, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    there.copy_(host, non_blocking=True)
    start.record()
    for _ in range(copies):
        there.copy_(host, non_blocking=True)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / copies * shape.num_layers


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One for each request, with the native model's p50 over each."""
    cells = []
    for request, group in itertools.groupby(rows, lambda r: (r["batch"], r["seq_len"])):
        found = list(group)
        native = found[0]["p50_ms"]
        times = [f"{r['p50_ms']:.2f} / {r['p99_ms']:.2f} ({native / r['p50_ms']:.1f}x)" for r in found]
        cells.append([*map(str, request), *times])
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seq-len", type=int, nargs="+", default=list(range(512, 4097, 512)))
    parser.add_argument("--history", type=int, default=128, help="new tokens of it in a request")
    parser.add_argument("--candidates", type=int, default=256)
    add_arguments(parser)
    args = parser.parse_args(argv)
    shape, new = shape_of(args), args.history + args.candidates
    requests = [Sizes(batch, n, min(new, n), args.candidates) for batch in args.batch for n in args.seq_len]
    ways, rows = Ways(shape, requests, args.device), []
    with torch.no_grad(), progress("requests", len(requests)) as advance:
        for sizes in requests:
            items = torch.randint(NUM_ITEMS, (sizes.batch, sizes.seq_len))
            prepared = ways.of(sizes, items)
            for way, prepare in prepared.items():
                found = latency(prepare, args.device, args.warm_up, args.rounds)
                rows.append(row(shape, sizes, way, found, args.device))
                if way.tier == "host":
                    rows[-1]["link_ms"] = link_ms(shape, sizes, args.device)
            record(args.json, "model", rows)  # so far: all sizes take minutes
            advance()
    names = [", ".join(filter(None, (way.tier or "native", "graph" * way.cuda_graph))) for way in prepared]
    print("p50 / p99 of a request, ms (native's p50 over it)")
    print(table(["batch", "tokens", *names], lines(rows)))
    for r in rows:
        if r.get("link_ms"):
            over = r["p50_ms"] / r["link_ms"]
            print(f"batch {r['batch']}, {r['cached']} tokens: the link alone takes {r['link_ms']:.2f} ms ({over:.2f}x)")
    print(ways.evicting.report())


if __name__ == "__main__":
    main()
