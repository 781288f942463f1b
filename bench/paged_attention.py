"""Attention over a paged history on a GPU: every kernel and page size beside the unpaged op on the whole sequences.

    python -m bench.paged_attention [--batches 1 8 32] [--page-sizes 16 32 64 128 256] [--out results.json]

`ms` is one launch on an idle GPU by CUDA graph replay, `sustained` ten back to back; `eager` is the wall time of a call
of the op, many in a row. TFLOP/s count live cells. Batches above 1: 64 new tokens and 192 candidates behind 4096 in
pages; a batch of 1: 128 and 256.
"""

import argparse
import contextlib
import functools
import importlib
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.attention_problem import live_cells
from bench.launches import Call, Recorder, interleaved
from bench.show import table
from bench.tables import write
from hstu_compile.ops import append_kv, hstu_attention, kernel_table, paged_hstu_attention
from hstu_compile.ops.paged_validation import PAGE_SIZES

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
SETS, SECONDS, EAGER_CALLS = 2, 0.2, 200
UNPAGED, APPEND = "unpaged, whole sequences", "append_kv"


class Problem(NamedTuple):
    batch: int
    cached: int = 4096
    new: int = 64  # of history
    candidates: int = 192
    num_heads: int = 4
    head_dim: int = 256

    @property
    def length(self) -> int:
        return self.cached + self.new + self.candidates

    def flops(self, whole: bool) -> int:
        """Of the new rows, or of the whole sequences."""
        cells = live_cells(self.length, self.candidates, 0) - (0 if whole else live_cells(self.cached, 0, 0))
        return 4 * self.batch * self.num_heads * self.head_dim * cells


class Inputs(NamedTuple):
    """For the ops by their argument names; `whole` for the unpaged one."""

    paged: dict[str, Any]
    append: dict[str, Any]
    whole: dict[str, Any]


def inputs(problem: Problem, page_size: int) -> Inputs:
    """q, k, v are slices of a packed uvqk buffer; pages are in random order; each history's last page is full."""
    batch, heads, dim = problem.batch, problem.num_heads, problem.head_dim
    new, pages = problem.new + problem.candidates, -(-(problem.cached + problem.new) // page_size)

    def packed(rows: int) -> dict[str, torch.Tensor]:
        uvqk = torch.randn(rows, 4 * heads * dim, device=DEVICE, dtype=torch.float32).to(DTYPE)
        _, v, q, k = (part.unflatten(1, (heads, dim)) for part in uvqk.chunk(4, dim=1))
        return {"q": q, "k": k, "v": v}

    pool = torch.randn(batch * pages, 2, page_size, heads, dim, device=DEVICE, dtype=DTYPE)
    counts = {"num_targets": torch.full((batch,), problem.candidates, device=DEVICE)}
    paging = {
        "pool": pool,
        "page_table": torch.randperm(batch * pages, device=DEVICE, dtype=torch.int32).view(batch, pages),
        "cached_lengths": torch.full((batch,), problem.cached, device=DEVICE, dtype=torch.int32),
        "seq_offsets": torch.arange(batch + 1, device=DEVICE) * new,
        **counts,
    }
    rows = packed(batch * new)
    fixed = {"max_seq_len": problem.length, "alpha": dim**-0.5, "scaling_seq_len": float(problem.length)}
    offsets = {"seq_offsets": torch.arange(batch + 1, device=DEVICE) * problem.length}
    return Inputs(
        {**rows, **paging, **fixed},
        {"k": rows["k"], "v": rows["v"], **paging},
        {**packed(batch * problem.length), **offsets, **counts, **fixed},
    )


def kernels() -> list[str]:
    """Those that run on this machine."""
    if not CUDA:
        return [kernel_table.REFERENCE]
    capability = torch.cuda.get_device_capability()
    modules = (kernel_table.PAGED.get(capability[0]), kernel_table.PAGED_PORTABLE)
    return [name for name in modules if name and _module(name).unsupported(capability, dtype=DTYPE, dim=256) is None]


def _module(name: str) -> Any:
    return importlib.import_module(f"{kernel_table.KERNELS}.{name}")


def calls_of(name: str, sets: Sequence[Inputs]) -> list[Call]:
    if name == UNPAGED:
        return [functools.partial(hstu_attention, **one.whole) for one in sets]
    if name == APPEND:
        return [functools.partial(append_kv, **one.append) for one in sets]
    return [functools.partial(paged_hstu_attention, **one.paged) for one in sets]


def eager_us(calls: Sequence[Call]) -> float:
    """Wall time of a call, of many that are waited for together."""
    repeated = [calls[i % len(calls)] for i in range(EAGER_CALLS if CUDA else 2)]
    for _ in range(2):
        if CUDA:
            torch.cuda.synchronize()
        began = time.perf_counter()
        for call in repeated:
            call()
        if CUDA:
            torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / len(repeated)


def measure(problem: Problem, page_size: int) -> Iterator[dict[str, Any]]:
    sets = [inputs(problem, page_size) for _ in range(SETS)]
    recorder = Recorder(DEVICE)
    launches, eager = {}, {}
    with torch.inference_mode():
        for name in (*kernels(), UNPAGED, APPEND):
            with kernel_table.force(name) if name in kernels() else contextlib.nullcontext():
                launches[name] = recorder.launches(functools.partial(calls_of, name, sets))
                eager[name] = eager_us(calls_of(name, sets))
        times = interleaved(launches, DEVICE, SECONDS)
    for name, (ms, sustained_ms) in times.items():
        row = {"implementation": name, "page_size": page_size, **problem._asdict()}
        row |= {"ms": ms, "sustained_ms": sustained_ms, "eager_us": eager[name]}
        if name != APPEND:
            flops = problem.flops(name == UNPAGED)
            row |= {"tflops": flops / ms / 1e9, "sustained_tflops": flops / sustained_ms / 1e9}
        yield row


def problem_of(batch: int) -> Problem:
    sizes = {"cached": 64, "new": 3, "candidates": 5, "num_heads": 2, "head_dim": 16} if not CUDA else {}
    return Problem(batch, **sizes) if batch > 1 else Problem(batch, **{"new": 128, "candidates": 256, **sizes})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--page-sizes", type=int, nargs="+", default=list(PAGE_SIZES))
    parser.add_argument("--out", type=Path, help="write the results here, as pytest-benchmark does")
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = [
        row
        for batch, page_size in itertools.product(given.batches, given.page_sizes)
        for row in measure(problem_of(batch), page_size)
    ]
    keys = ("batch", "page_size", "implementation")
    figures = {"ms": ".4f", "tflops": ".0f", "sustained_ms": ".4f", "sustained_tflops": ".0f", "eager_us": ".0f"}
    shown = [
        [
            *(str(row[key]) for key in keys),
            *(f"{row[key]:{form}}" if key in row else "-" for key, form in figures.items()),
        ]
        for row in rows
    ]
    print(table((*keys, *figures), shown))
    if given.out:
        gpu = torch.cuda.get_device_name() if CUDA else "cpu"
        versions = {"gpu": gpu, "torch": torch.__version__}
        write(given.out, "bench.paged_attention", [row | versions for row in rows])


if __name__ == "__main__":
    main()
