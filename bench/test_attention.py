"""pytest-benchmark suite: the attention op, as it runs on this machine and as eager PyTorch; a group per shape.

On a GPU: python -m pytest bench/test_attention.py --benchmark-json=bench/results/<gpu>/attention.json
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import interleaved_milliseconds
from hstu_compile.ops import hstu_attention, kernel_table

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
BATCH, WIDTH = (32, 1024) if CUDA else (2, 64)
SEQ_LENS = (1024, 2048, 4096) if CUDA else (64, 128)
HEAD_DIMS = (64, 128, 256) if CUDA else (32,)
ROUNDS, WARM_UP = (20, 5) if CUDA else (3, 1)


def eager(q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Causal HSTU attention of full-length sequences, [B, N, H, D]."""
    seq_len = q.size(1)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).tril()
    weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) * alpha) / seq_len * causal
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def fused(q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    return hstu_attention(q, k, v, max_seq_len=q.size(1), alpha=alpha, scaling_seq_len=q.size(1))


@pytest.mark.parametrize("implementation", ["eager", "op"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("seq_len", SEQ_LENS)
def test_attention(benchmark, seq_len: int, head_dim: int, direction: str, implementation: str) -> None:
    torch.manual_seed(0)
    num_heads = WIDTH // head_dim
    packed = torch.randn(BATCH, seq_len, 4 * WIDTH, device=DEVICE).to(DTYPE).requires_grad_()
    _, v, q, k = (part.unflatten(-1, (num_heads, head_dim)) for part in packed.chunk(4, dim=-1))
    function = {"eager": eager, "op": fused}[implementation]
    out = function(q, k, v, head_dim**-0.5)
    dout = torch.randn_like(out)

    def forward() -> None:
        with torch.no_grad():
            function(q, k, v, head_dim**-0.5)

    def backward() -> None:
        torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    run = {"forward": forward, "backward": backward}[direction]
    for _ in range(WARM_UP):
        run()

    def run_and_wait() -> None:
        run()
        if CUDA:
            torch.cuda.synchronize()

    kernel = kernel_table.choose_attention(DEVICE, DTYPE, head_dim, head_dim, has_mask=False, has_bias=False).name
    names = {"attention_triton": "portable", "attention_sm90": "sm90", kernel_table.REFERENCE: "reference"}
    flops = 4 * WIDTH * BATCH * seq_len**2 / 2 * (1 if direction == "forward" else 2.5)  # those of live cells
    ms = interleaved_milliseconds({"run": run}, DEVICE, ROUNDS)["run"]
    benchmark.group = f"attention {direction} D={head_dim} N={seq_len}"
    benchmark.extra_info.update(
        implementation="eager" if implementation == "eager" else names[kernel],
        direction=direction,
        dtype=str(DTYPE).removeprefix("torch."),
        head_dim=head_dim,
        seq_len=seq_len,
        batch=BATCH,
        num_heads=num_heads,
        lengths="full",
        mask="causal",
        ms=ms,
        tflops=flops / ms / 1e9,
        torch=torch.__version__,
    )
    benchmark.pedantic(run_and_wait, rounds=ROUNDS)
