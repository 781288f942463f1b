"""A few small launches of every attention kernel, and what NVIDIA's checkers say of them:

python -m bench.sanitize              # the launches alone
python -m bench.sanitize memcheck     # under compute-sanitizer; exit status 1 if it has anything to say
python -m bench.sanitize racecheck    # the same, but for what follows

racecheck takes a wait on an mbarrier to order what the thread that arrived did before, not what the other threads of
its partition did before the barrier that stands in front of the arrival, although that is as well ordered. So it
reports every hand-over of values through shared memory. That it does is shown first, on a kernel of a few lines
(racecheck_control.py): of 32 lanes that store, all are reported but the one that arrives. Reports of the hand-overs
below are counted, not held against the kernels; any other is.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from bench.attention_problem import inputs, kernels, run_once

LENGTHS, TARGETS = [200, 0, 1, 130], [70, 0, 1, 3]
TOOLS = ("memcheck", "racecheck")
DISPATCH = "Triton's dispatch of partitions, whose barriers are all threads'"
HAND_OVERS = {
    frozenset({"hand_over", "take_over"}): "the number of an output tile, from the scheduler to the rest",
    frozenset({"dv_consumer", "dk_consumer"}): "f' at head dim 256, from one consumer to the other",
}
RACE = re.compile(r"Race reported between \w+ access at (.+)\+0x\w+ in (\S+):(\d+)\n.*access at .+ in (\S+):(\d+) ")
STORED = re.compile(r"RAW hazard .*\n=+ +Write Thread \((\d+),")


def main(device: torch.device, head_dims: tuple[int, ...], dtype: torch.dtype) -> None:
    for head_dim in head_dims:
        targets = torch.tensor(TARGETS, device=device)
        given = inputs(LENGTHS, 2, head_dim, device, dtype, num_targets=targets, max_attn_len=60)
        for name, kernel in kernels().items():
            results = run_once(kernel, given)
            finite = all(result.isfinite().all().item() for result in results)
            print(f"D={head_dim} {name}: {'finite' if finite else 'NOT FINITE'}", flush=True)


def checked(*command: str) -> str:
    """What compute-sanitizer prints of a module's run."""
    # Every tensor an allocation, so that what is read beyond it is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tool, *module = command
    options = ["--tool", *tool.split(), sys.executable, "-m", *module]
    done = subprocess.run(["compute-sanitizer", *options], env=environment, capture_output=True, text=True)
    if "SUMMARY" not in done.stdout:
        raise SystemExit(f"compute-sanitizer gave no summary:\n{done.stdout}{done.stderr}")
    return done.stdout


def enclosing(path: str, line: int) -> ast.FunctionDef:
    """The function of a source file that the line is in."""
    functions = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.FunctionDef)]
    return next(f for f in functions if f.decorator_list[0].lineno <= line <= f.end_lineno)


def cause(kernel: str, places: list[tuple[str, int]], root: Path) -> str | None:
    """Which of the known hand-overs a report is of."""
    functions = [enclosing(str(next(root.rglob(Path(path).name))), line) for path, line in places]
    if all(f.name == kernel and line < f.body[0].lineno for f, (_, line) in zip(functions, places, strict=True)):
        return DISPATCH
    return HAND_OVERS.get(frozenset(f.name for f in functions))


def judged(report: str, root: Path) -> tuple[dict[str, int], list[str]]:
    """racecheck's reports: how many there are of each known hand-over, and the others as they are."""
    known: dict[str, int] = {}
    others = []
    for found in RACE.finditer(report):
        kernel, *places = found.groups()
        reason = cause(kernel, [(places[i], int(places[i + 1])) for i in (0, 2)], root)
        if reason is None:
            others.append(found.group())
        else:
            known[reason] = known.get(reason, 0) + 1
    return known, others


def unseen_lanes(report: str) -> set[int]:
    """Lanes of the control's giver that racecheck takes for ordered."""
    return set(range(32)) - {int(thread) % 32 for thread in STORED.findall(report)}


def check(tool: str) -> bool:
    if tool == "memcheck":
        report = checked(tool, "bench.sanitize")
        print(report)
        return "ERROR SUMMARY: 0 errors" in report
    control = unseen_lanes(
        checked("racecheck --racecheck-report hazard --print-limit 100000", "bench.racecheck_control")
    )
    print(f"Control: of 32 lanes that store and one that arrives, not reported: {sorted(control)}")
    known, others = judged(checked(tool, "bench.sanitize"), Path(__file__).resolve().parent.parent)
    for reason, count in known.items():
        print(f"{count:4d} reports of {reason}")
    print(f"{len(others):4d} others", *others, sep="\n")
    return control == {0} and not others


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", nargs="?", choices=TOOLS)
    tool = parser.parse_args().tool
    if tool is None:
        main(torch.device("cuda"), (64, 128, 256), torch.bfloat16)
    elif not check(tool):
        raise SystemExit(1)
