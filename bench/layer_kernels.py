"""The kernels of a layer's training step, one by one: where its time goes.

    python -m bench.layer_kernels --json bench/results/<gpu>/layer_kernels.json

Of the benchmark's layer (bench/layer_problem.py) through hstu_compile.backend, without recompute and with both. Each
kernel's time is the median of steps that follow one another on a GPU that has rested, as PyTorch's profiler reports it.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.clock import rest
from bench.layer_problem import SETS, Problem, Variant
from bench.measure import TrainingStep
from bench.show import progress, table
from bench.tables import write

SEQ_LENS = (1024, 4096)
VARIANTS = (Variant("hstu"), Variant("hstu", ("input_layernorm", "input_silu")))
PRODUCTS = ("nvjet", "cutlass", "sm90_xmma", "gemm", "cublas")  # how names of cuBLAS' kernels begin
STEPS, WARM_UP, REST_FOR = 20, 5, 50.0  # ms


def short(name: str) -> str:
    """What a kernel's name says, without what the compiler adds."""
    if name.lower().startswith(PRODUCTS):
        return "product (cuBLAS)"
    name = name.removeprefix("void ").split("<")[0].split("(")[0]
    return name.removeprefix("triton_").rstrip("0123456789").rstrip("_")


def kernels_of(step: TrainingStep, device: torch.device) -> list[tuple[str, float]]:
    """(name, us) of the kernels of a step, in their order."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(STEPS):
            step()
            torch.cuda.synchronize(device)
            rest(REST_FOR, device)
    events = [e for e in recorded.events() if e.device_type == DeviceType.CUDA and not e.name.startswith("Mem")]
    events.sort(key=lambda event: event.time_range.start)
    count, remainder = divmod(len(events), STEPS)
    if remainder or any(events[i].name != events[i % count].name for i in range(len(events))):
        raise RuntimeError(f"{len(events)} kernels in {STEPS} steps, expected the same ones in each")
    times = [[event.time_range.elapsed_us() for event in events[i::count]] for i in range(count)]
    return [(short(events[i].name), statistics.median(times[i])) for i in range(count)]


def measure(device: torch.device) -> list[dict[str, Any]]:
    found = []
    with progress("profile", len(SEQ_LENS) * len(VARIANTS)) as advance:
        for seq_len in SEQ_LENS:
            for variant in VARIANTS:
                torch._dynamo.reset()
                torch.manual_seed(0)
                problem = Problem(seq_len)
                model = problem.model(device)
                sets = [problem.inputs(device) for _ in range(SETS)]
                step = TrainingStep(variant.compiled(model), list(model.parameters()), sets)
                for _ in range(WARM_UP):
                    step()
                common = {"seq_len": seq_len, "recompute": list(variant.recompute), "torch": torch.__version__}
                for place, (name, us) in enumerate(kernels_of(step, device)):
                    found.append({**common, "place": place, "kernel": name, "us": us})
                del model, sets, step
                torch.cuda.empty_cache()
                advance()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU: there are no kernels to profile")
        return 1
    found = measure(torch.device("cuda"))
    for seq_len in SEQ_LENS:
        for variant in VARIANTS:
            rows = [r for r in found if r["seq_len"] == seq_len and r["recompute"] == list(variant.recompute)]
            print(f"N={seq_len}, recomputed: {', '.join(variant.recompute) or 'nothing'}")
            print(table(["kernel", "us"], [[r["kernel"], f"{r['us']:.1f}"] for r in rows]))
            print(f"in all {sum(r['us'] for r in rows):.0f} us")
    if args.json is not None:
        write(args.json, "bench.layer_kernels", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
