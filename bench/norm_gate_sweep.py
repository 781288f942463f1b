"""norm * gate with dropout on a GPU: ours, eager and Inductor, then variants of our backward. Each under 40 seconds.

python -m bench.norm_gate_sweep [--variants] [--out results.json]

GB/s counts what has to move: 3 tensors of [T, W] forward (a, u, y), 5 more backward (dy, a, u, da, du).
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.clock import Clock
from bench.measure import error_and_budget
from hstu_compile.ops.kernels import norm_gate_dropout as kernels
from hstu_compile.ops.norm_gate_dropout import norm_gate_dropout
from hstu_compile.ops.norm_gate_dropout_reference import norm_gate_dropout_backward_reference

T, W, DTYPE, EPS = 131072, 1024, torch.bfloat16, 1e-6
WARMUP, ITERATIONS, ROTATION = 5, 20, 3
CHECKED_ROWS = 10_000  # some 20 tiles a program, the last ones not full
RATIOS = (0.0, 0.2)
# Elements a thread, tiles on their way, warps a multiprocessor, registers a thread.
VARIANTS = [
    (8, 2, 16, 128),
    (8, 1, 16, 128),
    (8, 3, 16, 128),
    (8, 0, 16, 128),
    (8, 2, 12, 168),
    (8, 2, 20, 96),
    (8, 2, 24, 80),
    (16, 0, 12, 168),
    (16, 2, 8, 255),
]


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
    weight, bias = torch.randn(W, device="cuda", dtype=DTYPE), torch.randn(W, device="cuda", dtype=DTYPE)
    return [t.detach().requires_grad_() for t in (a, u, weight, bias)]


def milliseconds(function: Callable[[int], object]) -> tuple[float, float]:
    """Of function(i), i rotating the inputs past the L2: on the GPU (median), and on the host, which only launches."""
    for i in range(WARMUP):
        function(i % ROTATION)
    times = Clock(torch.device("cuda")).time(*(partial(function, i % ROTATION) for i in range(ITERATIONS)))
    return statistics.median(t.ms for t in times), statistics.mean(t.host_ms for t in times)


def comparison(inputs: list[list[Tensor]], dy: Tensor) -> Iterator[dict]:
    """Forward without gradients, and a training step."""
    for ratio in RATIOS:
        for name, function in (("eager", eager), ("inductor", torch.compile(eager)), ("ours", ours)):

            def forward(i: int, function=function, ratio=ratio) -> None:
                with torch.no_grad():
                    function(*inputs[i], ratio)

            def step(i: int, function=function, ratio=ratio) -> None:
                torch.autograd.grad(function(*inputs[i], ratio), inputs[i], dy)

            for what, timed, tensors in (("forward", forward, 3), ("step", step, 8)):
                yield {"dropout": ratio, "what": what, "by": name, **figures(timed, tensors)}


def variants(inputs: list[list[Tensor]], dy: Tensor) -> Iterator[dict]:
    """The backward alone, with its second reduction. The first variant is what the product launches."""
    inputs = [[t.detach() for t in tensors] for tensors in inputs]
    seed = torch.tensor([2**62 + 1], device=dy.device)
    named = dict(norm_eps=EPS, num_groups=1, rms=False, activation="none", gate_first=False, out_dtype=DTYPE)
    named |= dict(concat_u=False, concat_activated=False, concat_x=False, concat_norm=False)
    for ratio in RATIOS:
        options = dict(named, dropout_ratio=ratio)
        used = seed if ratio else None
        few = [t[:CHECKED_ROWS] for t in (dy, *inputs[0][:2])] + inputs[0][2:]
        exact = norm_gate_dropout_backward_reference(*(t.double() for t in few), used, **options)
        rounded = norm_gate_dropout_backward_reference(*few, used, **options)
        for elements, buffers, warps, registers in VARIANTS:
            constants = dict(BACKWARD_ELEMENTS=elements, MAX_BUFFERS=buffers, MAX_WARPS=warps)

            def backward(i: int, used=used, options=options):
                return kernels.backward(dy, *inputs[i], used, **options)

            with patch.multiple(kernels, **constants, BACKWARD_REGISTERS=registers):
                grads = kernels.backward(*few, used, **options)
                shares = [
                    error / budget
                    for error, budget in (
                        error_and_budget("gradient", *three) for three in zip(grads, rounded, exact, strict=True)
                    )
                ]
                what = f"backward {elements} elements, {buffers} buffers, {warps} warps, {registers} registers"
                yield {"dropout": ratio, "what": what, "by": "ours", **figures(backward, 5), "of budget": max(shares)}


def figures(function: Callable[[int], object], tensors: int) -> dict[str, float]:
    gpu, host = milliseconds(function)
    return {"gpu ms": gpu, "GB/s": tensors * T * W * DTYPE.itemsize / gpu / 1e6, "host ms": host}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", action="store_true", help="of our backward, in place of the comparison")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("norm_gate_sweep: needs a GPU")
    inputs = [operands() for _ in range(ROTATION)]
    dy = torch.randn(T, W, device="cuda", dtype=DTYPE)
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{device}, T={T}, W={W}, {DTYPE}")
    rows = []
    for row in (variants if arguments.variants else comparison)(inputs, dy):
        numbers = "  ".join(f"{name} {row[name]:8.3f}" for name in list(row)[3:])
        print(f"dropout {row['dropout']}  {row['by']:8}  {row['what']:55}  {numbers}", flush=True)
        rows.append(row)
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": device, "T": T, "W": W, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
