"""python -m bench.tables: the tables in the documents, written anew from bench/results/<gpu>/*.json.

A table stands between `<!-- bench.tables: NAME -->` and `<!-- end -->`; what is between the two is never typed.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import layer_figures
from bench.attention_figures import REFERENCE_LINES

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "docs/kernels.md", "docs/compatibility.md", "docs/inference.md")
BLOCK = re.compile(r"(<!-- bench\.tables: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]  # the extra_info of one benchmark


def results(suite: str, root: Path = ROOT) -> Iterator[tuple[str, list[Row]]]:
    """(heading, rows) of each GPU that has a results file of this suite."""
    for path in sorted((root / "bench/results").glob(f"*/{suite}.json")):
        run = json.loads(path.read_text())
        rows = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
        versions = ", ".join(sorted({f"torch {row['torch']}" for row in rows if "torch" in row}))
        yield f"{path.parent.name}; {versions or 'versions unknown'}; {run['datetime'][:10]}", rows


def write(path: Path, name: str, rows: Sequence[Row]) -> None:
    """A results file as pytest-benchmark writes them."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat()
    benchmarks = [{"name": name, "extra_info": row} for row in rows]
    path.write_text(json.dumps({"datetime": now, "benchmarks": benchmarks}, indent=1) + "\n")


def layer(rows: list[Row]) -> str:
    """Training step of a layer, at every length: milliseconds and memory, beside figures; the host's time."""
    by_shape: dict[tuple, list[Row]] = {}
    for row in layer_steps(rows):
        by_shape.setdefault(tuple(row[key] for key in layer_figures.SHAPE), []).append(row)
    parts = []
    for shape, steps in sorted(by_shape.items()):
        num_layers, batch, num_heads, head_dim, dtype, dropout = shape
        layers = "one layer" if num_layers == 1 else f"{num_layers} layers"
        what = f"{layers}, B={batch}, H={num_heads}, D={head_dim}, {dtype}, dropout {dropout:g}, full length"
        times, sizes, italics = [], [], ""
        if shape == tuple(layer_figures.SHAPE.values()):
            times, sizes = [layer_figures.STEP_MS], [layer_figures.HELD_MIB, layer_figures.PEAK_MIB]
            italics = " (in italics: an H200's yardsticks)"
        parts.append(f"Training step of {what}, ms of the GPU{italics}:")
        parts.append(_layer_lines(steps, lambda row: f"{row['ms']:.2f}", times))
        parts.append("Memory, MiB: held after the forward / peak of the step over its inputs:")
        parts.append(_layer_lines(steps, lambda row: f"{row['held_mib']:.0f} / {row['peak_mib']:.0f}", sizes))
        shortest = min(row["seq_len"] for row in steps)
        hosts = [f"{row['host_ms']:.2f} ms ({layer_label(row)})" for row in steps if row["seq_len"] == shortest]
        parts.append(f"The host's time for a step at N={shortest}: {', '.join(hosts)}.")
    return "\n\n".join(parts)


def layer_steps(rows: list[Row]) -> list[Row]:
    """Of full-length sequences, with every pass."""
    return [row for row in rows if row["direction"] == "step" and row["full_sequence"] and "passes" not in row]


def layer_label(row: Row) -> str:
    recomputed = f", {' and '.join(row['recompute'])} recomputed" if row["recompute"] else ""
    return row["implementation"] + recomputed


def _layer_lines(steps: list[Row], cell: Callable[[Row], str], figures: Sequence[layer_figures.Figures]) -> str:
    """A line for each way to run the layer, and for each name in the figures, whose values stand in one cell."""
    seq_lens = sorted({row["seq_len"] for row in steps})
    lines: dict[str, dict[int, str]] = {}
    for row in steps:
        lines.setdefault(layer_label(row), {})[row["seq_len"]] = cell(row)
    for name in dict.fromkeys(name for one in figures for name in one):
        values = {n: [one.get(name, {}).get(n) for one in figures] for n in seq_lens}
        cells = {n: " / ".join("-" if v is None else f"{v:g}" for v in vs) for n, vs in values.items() if any(vs)}
        if cells:
            lines[f"*{name}*"] = cells
    body = [[label, *(cells.get(n, "-") for n in seq_lens)] for label, cells in lines.items()]
    return _markdown(["", *(f"N={n}" for n in seq_lens)], body)


