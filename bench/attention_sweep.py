"""Attention kernels side by side on the GPU: errors first, then TFLOP/s of forward and backward.

    python -m bench.attention_sweep --out results.json

B = 32, H * D = 1024, bf16, q, k, v slices of one packed [T, 4 * H * D] buffer, all sequences of full length. A time is
the median of single launches replayed from a CUDA graph, the kernels interleaved, without host time. FLOPs are those of
the live cells: 4 * H * D each forward, 2.5 times that backward.
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from hstu_compile.ops.hstu_attention_reference import (
    hstu_attention_backward_reference,
    hstu_attention_reference,
)
from hstu_compile.ops.kernels import attention_sm90, attention_triton

KERNELS: dict[str, ModuleType] = {"sm90": attention_sm90, "portable": attention_triton}
BATCH, WIDTH = 32, 1024
DIMS, LENGTHS = (64, 128, 256), (1024, 2048, 4096, 8192)
TARGETS = 256
REPEATS = 20


def problem(lengths: list[int], heads: int, dim: int, **mask: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v, dout and the arguments of a kernel."""
    T = sum(lengths)
    packed = torch.randn(T, 4 * heads * dim, device="cuda", dtype=torch.bfloat16)
    _, v, q, k = (x.view(T, heads, dim) for x in packed.chunk(4, dim=1))
    dout = torch.randn(T, heads, dim, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda")
    arguments = {
        "seq_offsets": offsets,
        "seq_lengths": None,
        "num_targets": None,
        "num_contextuals": None,
        "attn_mask": None,
        "attn_bias": None,
        "max_seq_len": max(lengths),
        "alpha": dim**-0.5,
        "causal": True,
        "contextual_seq_len": 0,
        "target_group_size": 1,
        "max_attn_len": 0,
        "min_full_attn_seq_len": 0,
        "targets_share_position": False,
    }
    return [q, k, v, dout], {**arguments, **mask}


def check(dim: int) -> dict[str, dict[str, float]]:
    """Relative errors ||kernel - float64|| / ||float64|| of out, dq, dk, dv, the worst over a few masks."""
    lengths = [700, 33, 385, 128, 1]
    targets = torch.tensor([300, 2, 0, 128, 0], device="cuda")
    worst: dict[str, dict[str, float]] = {name: {} for name in KERNELS}
    for mask in ({}, {"num_targets": targets}, {"max_attn_len": 100}, {"contextual_seq_len": 1, "causal": False}):
        (q, k, v, dout), arguments = problem(lengths, 2, dim, **mask)
        exact = [x.double() for x in (q, k, v)]
        plain = {**arguments, "scaling_seq_len": 700.0}
        want = [hstu_attention_reference(*exact, **plain)]
        want += hstu_attention_backward_reference(dout.double(), *exact, **plain, needs_bias_grad=False)[:3]
        for name, module in KERNELS.items():
            got = [module.forward(q, k, v, **arguments, scale=1 / 700)]
            got += module.backward(dout, q, k, v, **arguments, scale=1 / 700, needs_bias_grad=False)[:3]
            for result, ours, reference in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
                error = ((ours.double() - reference).norm() / reference.norm()).item()
                before = worst[name].get(result, 0.0)
                worst[name][result] = error if not error <= before else before  # NaN stays
    return worst


def replayable(call: Callable[[], Any]) -> Callable[[], None]:
    """One call, captured."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_ms(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(REPEATS + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if repeat >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def live_pairs(length: int, targets: int) -> int:
    """Of one full sequence: causal, the targets to history and themselves."""
    history = length - targets
    return history * (history + 1) // 2 + targets * (history + 1)


def measure(dim: int, length: int, targets: int) -> list[dict[str, Any]]:
    heads = WIDTH // dim
    mask = {"num_targets": torch.full((BATCH,), targets, device="cuda")} if targets else {}
    (q, k, v, dout), arguments = problem([length] * BATCH, heads, dim, **mask)
    arguments["scale"] = 1 / length
    results = []
    for direction, factor in (("forward", 4), ("backward", 10)):
        calls = {}
        for name, module in KERNELS.items():
            if direction == "forward":
                call = functools.partial(module.forward, q, k, v, **arguments)
            else:
                call = functools.partial(module.backward, dout, q, k, v, **arguments, needs_bias_grad=False)
            calls[name] = replayable(call)
        flops = factor * BATCH * heads * dim * live_pairs(length, targets)
        for name, ms in median_ms(calls).items():
            results.append(
                {
                    "implementation": name,
                    "direction": direction,
                    "dtype": "bfloat16",
                    "head_dim": dim,
                    "seq_len": length,
                    "batch": BATCH,
                    "num_heads": heads,
                    "mask": "targets" if targets else "causal",
                    "ms": ms,
                    "tflops": flops / ms / 1e9,
                }
            )
    return results


def show(results: list[dict[str, Any]]) -> None:
    cells = {
        (r["direction"], r["mask"], r["head_dim"], r["implementation"], r["seq_len"]): r["tflops"] for r in results
    }
    print(f"{'TFLOP/s':34}" + "".join(f"{length:>8}" for length in LENGTHS))
    for direction, mask, dim, name in itertools.product(("forward", "backward"), ("causal", "targets"), DIMS, KERNELS):
        row = [cells.get((direction, mask, dim, name, length)) for length in LENGTHS]
        if any(row):
            label = f"{direction:9}{mask:8} D={dim:<4} {name}"
            print(f"{label:34}" + "".join(f"{x:8.0f}" if x else f"{'':8}" for x in row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="write the results here as JSON")
    parser.add_argument("--seconds", type=float, default=110.0, help="measure nothing more after this long")
    out, seconds = vars(parser.parse_args()).values()
    began = time.monotonic()
    torch.manual_seed(0)
    errors = {dim: check(dim) for dim in DIMS}
    for dim, worst in errors.items():
        print(f"D={dim}: relative errors", {n: {r: f"{e:.1e}" for r, e in es.items()} for n, es in worst.items()})
    results: list[dict[str, Any]] = []
    for targets, length, dim in itertools.product((0, TARGETS), LENGTHS, DIMS):
        if time.monotonic() - began < seconds:
            results += measure(dim, length, targets)
            torch.cuda.empty_cache()
    show(results)
    print(f"{torch.cuda.get_device_name()}, {time.monotonic() - began:.0f} s")
    if out:
        with open(out, "w") as file:
            json.dump({"gpu": torch.cuda.get_device_name(), "errors": errors, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
