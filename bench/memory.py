"""python -m bench.memory FILE... [--out memory.png]: what steps hold over time, snapshots drawn side by side.

The files are PyTorch memory snapshots of one training step, as `python -m bench.layer run --snapshot FILE` writes them;
https://pytorch.org/memory_viz shows them too, with the code that allocates. Needs matplotlib (extra: plots).
"""

import argparse
import itertools
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from bench.measure import TrainingStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20


def record(step: TrainingStep, path: Path) -> None:
    """Write a snapshot of one step, on the current GPU; warm up before.

    The functions are private: read in torch 2.11 and 2.13. Whoever takes a snapshot leaves a mark in the history, which
    here stands between forward and backward.
    """
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        step.forward()
        torch.cuda.memory._snapshot()
        step.backward()
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


class Block(NamedTuple):
    size: int  # bytes
    begin: int  # the number of the event from which on it is held
    end: int  # and the first from which on it is not


class Timeline(NamedTuple):
    """What a step allocates; an event is an allocation or the release of one."""

    blocks: list[Block]
    events: int
    backward: int  # its first event

    def held(self) -> list[int]:
        """Bytes after each event."""
        changes = [0] * (self.events + 1)
        for block in self.blocks:
            changes[block.begin] += block.size
            changes[block.end] -= block.size
        return list(itertools.accumulate(changes))[: self.events]


def timeline(snapshot: Mapping[str, Any]) -> Timeline:
    """Of the GPU with the longest history.

    Raises:
        ValueError: there is no history, or no mark between forward and backward.
    """
    history = max(snapshot.get("device_traces", ()), key=len, default=())
    live: dict[int, tuple[int, int]] = {}  # address -> size, begin
    blocks, marks, event = [], [], 0
    for entry in history:
        action, address = entry["action"], entry.get("addr")
        if action == "alloc":
            live[address] = entry["size"], event
        elif action == "free_requested":
            if address not in live:  # held before the step
                continue
            blocks.append(Block(*live.pop(address), event))
        else:
            marks += [event] if action == "snapshot" else []
            continue
        event += 1
    if not event or not marks:
        what = "mark between forward and backward" if event else "history of allocations"
        raise ValueError(f"the snapshot has no {what}: record it with `python -m bench.layer run --snapshot FILE`")
    blocks += [Block(size, begin, event) for size, begin in live.values()]
    return Timeline(sorted(blocks, key=lambda block: block.begin), event, marks[0])


def draw(timelines: Mapping[str, Timeline]) -> "Figure":
    """A column for each: blocks stacked in the order in which they are allocated, held from left to right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(timelines), 5), layout="constrained")
    axes = figure.subplots(1, len(timelines), sharey=True, squeeze=False)[0]
    for ax, (name, found) in zip(axes, timelines.items(), strict=True):
        held = [size / MIB for size in found.held()]
        stacked = [
            [block.size / MIB if block.begin <= event < block.end else 0.0 for event in range(found.events)]
            for block in found.blocks
        ]
        ax.stackplot(range(found.events), stacked, step="post")
        ax.step(range(found.events), held, where="post", color="k", linewidth=0.8)
        ax.axvline(found.backward, color="k", linestyle="--")
        after_forward = held[found.backward - 1] if found.backward else 0.0
        ax.set_title(f"{name}\nheld after the forward {after_forward:.0f} MiB, peak {max(held):.0f} MiB")
        ax.set_xlabel("allocations and releases; dashed: forward | backward")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("MiB")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--out", type=Path, default=Path("memory.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    timelines = {}
    for path in args.files:
        try:
            timelines[path.stem] = timeline(pickle.loads(path.read_bytes()))
        except (ValueError, pickle.UnpicklingError) as error:
            parser.error(f"{path}: {error}")
    draw(timelines).savefig(args.out, dpi=110)
    print(args.out)


if __name__ == "__main__":
    main()
