"""python -m bench.plots NAME: docs/NAME.png, from bench/results/nvidia-h200/NAME.json (extra: plots)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bench import convergence as runs
from bench import layer_figures
from bench.attention_figures import REFERENCE_LINES
from bench.convergence_check import smoothed, window
from bench.inference_timeline import directed
from bench.tables import ROOT, Row, inference_way, layer_label, layer_steps, results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GPU = "nvidia-h200"  # the one that the reference lines were measured on
COLOURS = {"sm90": "C0", "portable": "C1", "inductor": "C4", "eager": "C7"}
REFERENCE_STYLES = {"target": ("k", "--"), "public CUTLASS": ("C3", ":"), "public Triton": ("C2", ":")}
DIRECTIONS = ("forward", "backward")


def attention(heading: str, rows: list[Row]) -> "Figure":
    """TFLOP/s over N of causal, full-length sequences: a column for each head dim, forward above backward."""
    from matplotlib.figure import Figure

    plain = [row for row in rows if "tflops" in row and (row["lengths"], row["mask"]) == ("full", "causal")]
    head_dims = sorted({row["head_dim"] for row in plain if row["head_dim"] in REFERENCE_LINES["target"]})
    figure = Figure(figsize=(4 * len(head_dims), 7), layout="constrained")
    figure.suptitle(f"HSTU attention, causal, full length, one launch: TFLOP/s\n{heading}", fontsize="medium")
    for column, head_dim in enumerate(head_dims):
        for line, direction in enumerate(DIRECTIONS):
            axes = figure.add_subplot(2, len(head_dims), line * len(head_dims) + column + 1)
            for name, colour in COLOURS.items():
                points = sorted(
                    (row["seq_len"], row["tflops"])
                    for row in plain
                    if (row["head_dim"], row["direction"], row["implementation"]) == (head_dim, direction, name)
                )
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=name)
            for name, figures in REFERENCE_LINES.items():
                if head_dim in figures:
                    colour, style = REFERENCE_STYLES[name]
                    values = [pair[line] for pair in figures[head_dim].values()]
                    axes.plot(list(figures[head_dim]), values, color=colour, linestyle=style, label=name)
            axes.set_title(f"{direction}, D={head_dim}")
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(REFERENCE_LINES["target"][head_dim]), map(str, REFERENCE_LINES["target"][head_dim]))
            axes.set_xlabel("N")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="x-small")
    return figure


def layer(heading: str, rows: list[Row]) -> "Figure":
    """Training step over N: milliseconds of the GPU, and peak memory."""
    from matplotlib.figure import Figure

    steps = [row for row in layer_steps(rows) if layer_figures.SHAPE.items() <= row.items()]
    figure = Figure(figsize=(14, 5), layout="constrained")
    figure.suptitle(f"Training step of an HSTU layer, B=32, H=4, D=256, bfloat16\n{heading}", fontsize="medium")
    quantities = (("ms", "ms of the GPU", layer_figures.STEP_MS), ("peak_mib", "peak MiB", layer_figures.PEAK_MIB))
    columns = figure.subplots(1, 2)
    for axes, (key, title, figures) in zip(columns, quantities, strict=True):
        for i, label in enumerate(dict.fromkeys(map(layer_label, steps))):
            points = sorted((row["seq_len"], row[key]) for row in steps if layer_label(row) == label)
            axes.plot(*zip(*points, strict=True), color=f"C{i}", marker="o", label=label)
        for i, (name, values) in enumerate(figures.items()):
            axes.plot(list(values), list(values.values()), color=f"C{9 - i}", linestyle=":", marker="x", label=name)
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(layer_figures.SEQ_LENS, map(str, layer_figures.SEQ_LENS))
        axes.set_xlabel("N")
        axes.grid(alpha=0.3)
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    return figure


def convergence(heading: str, rows: list[Row]) -> "Figure":
    """Training loss of each run, smoothed; distance from the same seed's eager run, in units of the seeds' spread."""
    from matplotlib.figure import Figure

    found = runs.curves(rows)
    size = window(len(rows[0]["losses"]))
    steps = range(size - 1, len(rows[0]["losses"]))  # the last of each window
    figure = Figure(figsize=(14, 5), layout="constrained")
    figure.suptitle(f"Training a model of {rows[0]['num_layers']} HSTU layers\n{heading}", fontsize="medium")
    losses, distance = figure.subplots(1, 2)
    for i, (name, curve) in enumerate(found.items()):
        losses.plot(steps, smoothed(curve), color=f"C{i}", linestyle="--" if "compiled" in name else "-", label=name)
    losses.set_title(f"loss, mean of {size} steps")
    for run, colour in ((runs.REFERENCE, "C0"), (runs.COMPILED, "C4")):
        distance.plot(steps, runs.comparison(found, run).relative, color=colour, label=str(run))
    distance.axhline(1, color="k", linestyle=":", label="the most that passes")
    distance.set_title(f"distance from {runs.EAGER[0]}, in units of the seeds' spread")
    for axes in (losses, distance):
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def inference(heading: str, rows: list[Row]) -> "Figure":
    """Latency of a whole model's requests over their tokens, by batch; what the GPU does while users are loaded."""
    from matplotlib.figure import Figure

    model, timeline = ([row for row in rows if row["what"] == what] for what in ("model", "timeline"))
    batches = sorted({row["batch"] for row in model})
    figure = Figure(figsize=(5 * len(batches) + 7, 5), layout="constrained")
    figure.suptitle(f"Requests to a model of {model[0]['num_layers']} HSTU layers, p50\n{heading}", fontsize="medium")
    *columns, last = figure.subplots(1, len(batches) + 1, width_ratios=[5] * len(batches) + [7])
    for axes, batch in zip(columns, batches, strict=True):
        for way in dict.fromkeys(map(inference_way, model)):
            points = sorted(
                (r["seq_len"], r["p50_ms"]) for r in model if (inference_way(r), r["batch"]) == (way, batch)
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
        axes.set_title(f"{batch} users, ms")
        axes.set_xlabel("tokens of each")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    lanes = directed((row["lane"], row["intervals"]) for row in timeline)
    for line, (name, intervals) in enumerate(lanes):
        colour = {"onload": "C0", "compute": "C1", "offload": "C2"}[name]
        last.broken_barh([(start, end - start) for start, end in intervals], (line - 0.4, 0.8), color=colour)
    last.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    last.set_title(f"a request of {timeline[0]['batch']} users from the host" if timeline else "no timeline")
    last.set_xlabel("ms")
    return figure


PLOTS = {"attention": attention, "layer": layer, "convergence": convergence, "inference": inference}


def draw(name: str, root: Path = ROOT) -> Path:
    """The picture, in docs."""
    found = [(heading, rows) for heading, rows in results(name, root) if heading.startswith(f"{GPU};")]
    if not found:
        raise SystemExit(f"no bench/results/{GPU}/{name}.json")
    path = root / "docs" / f"{name}.png"
    PLOTS[name](*found[0]).savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PLOTS)
    print(draw(parser.parse_args().name))
