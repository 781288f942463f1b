"""The HSTU block in inference: how much a cache of keys and values saves, by cached tokens, batch and CUDA graphs.

    python -m bench.inference_layer --batch 1 8 --seq-len 2048 --cached 0 0.5 0.9375 --candidates 0 64

`native` is the unmodified block of bench/native_jagged.py, eager; `fused` the same through hstu_compile.backend; both
compute every token of every request. `cached` is the same block through hstu_compile.serve, which computes new tokens.
A request is whole sequences, of which a share, `cached`, was there in an earlier one. `ms` is what the GPU works on a
request, p50 and p99 are from a request to its answer, host included.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hstu_compile
from bench.inference_problem import (
    Shape,
    Sizes,
    Way,
    add_arguments,
    arguments,
    engine_of,
    graphed,
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
        self.device, self.block = device, shape.block(device)
        options = {"expect": shape.num_layers}
        self.fused = torch.compile(self.block, backend=hstu_compile.backend, options=options, dynamic=True)
        grid = {(sizes.batch, sizes.batch * sizes.new) for sizes in requests}
        self.launched, self.replayed = engine_of(self.block, shape, ()), engine_of(self.block, shape, sorted(grid))

    def of(self, sizes: Sizes, tokens: Tensor) -> dict[Way, Callable[[int], Callable[[], Any]]]:
        """prepare(i) of each."""
        whole = on(self.device, arguments(sizes, tokens, sizes.seq_len, sizes.candidates))
        tier = "gpu" if sizes.cached else "miss"
        return {
            Way("native"): repeated(lambda: self.block(*whole)),
            Way("fused"): repeated(lambda: self.fused(*whole)),
            Way("fused", cuda_graph=True): repeated(graphed(lambda: self.fused(*whole), self.device)),
            Way("cached", tier=tier): served(self.launched, sizes, tokens),
            Way("cached", cuda_graph=True, tier=tier): served(self.replayed, sizes, tokens),
        }


def lines(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One for each request, with the native block's time over each."""
    cells = []
    for request, group in itertools.groupby(rows, lambda r: (r["batch"], r["seq_len"], r["new"], r["candidates"])):
        found = list(group)
        native = found[0]["p50_ms"]
        gpu = ["waits" if r["ms"] is None else f"{r['ms']:.2f}" for r in found]
        times = [f"{r['p50_ms']:.2f} ({ms}, {native / r['p50_ms']:.1f}x)" for r, ms in zip(found, gpu, strict=True)]
        cells.append([*map(str, request), *times])
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seq-len", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--cached", type=float, nargs="+", default=[0, 0.5, 0.9375, 0.97], help="share of the tokens")
    parser.add_argument("--candidates", type=int, nargs="+", default=[0, 64], help="of the new tokens, at most")
    add_arguments(parser)
    args = parser.parse_args(argv)
    shape, requests = shape_of(args), []
    for batch, seq_len, share, candidates in itertools.product(args.batch, args.seq_len, args.cached, args.candidates):
        new = seq_len - int(share * seq_len)
        requests.append(Sizes(batch, seq_len, new, min(candidates, new)))
    requests = list(dict.fromkeys(requests))
    ways, rows = Ways(shape, requests, args.device), []
    with torch.no_grad(), progress("requests", len(requests)) as advance:
        for sizes in requests:
            tokens = torch.randn(sizes.batch, sizes.seq_len, shape.width, device=args.device).to(shape.dtype)
            prepared = ways.of(sizes, tokens)
            for way, prepare in prepared.items():
                found = latency(prepare, args.device, args.warm_up, args.rounds)
                rows.append(row(shape, sizes, way, found, args.device))
            record(args.json, "block", rows)  # so far: all sizes take minutes
            advance()
    names = [f"{way.implementation}{', graph' if way.cuda_graph else ''}" for way in prepared]
    print("p50 of a request, ms (ms of the GPU, native's p50 over it)")
    print(table(["batch", "tokens", "new", "candidates", *names], lines(rows)))


if __name__ == "__main__":
    main()
