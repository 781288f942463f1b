"""python -m bench.demo: an unmodified HSTU stack, compiled with hstu_compile.backend and looked at closely.

What was fused and what was not, how far the numbers are from float64, and time and memory beside eager and Inductor.
"""

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import hstu_compile
from bench.measure import IMPLEMENTATIONS, TrainingStep, compiled, error_and_budget, interleaved, memory, results
from bench.native_layer import HSTUStack
from bench.show import progress, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {  # where the flags do not say otherwise
    "cuda": {"dtype": "bfloat16", "batch": 32, "seq_len": [1024, 2048, 4096], "layers": 1, "heads": 4, "dim": 256},
    "cpu": {"dtype": "float32", "batch": 4, "seq_len": [256], "layers": 2, "heads": 2, "dim": 64},
}
ROUNDS = {"cuda": 20, "cpu": 5}
WARM_UP = 3
ERROR_BATCH = 4  # sequences whose float64 result is computed for the error


def inputs(args: argparse.Namespace, batch: int, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and the gradient that comes in from above, both [batch, seq_len, heads * dim], N(0, 1)."""
    shape = (batch, seq_len, args.heads * args.dim)
    x, dout = (torch.randn(shape, device=args.device).to(dtype) for _ in range(2))
    return x.requires_grad_(), dout


def make_model(args: argparse.Namespace, dropout_ratio: float) -> HSTUStack:
    model = HSTUStack(args.layers, args.heads * args.dim, args.heads, args.dim, dropout_ratio)
    return model.to(args.device, DTYPES[args.dtype])


def show_report(args: argparse.Namespace, model: nn.Module) -> None:
    x, _ = inputs(args, args.batch, args.seq_len[0], DTYPES[args.dtype])
    print("What is fused, and what is not\n")
    print(hstu_compile.explain(model, x, full_lengths(args, args.seq_len[0])), end="\n\n")


def full_lengths(args: argparse.Namespace, seq_len: int) -> Tensor:
    return torch.full((args.batch,), seq_len, device=args.device)


def show_errors(args: argparse.Namespace, model: nn.Module) -> bool:
    """Error beside the budget, for the output and every gradient; dropout off, lengths random. False: out of budget."""
    seq_len, batch = args.seq_len[0], min(args.batch, ERROR_BATCH)
    x, dout = inputs(args, batch, seq_len, DTYPES[args.dtype])
    lengths = torch.randint(seq_len // 2, seq_len + 1, (batch,), device=args.device)
    parameters = dict(model.named_parameters())
    eager, ours = (results(compiled(model, name), parameters, x, lengths, dout) for name in ("native", "hstu"))
    exact_model = copy.deepcopy(model).double()
    exact_x = x.detach().double().requires_grad_()
    exact = results(exact_model, dict(exact_model.named_parameters()), exact_x, lengths, dout.double())
    rows, fits = [], True
    for name, reference in exact.items():
        error, budget = error_and_budget(name, ours[name], eager[name], reference)
        fits &= error <= budget
        verdict = "ok" if error <= budget else "OUT OF BUDGET"
        rows.append([name, f"{error:.2e}", f"{budget:.2e}", verdict])
    print(
        f"Error against float64 beside the budget (2x what eager {args.dtype} loses in the output, 5x in a gradient);"
        f"\nbatch {batch}, lengths {seq_len // 2} to {seq_len}, dropout off\n"
    )
    print(table(["value", "max error", "budget", ""], rows), end="\n\n")
    return fits


def show_speed(args: argparse.Namespace, model: nn.Module, device: torch.device) -> None:
    rows = []
    parameters = list(model.parameters())
    for seq_len in args.seq_len:
        torch._dynamo.reset()  # each length is compiled for itself
        x, dout = inputs(args, args.batch, seq_len, DTYPES[args.dtype])
        sets = [(x, full_lengths(args, seq_len), dout)]
        steps = {name: TrainingStep(compiled(model, name), parameters, sets) for name in IMPLEMENTATIONS}
        with progress(f"N={seq_len}", len(steps) * (WARM_UP + ROUNDS[device.type])) as advance:
            for step in steps.values():
                for _ in range(WARM_UP):
                    step()
                    advance()
            times = interleaved(steps, device, ROUNDS[device.type], advance)
        for name, step in steps.items():
            ms, host_ms = times[name].step
            against_native = f"{times['native'].step.ms / ms:.2f}x"
            peak = memory(step, device).peak
            rows.append([str(seq_len), name, f"{ms:.2f}", against_native, f"{host_ms:.2f}", f"{peak:.0f}"])
    print("One training step (forward and backward), full-length sequences, dropout 0.2\n")
    print(table(["N", "implementation", "ms (median)", "against native", "host, ms", "peak MiB"], rows))
    if device.type != "cuda":
        print("\nWithout a GPU the ops run as plain PyTorch; these times say nothing about a GPU.")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--device", choices=list(SIZES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq-len", type=int, nargs="+", metavar="N")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--dim", type=int, help="width of one head; the embedding has heads * dim")
    args = parser.parse_args(argv)
    for name, value in SIZES[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    device = torch.device(args.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"hstu_compile {hstu_compile.__version__}, torch {torch.__version__}, {machine}")
    print(f"{args.layers} layers, batch {args.batch}, {args.heads} heads of {args.dim}, {args.dtype}\n")
    torch.manual_seed(0)
    show_report(args, make_model(args, dropout_ratio=0.2))
    fits = show_errors(args, make_model(args, dropout_ratio=0.0))
    show_speed(args, make_model(args, dropout_ratio=0.2), device)
    return 0 if fits else 1


if __name__ == "__main__":
    raise SystemExit(main())
