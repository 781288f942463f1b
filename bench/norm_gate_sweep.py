"""norm * gate with dropout: ours, eager and Inductor. `python -m bench.norm_gate_sweep`, on a GPU, under a minute.

GB/s counts what has to move: 3 tensors of [T, W] forward (a, u, y), 5 more backward (dy, a, u, da, du).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops.norm_gate_dropout import norm_gate_dropout

T, W, DTYPE, EPS = 131072, 1024, torch.bfloat16, 1e-6
WARMUP, ITERATIONS, ROTATION = 5, 20, 3


def eager(a: Tensor, u: Tensor, weight: Tensor, bias: Tensor, ratio: float) -> Tensor:
    """As the field writes it: in fp32, rounded at the end."""
    norm = F.layer_norm(a.float(), (W,), weight.float(), bias.float(), EPS)
    return F.dropout(u.float() * norm, ratio).to(a.dtype)


def ours(a: Tensor, u: Tensor, weight: Tensor, bias: Tensor, ratio: float) -> Tensor:
    seed = torch.randint(0, 2**63 - 1, (1,), device=a.device) if ratio else None
    return norm_gate_dropout(a, u, weight, bias, seed=seed, norm_eps=EPS, dropout_ratio=ratio)


def operands() -> list[Tensor]:
    """u is a slice of the packed uvqk buffer."""
    packed = torch.randn(T, 4 * W, device="cuda", dtype=DTYPE)
    a, u = torch.randn(T, W, device="cuda", dtype=DTYPE), packed[:, :W]
    weight, bias = torch.ones(W, device="cuda", dtype=DTYPE), torch.zeros(W, device="cuda", dtype=DTYPE)
    return [t.detach().requires_grad_() for t in (a, u, weight, bias)]


def milliseconds(function) -> float:
    """Median over launches of function(i), i rotating the inputs past the L2."""
    for i in range(WARMUP):
        function(i % ROTATION)
    times = []
    for i in range(ITERATIONS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function(i % ROTATION)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in times)[ITERATIONS // 2]


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("norm_gate_sweep: needs a GPU")
    inputs = [operands() for _ in range(ROTATION)]
    dy = torch.randn(T, W, device="cuda", dtype=DTYPE)
    tensor_gb = T * W * DTYPE.itemsize / 1e9
    print(f"{torch.cuda.get_device_name()}, T={T}, W={W}, {DTYPE}")
    print(f"{'dropout':>8} {'':10} {'forward ms':>11} {'GB/s':>6} {'step ms':>9} {'GB/s':>6}")
    for ratio in (0.0, 0.2):
        for name, function in (("eager", eager), ("inductor", torch.compile(eager)), ("ours", ours)):

            def forward(i: int, function=function, ratio=ratio) -> None:
                with torch.no_grad():
                    function(*inputs[i], ratio)

            def step(i: int, function=function, ratio=ratio) -> None:
                torch.autograd.grad(function(*inputs[i], ratio), inputs[i], dy)

            f, s = milliseconds(forward), milliseconds(step)
            rates = 3 * tensor_gb / f * 1e3, 8 * tensor_gb / s * 1e3
            print(f"{ratio:8.1f} {name:10} {f:11.3f} {rates[0]:6.0f} {s:9.3f} {rates[1]:6.0f}")


if __name__ == "__main__":
    main()
