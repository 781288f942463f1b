"""How long the first training step of a stack of layers takes in a new process: compiling, or loading from the caches.

    python -m bench.compile_time --implementation hstu --num-layers 8

Prints seconds, as JSON. Caches are where TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR say.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.layer_problem import Problem, Variant
from bench.measure import IMPLEMENTATIONS, TrainingStep


def first_step(problem: Problem, implementation: str, device: torch.device) -> float:
    """Seconds from the model to the end of its first forward and backward; imports and the model itself not counted."""
    torch.manual_seed(0)
    model, inputs = problem.model(device), problem.inputs(device)
    (inputs[0] @ inputs[0].mT).sum().item()  # starts the device and its libraries
    began = time.perf_counter()
    TrainingStep(Variant(implementation).compiled(model), list(model.parameters()), [inputs])()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def in_new_process(caches: Path, *arguments: str) -> float:
    """What this module prints, with caches in a folder of their own."""
    folders = {f"{name}_CACHE_DIR": str(caches / name.lower()) for name in ("TORCHINDUCTOR", "TRITON")}
    command = [sys.executable, "-m", "bench.compile_time", *arguments]
    done = subprocess.run(command, env=os.environ | folders, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="hstu")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default=device)
    given = parser.parse_args()
    shape = {"num_layers": given.num_layers, "batch": given.batch, "dtype": getattr(torch, given.dtype)}
    seconds = first_step(Problem(given.seq_len, **shape), given.implementation, torch.device(given.device))
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