def attention(rows: list[Row]) -> str:
    """TFLOP/s (of live cells), forward / backward: against targets and public kernels; other masks; the host's time."""
    timed = [{"sustained_tflops": None, **row} for row in rows if "tflops" in row]
    by_variant: dict[tuple[str, str], list[Row]] = {}
    for row in timed:
        by_variant.setdefault((row["lengths"], row["mask"]), []).append(row)
    plain = by_variant.pop(("full", "causal"), [])
    seq_lens = sorted({row["seq_len"] for row in plain})
    header = ["", *(f"N={seq_len}" for seq_len in seq_lens)]
    parts = [
        "Attention, TFLOP/s forward / backward, causal, full length, one launch (in italics: an H200's yardsticks):"
    ]
    parts.append(_markdown(header, _against_figures(plain, seq_lens)))
    if any(row["sustained_tflops"] for row in plain):
        parts.append("The same, sustained over ten launches back to back:")
        parts.append(
            _markdown(header, list(_by_length(plain, "sustained_tflops", "D={head_dim} {implementation}", seq_lens)))
        )
    if by_variant:
        parts.append("Other lengths and masks, one launch, FLOPs of live cells:")
        seq_lens = sorted({row["seq_len"] for rows in by_variant.values() for row in rows})
        body = [
            line
            for found in by_variant.values()
            for line in _by_length(found, "tflops", "{lengths}, {mask}, D={head_dim} {implementation}", seq_lens)
        ]
        parts.append(_markdown(["", *(f"N={seq_len}" for seq_len in seq_lens)], body))
    hosted = [f"{row['host_us']:.0f} µs ({row['implementation']}, {row['caller']})" for row in rows if "host_us" in row]
    if hosted:
        parts.append(f"The host's time for one forward call: {', '.join(hosted)}.")
    return "\n\n".join(parts)


def _by_length(rows: list[Row], key: str, label: str, seq_lens: list[int]) -> Iterator[list[str]]:
    """A line for each head dim and implementation: forward / backward at every length."""
    found = {(r["head_dim"], r["implementation"], r["seq_len"], r["direction"]): r for r in rows}
    for head_dim, implementation in sorted({line[:2] for line in found}):
        cells = (
            [found.get((head_dim, implementation, seq_len, direction)) for direction in ("forward", "backward")]
            for seq_len in seq_lens
        )
        first = next(r for r in rows if (r["head_dim"], r["implementation"]) == (head_dim, implementation))
        yield [label.format(**first), *(_pair(*(row and row[key] for row in pair)) for pair in cells)]


def _against_figures(plain: list[Row], seq_lens: list[int]) -> list[list[str]]:
    body = []
    for head_dim in sorted({row["head_dim"] for row in plain}):
        rows = [row for row in plain if row["head_dim"] == head_dim]
        body.extend(_by_length(rows, "tflops", "D={head_dim} {implementation}", seq_lens))
        for name, figures in REFERENCE_LINES.items():
            if head_dim in figures:
                line = (figures[head_dim].get(seq_len, (None, None)) for seq_len in seq_lens)
                body.append([f"*D={head_dim} {name}*", *(_pair(*pair) for pair in line)])
    return body


def _pair(*values: float | None) -> str:
    return " / ".join("-" if value is None else format(value, ".0f") for value in values)


def compile_time(rows: list[Row]) -> str:
    """The first training step in a new process."""
    found = {(row["implementation"], row["caches"]): row for row in rows}
    states = ("empty", "full")
    body = [
        [name, *(_cell(found.get((name, state)), "seconds", ".1f") for state in states)]
        for name in dict.fromkeys(row["implementation"] for row in rows)
    ]
    return (
        f"First training step of {rows[0]['num_layers']} layers in a new process, seconds, by the state of the compile "
        "caches:\n\n" + _markdown(["", *states], body)
    )


def compatibility(rows: list[Row]) -> str:
    """Public implementations: time and memory of a training step."""
    steps = [
        [r["model"], r["shape"], r["implementation"]]
        + [_cell(r, key, ".1f") for key in ("ms", "backtoback_ms", "host_ms")]
        + [str(r["peak_mib"]), str(r["compile_s"])]
        for r in rows
    ]
    header = ["model", "shape", "implementation", "step, ms", "back to back, ms", "host, ms"]
    return _markdown([*header, "peak MiB", "first step, s"], steps)


def compatibility_errors(rows: list[Row]) -> str:
    """Public implementations: errors in bfloat16 against float32, divided by eager's own."""
    errors = [
        [
            r["model"],
            r["variant"],
            ", ".join(r["regions"]),
            format(r["output_in_eager_errors"], ".2f"),
            format(r["worst_gradient_in_eager_errors"], ".2f"),
        ]
        for r in rows
    ]
    return _markdown(["model", "variant", "fused", "output", "worst gradient"], errors)


