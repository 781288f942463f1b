"""What the passes decided, region by region, in words a user can act on."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import fx

# What is lost where a pass did not fire; the most costly first, in which order misses are reported.
COSTS = {
    "capture": "all of this graph runs as Inductor alone makes it",
    "attention": "the scores, [B, H, N, N], are written and read in memory, forward and backward",
    "table_lookup": "the table's gradient is scattered with atomics",
    "output": "norm, gate and dropout are left to Inductor",
    "candidates": "the last layer's projection, and what follows it, run for all rows, forward and backward",
    "packed_gradient": "the backward joins the gradients of u, v, q, k in a pass of its own",
    "uvqk": "the recompute options leave this layer as it is",
}

UNKNOWN = "unknown source"
MISSED = "hstu_compile_missed"  # in the meta of both products of an attention that is not fused: the line it is at


class Misfit(Exception):
    """The first thing that did not fit, in words, and what would; the call that is in the way, if it may be in that of
    other passes too."""

    def __init__(self, reason: str, change: str | None = None, culprit: fx.Node | None = None):
        super().__init__(reason)
        self.reason, self.change = reason, change
        self.culprit = None if culprit is None else identity(culprit)


@dataclass(frozen=True)
class Region:
    """One place in the model that a recogniser looked at.

    `reason` is None for a recognised region; for a near miss it names the first thing that did not fit.
    """

    pass_name: str
    what: str  # in words: "causal; targets = num_targets; divisor 1024"
    source: str  # "file.py:123: code of that line", the user's own
    reason: str | None = None
    kernel: str | None = None  # which kernel runs, and why not a faster one
    rewritten: bool = True  # False where recognising is all: the graph stays, and Inductor compiles it
    slower: str | None = None  # of a fused region: what keeps it from being as fast as others
    change: str | None = None  # what to write, so that it fits or is faster
    culprit: str | None = None  # the `identity` of the call that is in the way,
    removes_culprit: bool = False  # which the change takes out, for every pass that it is in the way of

    @property
    def verdict(self) -> str:
        if self.reason is not None:
            return "not fused"
        return "fused" if self.rewritten else "recognised"

    @property
    def rank(self) -> tuple[int, int]:
        """Misses come first, then what could be faster, then what is as it should be."""
        kind = 0 if self.reason else 1 if self.slower else 2
        names = list(COSTS)
        return kind, names.index(self.pass_name) if kind == 0 and self.pass_name in names else 0

    def __str__(self) -> str:
        told = {
            "because": self.reason,
            "slower because": self.slower,
            "change:": self.change,
            "cost:": COSTS.get(self.pass_name) if self.reason else None,
            "kernel:": self.kernel,
        }
        lines = [f"{self.verdict}  {self.pass_name}: {self.what}", f"    at {self.source}"]
        return "\n".join([*lines, *(f"    {label} {text}" for label, text in told.items() if text)])


@dataclass(frozen=True)
class Recomputed:
    """What the backward computes again of a layer; of the candidates for that, what it could."""

    role: str  # "input_layernorm", "uvqk_projection" or "input_silu"
    layer: int
    source: str
    frees: int  # bytes that are not held for the backward, at the sizes of this compilation
    cost: float  # its time, as the bytes that the device's memory moves in it

    def __str__(self) -> str:
        what = f"{self.role} of layer {self.layer}: {self.frees:,} bytes less held"
        return f"recomputed in the backward  {what}\n    at {self.source}"


@dataclass
class Report:
    """All decisions for one captured graph."""

    regions: list[Region] = field(default_factory=list)
    recomputed: list[Recomputed] = field(default_factory=list)

    def add(self, region: Region) -> None:
        self.regions.append(region)

    def fused(self, pass_name: str | None = None) -> list[Region]:
        return self._with("fused", pass_name)

    def recognised(self, pass_name: str | None = None) -> list[Region]:
        """Regions that are known and left as they are."""
        return self._with("recognised", pass_name)

    def missed(self, pass_name: str | None = None) -> list[Region]:
        return self._with("not fused", pass_name)

    def _with(self, verdict: str, pass_name: str | None) -> list[Region]:
        return [r for r in self.regions if r.verdict == verdict and pass_name in (None, r.pass_name)]

    def _with_shared_change(self, region: Region) -> Region:
        """Where the change for another pass takes out what is in the way here too, it is named here."""
        for other in self.regions:
            if other.removes_culprit and other.culprit == region.culprit and other.change != region.change:
                shared = f"the change under {other.pass_name}, which cures this too"
                return replace(region, change=f"{region.change}; or {shared}" if region.change else shared)
        return region

    def __str__(self) -> str:
        regions = sorted(map(self._with_shared_change, self.regions), key=lambda region: region.rank)
        return (
            "\n".join([*once_each(map(str, regions)), *map(str, self.recomputed)])
            or "nothing in this graph looked like a part of an HSTU layer"
        )


def once_each(texts: Iterable[str]) -> list[str]:
    """Every text once, in order, its first line saying how often it came: layers are alike."""
    counts = Counter(texts)
    return [text if n == 1 else re.sub("(?m)$", f"  ({n} times)", text, count=1) for text, n in counts.items()]


def source_line(node: fx.Node) -> str:
    """The user's own line behind a node: the innermost frame of its stack trace outside torch; of an input, of the
    first call that reads it."""
    if node.op == "placeholder":
        node = next((user for user in node.users if user.op.startswith("call")), node)
    trace = node.meta.get("stack_trace") or ""
    lines = trace.strip().splitlines()
    for i in range(len(lines) - 1, -1, -1):
        line = lines[i].strip()
        if line.startswith('File "'):
            path, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            if "/torch/" not in path:
                code = lines[i + 1].strip() if i + 1 < len(lines) else ""
                return f"{path}:{number}: {code}"
    return UNKNOWN


def identity(node: fx.Node) -> str:
    """Tells a call from all others of a model, also of its own line."""
    return f"{node.name} at {source_line(node)}"


def spoken(node: fx.Node) -> str:
    """A value as the user would call it: an argument or attribute by its name, a computed one by the call."""
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        path = re.sub(r"\._(?:modules|parameters|buffers)(?=\[)", "", re.sub(r"^L\['(\w+)'\]", r"\1", source.name))
        return re.sub(r"\['(\w+)'\]", r".\1", path)
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.name))
