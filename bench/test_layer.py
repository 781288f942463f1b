"""pytest-benchmark suite: one HSTU layer, native, through Inductor and through hstu_compile; a group per N.

On a GPU: python -m pytest bench/test_layer.py --benchmark-json=bench/results/<gpu>/layer.json
"""

from collections.abc import Callable

import pytest
import torch

from bench.measure import compiled, interleaved_milliseconds, peak_mib, training_step
from bench.native_layer import HSTUStack

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH, HEADS, HEAD_DIM = (32, 4, 256) if CUDA else (2, 2, 32)
SEQ_LENS = (1024, 2048, 4096) if CUDA else (64, 128)
DROPOUT = 0.2
ROUNDS, WARM_UP = (20, 5) if CUDA else (3, 1)


@pytest.mark.parametrize("implementation", ["native", "inductor", "hstu"])
@pytest.mark.parametrize("direction", ["forward", "step"])
@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_layer(benchmark, seq_len: int, direction: str, implementation: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    embedding_dim = HEADS * HEAD_DIM
    model = HSTUStack(1, embedding_dim, HEADS, HEAD_DIM, DROPOUT).to(DEVICE, DTYPE)
    function = compiled(model)[implementation]
    x = torch.randn(BATCH, seq_len, embedding_dim, device=DEVICE).to(DTYPE).requires_grad_()
    dout = torch.randn_like(x)
    lengths = torch.full((BATCH,), seq_len, device=DEVICE)
    parameters = list(model.parameters())

    def forward() -> None:
        with torch.no_grad():
            function(x, lengths)

    def step() -> None:
        training_step(function, parameters, x, lengths, dout)

    run: Callable[[], None] = forward if direction == "forward" else step
    for _ in range(WARM_UP):
        run()

    def run_and_wait() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"layer {direction} N={seq_len}"
    benchmark.extra_info.update(
        implementation=implementation,
        direction=direction,
        dtype=str(DTYPE).removeprefix("torch."),
        seq_len=seq_len,
        batch=BATCH,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_layers=1,
        recompute=[],
        dropout=DROPOUT,
        ms=interleaved_milliseconds({"run": run}, DEVICE, ROUNDS)["run"],
        peak_mib=peak_mib(run, DEVICE),
        torch=torch.__version__,
    )
    benchmark.pedantic(run_and_wait, rounds=ROUNDS)
