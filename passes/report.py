"""What the passes decided, region by region, in words a user can act on."""

from dataclasses import dataclass, field

from torch import fx


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

    @property
    def verdict(self) -> str:
        if self.reason is not None:
            return "not fused"
        return "fused" if self.rewritten else "recognised"

    def __str__(self) -> str:
        lines = [f"{self.verdict}  {self.pass_name}: {self.what}", f"    at {self.source}"]
        lines += [f"    because {self.reason}"] if self.reason else []
        lines += [f"    kernel: {self.kernel}"] if self.kernel else []
        return "\n".join(lines)


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

    def __str__(self) -> str:
        return (
            "\n".join(map(str, [*self.regions, *self.recomputed]))
            or "nothing in this graph looked like a part of an HSTU layer"
        )


def source_line(node: fx.Node) -> str:
    """The user's own line behind a node: the innermost frame of its stack trace outside torch."""
    trace = node.meta.get("stack_trace") or ""
    lines = trace.strip().splitlines()
    for i in range(len(lines) - 1, -1, -1):
        line = lines[i].strip()
        if line.startswith('File "'):
            path, number = line.split('"')[1], line.split("line ")[1].split(",")[0]
            if "/torch/" not in path:
                code = lines[i + 1].strip() if i + 1 < len(lines) else ""
                return f"{path}:{number}: {code}"
    return "unknown source"
