"""Attention with a bias by position and time: without it, as a tensor gathered from the tables, and as two tables.

python -m bench.relative_bias                 # one table for all heads; --per-head: one for each
python -m bench.relative_bias --out FILE      # the figures as JSON too
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.clock import Clock, rest
from hstu_compile.ops import hstu_attention
from hstu_compile.ops.table_lookup import table_lookup

KINDS = ("no bias", "bias tensor", "relative bias")
LAYOUTS = ("jagged", "dense")
BOUNDARIES, BASE = 128, 0.301  # buckets of the logarithm, as models have them
MEAN_GAP = 36_000  # seconds from an event to the next
WARMUP, ROUNDS = 3, 11


class Inputs(NamedTuple):
    qkv: list[Tensor]
    tables: list[Tensor]  # by position [H|1, 2N - 1], by time [H|1, K + 1]
    times: Tensor  # [B, N + 1], of the columns and of what comes after each
    boundaries: Tensor
    dout: Tensor
    call: dict[str, Any]


def inputs(layout: str, batch: int, N: int, heads: int, head_dim: int, table_heads: int, device: str) -> Inputs:
    lead = (batch * N,) if layout == "jagged" else (batch, N)
    dtype = torch.bfloat16
    packed = torch.randn(*lead, 4 * heads * head_dim, device=device).to(dtype)
    _, v, q, k = (part.unflatten(-1, (heads, head_dim)) for part in packed.chunk(4, dim=-1))
    call: dict[str, Any] = {"max_seq_len": N, "alpha": head_dim**-0.5, "scaling_seq_len": N}
    if layout == "jagged":
        call["seq_offsets"] = torch.arange(0, batch * N + 1, N, device=device)
    gaps = torch.empty(batch, N + 1, device=device, dtype=torch.float64).exponential_(1 / MEAN_GAP)
    tables = [torch.randn(table_heads, n, device=device) for n in (2 * N - 1, BOUNDARIES + 1)]
    boundaries = torch.exp(BASE * torch.arange(BOUNDARIES, device=device)).ceil().long()
    dout = torch.randn(*lead, heads, head_dim, device=device).to(dtype)
    return Inputs([q, k, v], tables, gaps.cumsum(1).long(), boundaries, dout, call)


def attention(kind: str, given: Inputs, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
    rows, cols = given.times[:, 1:], given.times[:, :-1]
    if kind == "no bias":
        return hstu_attention(q, k, v, **given.call)
    if kind == "relative bias":
        by_time = {"time_bias": time, "row_times": rows, "col_times": cols, "time_boundaries": given.boundaries}
        return hstu_attention(q, k, v, position_bias=position, **by_time, time_symmetric=True, **given.call)
    place = torch.arange(rows.shape[1], device=q.device)
    apart = place[:, None] - place + rows.shape[1] - 1
    bucket = torch.bucketize((rows[:, :, None] - cols[:, None, :]).abs(), given.boundaries, right=True)
    bias = table_lookup(position.t(), apart) + table_lookup(time.t(), bucket)  # [B, N, N, H|1]
    return hstu_attention(q, k, v, attn_bias=bias.to(q.dtype).permute(0, 3, 1, 2), **given.call)


def measured(kind: str, given: Inputs, device: torch.device) -> dict[str, float]:
    """Milliseconds of the GPU: forward, backward, and backward with the gradients of the tables."""
    torch.compiler.reset()  # one code for all kinds: past Dynamo's limit of recompiles they would run eager
    function: Callable[..., Tensor] = torch.compile(lambda *leaves: attention(kind, given, *leaves))
    found = {}
    for what, with_tables in (("backward", False), ("with tables", kind != "no bias")):
        leaves = [t.detach().requires_grad_() for t in given.qkv]
        tables = [t.detach().requires_grad_(with_tables) for t in given.tables]
        wanted = [*leaves, *tables] if with_tables else leaves
        clock, samples = Clock(device), []
        for i in range(WARMUP + ROUNDS):
            out: list[Tensor] = []
            times = clock.time(
                lambda leaves=leaves, tables=tables, out=out: out.append(function(*leaves, *tables)),
                lambda wanted=wanted, out=out: torch.autograd.grad(out[-1], wanted, given.dout),
            )
            if i >= WARMUP:
                samples.append([time.ms for time in times])
            rest(sum(time.ms for time in times), device)
        found["forward"], found[what] = (statistics.median(column) for column in zip(*samples, strict=True))
    return found


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for layout, kind in itertools.product(LAYOUTS, KINDS):
        torch.manual_seed(0)
        table_heads = arguments.heads if arguments.per_head else 1
        sizes = arguments.batch, arguments.seq_len, arguments.heads, arguments.head_dim, table_heads
        given = inputs(layout, *sizes, arguments.device)
        yield {"layout": layout, "bias": kind, **measured(kind, given, torch.device(arguments.device))}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 32), ("seq-len", 2048), ("heads", 4), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--per-head", action="store_true", help="a table for each head")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="JSON of the figures")
    arguments = parser.parse_args(argv)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    setting = f"{name}, torch {torch.__version__}, B={arguments.batch}, N={arguments.seq_len}, H={arguments.heads}, "
    setting += f"D={arguments.head_dim}, bf16, causal, a table {'each head' if arguments.per_head else 'for all heads'}"
    print(f"{setting}; ms\n\n| layout | bias | forward | backward | backward with tables | all |\n{'| --- ' * 6}|")
    found = []
    for row in rows(arguments):
        found.append(row)
        figures = row["forward"], row["backward"], row["with tables"], row["forward"] + row["with tables"]
        print(f"| {row['layout']} | {row['bias']} | {' | '.join(f'{ms:.3f}' for ms in figures)} |", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"setting": setting, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
