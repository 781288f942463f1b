"""pytest-benchmark suite: the first training step of 8 layers in a new process, with empty caches and with full ones.

On a GPU: python -m pytest bench/test_compile_time.py --benchmark-json=bench/results/<gpu>/compile_time.json
"""

import functools

import pytest
import torch

from bench.compile_time import in_new_process

CUDA = torch.cuda.is_available()
NUM_LAYERS = 8 if CUDA else 1
SHAPE = [] if CUDA else ["--seq-len", "64", "--batch", "2", "--dtype", "float32"]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {name: tmp_path_factory.mktemp(name) for name in ("inductor", "hstu")}


@pytest.mark.parametrize("state", ["empty", "full"])
@pytest.mark.parametrize("name", ["inductor", "hstu"])
def test_first_step(benchmark, caches: dict, name: str, state: str) -> None:
    assert any(caches[name].iterdir()) == (state == "full")
    arguments = ["--implementation", name, "--num-layers", str(NUM_LAYERS), *SHAPE]
    seconds = benchmark.pedantic(functools.partial(in_new_process, caches[name], *arguments), rounds=1)
    benchmark.group = f"first step, {state} caches"
    benchmark.extra_info.update(
        implementation=name, num_layers=NUM_LAYERS, caches=state, seconds=seconds, torch=torch.__version__
    )
