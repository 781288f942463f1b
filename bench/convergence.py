"""python -m bench.convergence: does a model learn compiled as it learns eager?

A small ranking model of HSTU layers is trained eagerly in float32, eagerly in bfloat16 with three seeds, and compiled
in bfloat16 with the first of them. Exit status 1: the compiled loss is at some step further from the same seed's eager
loss than the seeds are from one another, or on the mean further from the float32 loss than twice what eager bfloat16 is
(bench/convergence_check.py).
"""

import argparse
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.convergence_check import Comparison, compare, in_eager_errors, smoothed, window
from bench.convergence_problem import Problem, losses
from bench.measure import compiled
from bench.show import progress, table
from bench.tables import ROOT, write
from hstu_compile.verify import FORWARD

PROBLEMS = {  # by device
    "cuda": Problem(seq_len=256, batch=64, num_heads=4, head_dim=64),
    "cpu": Problem(seq_len=32, batch=16, num_heads=2, head_dim=16, learning_rate=3e-3),
}


class Run(NamedTuple):
    implementation: str  # native, hstu
    dtype: torch.dtype
    seed: int

    def __str__(self) -> str:
        how = {"native": "eager", "hstu": "compiled"}[self.implementation]
        return f"{how} {str(self.dtype).removeprefix('torch.')}, seed {self.seed}"


REFERENCE = Run("native", torch.float32, 0)
EAGER = tuple(Run("native", torch.bfloat16, seed) for seed in range(3))
COMPILED = Run("hstu", torch.bfloat16, 0)
RUNS = (REFERENCE, *EAGER, COMPILED)


def curves(rows: Sequence[Any]) -> dict[str, list[float]]:
    """The losses of each run, from what a results file holds."""
    return {row["run"]: row["losses"] for row in rows}


def comparison(found: dict[str, list[float]], run: Run = COMPILED) -> Comparison:
    """Of a run of the first seed."""
    return compare([found[str(eager)] for eager in EAGER], found[str(run)])


def train(problem: Problem, steps: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each run."""
    options = {"strict": True, "expect": problem.num_layers}
    where = {"torch": torch.__version__, "commit": _commit(), "gpu": None}
    if device.type == "cuda":
        where["gpu"] = torch.cuda.get_device_name(device)
    rows = []
    for run in RUNS:
        torch._dynamo.reset()
        with progress(str(run), steps) as advance:
            curve = losses(
                problem,
                steps,
                run.seed,
                run.dtype,
                device,
                lambda model, how=run.implementation: compiled(model, how, options if how == "hstu" else None),
                advance,
            )
        rows.append({**where, **problem._asdict(), "run": str(run), "losses": curve})
    return rows


def _commit() -> str | None:
    """Of the checkout; None outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def show(found: dict[str, list[float]]) -> bool:
    """False: the compiled curve is off."""
    steps = len(found[str(COMPILED)])
    ends = {name: smoothed(curve) for name, curve in found.items()}
    print(table(["run", "loss at first", "in the end"], [[n, f"{c[0]:.4f}", f"{c[-1]:.4f}"] for n, c in ends.items()]))
    result, rounding = comparison(found), comparison(found, REFERENCE)
    error = in_eager_errors(*(found[str(run)] for run in (COMPILED, EAGER[0], REFERENCE)))
    fits = error <= FORWARD  # false for NaN
    print(
        f"Greatest distance from {EAGER[0]}, in units of the seeds' spread, over means of {window(steps)} steps:\n"
        f"  {COMPILED}: {result.relative.max():.3f}, at most 1   {'ok' if result.passes else 'OFF'}\n"
        f"  {REFERENCE}: {rounding.relative.max():.3f}\n"
        f"Mean distance from {REFERENCE}, in units of that of {EAGER[0]}:\n"
        f"  {COMPILED}: {error:.3f}, at most {FORWARD:g}   {'ok' if fits else 'OFF'}"
    )
    return result.passes and fits


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.convergence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", choices=PROBLEMS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the curves there, as JSON")
    args = parser.parse_args(argv)
    rows = train(PROBLEMS[args.device], args.steps, torch.device(args.device))
    if args.out is not None:
        write(args.out, "bench.convergence", rows)
    return 0 if show(curves(rows)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
