"""The benchmark of the field: an HSTU layer as it is and fused, its training step's time and memory.

    python -m bench.layer run --layer-type fused --max-seqlen 1024 --full-sequence True --recompute-input-silu
    python -m bench.layer sweep --snapshot snapshots

`native` is the unmodified layer of bench/native_layer.py, eager; `fused` the same module through hstu_compile.backend.
A sweep adds one thing after the other; from `+ attention` on, what is not fused is compiled by Inductor.
Times are medians of one step on a GPU that has rested; the GPU waits until all is enqueued, so that the host's time is
not in its time.
"""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import layer_figures, memory
from bench.layer_problem import Measured, Problem, Variant, measure, rows
from bench.show import progress, table
from bench.tables import write
from hstu_compile.ops import kernel_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS = {
    "triton": kernel_table.PORTABLE,
    "gluon": kernel_table.ATTENTION[9],
    "reference": kernel_table.REFERENCE,
}
RECOMPUTE = ("input_layernorm", "input_silu", "uvqk")
SWEEP = {  # each adds to the one before
    "native": Variant("native"),
    "+ attention": Variant("hstu", passes=("attention",)),
    "+ fusion": Variant("hstu"),
    "+ norm recompute": Variant("hstu", ("input_layernorm",)),
    "+ silu recompute": Variant("hstu", ("input_layernorm", "input_silu")),
}
COLUMNS = {  # of the sweep that the yardsticks stand in
    "public, H200": {
        "native": layer_figures.NATIVE,
        "+ fusion": layer_figures.FUSED,
        "+ silu recompute": f"{layer_figures.FUSED}, {layer_figures.BOTH}",
    },
    "target, H200": {
        "+ fusion": layer_figures.TARGET,
        "+ silu recompute": f"{layer_figures.TARGET}, {layer_figures.BOTH}",
    },
}


def problem_of(args: argparse.Namespace, seq_len: int) -> Problem:
    return Problem(
        seq_len=seq_len,
        batch=args.batchsize,
        num_heads=args.num_heads,
        head_dim=args.dim_per_head,
        num_layers=args.num_layers,
        dtype=DTYPES[args.dtype],
        dropout=args.dropout,
        embedding_dim=args.embedding_dim,
        full=args.full_sequence,
    )


def measured(
    args: argparse.Namespace, problem: Problem, variants: Mapping[str, Variant], snapshots: Mapping[str, Path]
) -> dict[str, Measured | str]:
    """Of each variant, or why it was not; snapshots: where to write that of a variant."""
    forced = kernel_table.force(KERNELS[args.kernel_backend]) if args.kernel_backend else contextlib.nullcontext()
    steps = (args.warmup_iters + args.iters) * len(variants)
    with forced:
        with progress(f"N={problem.seq_len}", steps) as advance:
            found = measure(problem, variants, torch.device(args.device), args.warmup_iters, args.iters, advance)
        for name, one in found.items():
            if isinstance(one, str):
                print(one)
            elif name in snapshots:
                snapshots[name].parent.mkdir(parents=True, exist_ok=True)
                memory.record(one.step, snapshots[name])
    return found


