"""Attention kernels side by side on the GPU, while working on them: errors first, then TFLOP/s.

    python -m bench.attention_sweep --dims 64 256 --seq-lens 1024 4096 --masks causal --out results.json

The protocol is that of bench/test_attention.py, which records the results that count.
"""

import argparse
import functools
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from bench.attention_problem import DIRECTIONS, Inputs, Problem, Reference, calls_of, inputs, kernels, run_once
from bench.launches import Recorder, interleaved
from bench.show import table

DEVICE = torch.device("cuda")


def check(dim: int) -> dict[str, dict[str, float]]:
    """Relative errors ||kernel - float64|| / ||float64|| of out, dq, dk, dv, the worst over a few masks."""
    targets = torch.tensor([300, 2, 0, 128, 0], device=DEVICE)
    worst: dict[str, dict[str, float]] = {name: {} for name in kernels()}
    for mask in ({}, {"num_targets": targets}, {"max_attn_len": 100}, {"contextual_seq_len": 1, "causal": False}):
        given = inputs([700, 33, 385, 128, 1], 2, dim, DEVICE, torch.bfloat16, **mask)
        want = run_once(Reference, Inputs(*(x.double() for x in given[:4]), given.call))
        for name, errors in worst.items():
            for result, ours, exact in zip(
                ("out", "dq", "dk", "dv"), run_once(kernels()[name], given), want, strict=True
            ):
                error = ((ours.double() - exact).norm() / exact.norm()).item()
                before = errors.get(result, 0.0)
                errors[result] = error if not error <= before else before  # NaN stays
    return worst


def measure(problem: Problem, seconds: float = 0.2) -> list[dict[str, Any]]:
    sets = [problem.inputs(DEVICE, torch.bfloat16) for _ in range(2)]
    results = []
    for direction in DIRECTIONS:
        recorder = Recorder(DEVICE)
        launches = {
            name: recorder.launches(functools.partial(calls_of, kernel, direction, sets))
            for name, kernel in kernels().items()
        }
        for name, times in interleaved(launches, DEVICE, seconds).items():
            tflops, sustained = (problem.flops(direction) / ms / 1e9 for ms in times)
            what = {"implementation": name, "direction": direction, **problem._asdict()}
            results.append({**what, **times._asdict(), "tflops": tflops, "sustained_tflops": sustained})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seq-lens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--masks", nargs="+", default=["causal", "targets"], help="causal, targets, window")
    parser.add_argument("--lengths", default="full", help="full, zipf, giant, tiny")
    parser.add_argument("--out", help="write the results here as JSON")
    given = parser.parse_args()
    torch.manual_seed(0)
    errors = {dim: check(dim) for dim in given.dims}
    rows = [
        (str(dim), name, *(f"{e:.1e}" for e in found.values()))
        for dim, w in errors.items()
        for name, found in w.items()
    ]
    print(table(("D", "relative errors", "out", "dq", "dk", "dv"), rows))
    results = [
        row
        for mask, seq_len, dim in itertools.product(given.masks, given.seq_lens, given.dims)
        for row in measure(Problem(dim, seq_len, given.lengths, mask))
    ]
    keys = ("mask", "head_dim", "seq_len", "direction", "implementation")
    shown = [
        [*(str(row[key]) for key in keys), *(f"{row[key]:.0f}" for key in ("tflops", "sustained_tflops"))]
        for row in results
    ]
    print(table((*keys, "TFLOP/s", "sustained"), shown))
    print(torch.cuda.get_device_name())
    if given.out:
        Path(given.out).write_text(
            json.dumps({"gpu": torch.cuda.get_device_name(), "errors": errors, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