def layer_kernels(rows: list[Row]) -> str:
    """The kernels of a layer's step in their order, a table for each choice of what is recomputed."""
    parts = []
    for recompute in dict.fromkeys(tuple(row["recompute"]) for row in rows):
        steps: dict[int, list[Row]] = {}
        for row in rows:
            if tuple(row["recompute"]) == recompute:
                steps.setdefault(row["seq_len"], []).append(row)
        names = [row["kernel"] for row in next(iter(steps.values()))]
        if any([row["kernel"] for row in step] != names for step in steps.values()):
            raise ValueError(f"layer_kernels: other kernels at another length, recomputed: {recompute}")
        body = [[names[i], *(f"{step[i]['us']:.1f}" for step in steps.values())] for i in range(len(names))]
        body.append(["in all", *(f"{sum(row['us'] for row in step):.0f}" for step in steps.values())])
        what = " and ".join(recompute) or "nothing"
        parts += [f"Recomputed: {what}; us a step:", _markdown(["kernel", *(f"N={n}" for n in steps)], body)]
    return "\n\n".join(parts)


def paged_attention(rows: list[Row]) -> str:
    """Attention over pages beside the unpaged op on the same sequences: one launch, by size of a page."""
    kernels = list(dict.fromkeys(row["implementation"] for row in rows))
    requests: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        request = tuple(row[name] for name in ("batch", "cached", "new", "candidates", "page_size"))
        requests.setdefault(request, {})[row["implementation"]] = row
    body = [[*map(str, request), *(_rate(found.get(name)) for name in kernels)] for request, found in requests.items()]
    return "us of one launch (TFLOP/s of live cells):\n\n" + _markdown(
        ["batch", "cached", "new", "candidates", "page", *kernels], body
    )


def _rate(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{1e3 * row['ms']:.1f}" + (f" ({row['tflops']:.0f})" if row.get("tflops") else "")


def inference(rows: list[Row]) -> str:
    """Requests to a block of layers and to a whole model: latency, by where the cache has their users."""
    parts = []
    for what in dict.fromkeys(row["what"] for row in rows if row["what"] != "timeline"):
        found = [row for row in rows if row["what"] == what]
        ways = list(dict.fromkeys(map(inference_way, found)))
        requests: dict[tuple, dict[str, Row]] = {}
        for row in found:
            request = tuple(row[name] for name in ("batch", "seq_len", "new", "candidates"))
            requests.setdefault(request, {})[inference_way(row)] = row
        body = [[*map(str, request), *(_latency(by_way, way) for way in ways)] for request, by_way in requests.items()]
        layers, heads, dim = (found[0][name] for name in ("num_layers", "num_heads", "head_dim"))
        parts.append(
            f"A {what} of {layers} layers, H={heads}, D={dim}, {found[0]['dtype']}: ms from a request to its answer, "
            "p50 / p99 (native's p50 over it):"
        )
        parts.append(_markdown(["batch", "tokens", "new", "candidates", *ways], body))
    return "\n\n".join(parts)


def inference_way(row: Row) -> str:
    tier = {None: "", "gpu": ", on the GPU", "host": ", in host memory", "miss": ", not yet"}[row["tier"]]
    return f"{row['implementation']}{tier}{', graph' if row['cuda_graph'] else ''}"


def _latency(by_way: Mapping[str, Row], way: str) -> str:
    if way not in by_way:
        return "-"
    over = ""
    if way != "native" and "native" in by_way:
        over = f" ({by_way['native']['p50_ms'] / by_way[way]['p50_ms']:.1f}x)"
    times = " / ".join(f"{by_way[way][key]:.2f}" for key in ("p50_ms", "p99_ms"))
    return times + over


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "layer": layer,
    "layer_kernels": layer_kernels,
    "attention": attention,
    "compatibility": compatibility,
    "compatibility_errors": compatibility_errors,
    "compile_time": compile_time,
    "inference": inference,
    "paged_attention": paged_attention,
}


def _cell(row: Row | None, key: str, form: str) -> str:
    return format(row[key], form) if row is not None else "-"


def _markdown(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(name: str, root: Path = ROOT) -> str:
    parts = [f"{heading}\n\n{TABLES[name](rows)}" for heading, rows in results(name, root)]
    return "\n\n".join(parts) or "No results have been recorded yet."


def rewritten(text: str, root: Path = ROOT) -> str:
    """The document with every table made anew."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{render(match[2], root)}\n\n{match[3]}", text)


def main() -> None:
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