def write_json(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.json is not None:
        write(args.json, "bench.layer", rows)


def run(args: argparse.Namespace) -> int:
    name, native = args.layer_type, args.layer_type == "native"
    recompute = tuple(role for role in RECOMPUTE if getattr(args, f"recompute_{role}"))
    if native and (recompute or args.kernel_backend):
        print("native is the layer as it is: --kernel-backend and --recompute-* are for --layer-type fused")
        args.kernel_backend, recompute = None, ()
    problem, variant = problem_of(args, args.max_seqlen), Variant("native" if native else "hstu", recompute)
    one = measured(args, problem, {name: variant}, {name: args.snapshot} if args.snapshot else {})[name]
    if isinstance(one, str):
        return 1
    times = one.times._asdict().items()
    print(table(["", "ms", "host, ms"], [[name, f"{t.ms:.3f}", f"{t.host_ms:.3f}"] for name, t in times]))
    print(f"held after the forward: {one.held_mib:.1f} MiB, peak of a step: {one.step_peak_mib:.1f} MiB")
    write_json(args, rows(problem, variant, one))
    return 0


def sweep(args: argparse.Namespace) -> int:
    found, recorded = {}, []
    for seq_len in args.max_seqlen:
        problem = problem_of(args, seq_len)
        names = {name: name.removeprefix("+ ").replace(" ", "-") for name in SWEEP}
        folder = args.snapshot
        snapshots = {name: folder / f"{seq_len}-{file}.pickle" for name, file in names.items()} if folder else {}
        found[seq_len] = measured(args, problem, SWEEP, snapshots)
        for name, one in found[seq_len].items():
            recorded += [] if isinstance(one, str) else rows(problem, SWEEP[name], one)
    print("Training step, ms of the GPU")
    print(_beside_figures(found, lambda one: f"{one.times.step.ms:.2f}", layer_figures.STEP_MS))
    print("Memory held after the forward, MiB")
    print(_beside_figures(found, lambda one: f"{one.held_mib:.0f}", layer_figures.HELD_MIB))
    print("Peak memory of the step, MiB")
    print(_beside_figures(found, lambda one: f"{one.step_peak_mib:.0f}", layer_figures.PEAK_MIB))
    print("Public figures and targets: batch 32, 4 heads of 256, bfloat16, dropout 0.2, one layer, full length.")
    write_json(args, recorded)
    return 0


def _beside_figures(
    found: Mapping[int, Mapping[str, Measured | str]], ours: Callable[[Measured], str], figures: layer_figures.Figures
) -> str:
    lines = []
    for seq_len, measurements in found.items():
        cells = ("-" if isinstance(one, str) else ours(one) for one in measurements.values())
        lines.append([str(seq_len), "ours", *cells])
        for who, columns in COLUMNS.items():
            public = [figures.get(columns.get(name, ""), {}).get(seq_len) for name in SWEEP]
            if any(public):
                lines.append(["", who, *("" if value is None else f"{value:g}" for value in public)])
    return table(["N", "", *SWEEP], lines)


def _yes(value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{value!r}, expected True or False")
    return value.lower() == "true"


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    yes = {"type": _yes, "nargs": "?", "const": True, "metavar": "True|False"}
    shared.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    shared.add_argument("--kernel-backend", choices=KERNELS, help="what attention runs on; default: the fastest")
    shared.add_argument("--dim-per-head", type=int, default=256)
    shared.add_argument("--num-heads", type=int, default=4)
    shared.add_argument("--embedding-dim", type=int, help="default: heads times their dim")
    shared.add_argument("--num-layers", type=int, default=1)
    shared.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    shared.add_argument("--dropout", type=float, default=0.2)
    shared.add_argument("--batchsize", type=int, default=32)
    shared.add_argument("--full-sequence", default=True, **yes, help="False: lengths at random")
    shared.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    whole = argparse.ArgumentParser(
        prog="python -m bench.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", parents=[shared], help="one configuration")
    one.set_defaults(function=run)
    one.add_argument("--layer-type", choices=["native", "fused"], default="fused")
    one.add_argument("--max-seqlen", type=int, default=1024)
    for name in RECOMPUTE:
        one.add_argument(f"--recompute-{name.replace('_', '-')}", default=False, **yes)
    one.add_argument("--snapshot", type=Path, metavar="FILE", help="write a memory snapshot of a step there")
    many = commands.add_parser("sweep", parents=[shared], help=f"one after the other: {', '.join(SWEEP)}")
    many.set_defaults(function=sweep)
    many.add_argument("--max-seqlen", type=int, nargs="+", default=list(layer_figures.SEQ_LENS))
    many.add_argument("--snapshot", type=Path, metavar="FOLDER", help="write a memory snapshot of each there")
    for command, iters, warm_up in ((one, 100, 50), (many, 20, 5)):
        command.add_argument("--iters", type=int, default=iters)
        command.add_argument("--warmup-iters", type=int, default=warm_up)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.snapshot and args.device != "cuda":
        print("no memory snapshot: PyTorch keeps a history of allocations on GPUs only")
        args.snapshot = None
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {device}")
    return args.function(args)


if __name__ == "__main__":
    raise SystemExit(main())
