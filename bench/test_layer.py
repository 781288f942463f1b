"""pytest-benchmark suite: one HSTU layer, native, through Inductor and through hstu_compile; a group per N.

On a GPU: python -m pytest bench/test_layer.py --benchmark-json=bench/results/<gpu>/layer.json

`ms`, `host_ms` and the memory are those of bench/layer_problem.py; the stats that pytest-benchmark adds are of a few
runs more, one after the other, host time included. The forward is that of a training step.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from bench.layer_problem import Measured, Problem, Variant, measure, rows

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PROBLEM = Problem(0) if CUDA else Problem(0, batch=2, num_heads=2, head_dim=32, dtype=torch.float32)
SEQ_LENS = (1024, 2048, 4096, 8192) if CUDA else (64, 128)
WARM_UP, ROUNDS = (3, 20) if CUDA else (1, 3)
VARIANTS = {
    "native": Variant("native"),
    "inductor": Variant("inductor"),
    "hstu": Variant("hstu"),
    "hstu-norm-silu": Variant("hstu", ("input_layernorm", "input_silu")),
    "hstu-uvqk": Variant("hstu", ("uvqk",)),
}
CASES = [
    pytest.param(PROBLEM._replace(seq_len=seq_len), direction, name, id=f"{seq_len}-{direction}-{name}")
    for seq_len in SEQ_LENS
    for direction in ("forward", "step")
    for name in VARIANTS
]


@functools.lru_cache(maxsize=1)
def measured(problem: Problem) -> dict[str, Measured | str]:
    """Every implementation: they are interleaved, so the first test of a length measures for all."""
    measured.cache_clear()  # what the last length held
    return measure(problem, VARIANTS, DEVICE, WARM_UP, ROUNDS)


@pytest.mark.parametrize("problem, direction, name", CASES)
def test_layer(benchmark, problem: Problem, direction: str, name: str) -> None:
    found = measured(problem)[name]
    if isinstance(found, str):
        pytest.skip(found)
    forward, step = rows(problem, VARIANTS[name], found)
    benchmark.group = f"layer {direction} N={problem.seq_len}"
    benchmark.extra_info.update(forward if direction == "forward" else step)
    benchmark.pedantic(_and_wait(found, direction), rounds=3)


def _and_wait(found: Measured, direction: str) -> Callable[[], None]:
    def run() -> None:
        found.step.forward()
        if direction == "step":
            found.step.backward()
        if CUDA:
            torch.cuda.synchronize()
        found.step.drop()

    return run
