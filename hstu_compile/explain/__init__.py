"""hstu_compile.explain: what of a model is fused, what is not and why, without compiling any kernel."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hstu_compile.compiler import hand_over, rewrite
from hstu_compile.options import split
from hstu_compile.passes.report import Report


@dataclass
class Explanation:
    """One report for each graph that Dynamo made of the model, and where it had to break the graph. `print` it."""

    reports: list[Report] = field(default_factory=list)
    graph_breaks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        fused = sum(len(report.fused()) for report in self.reports)
        recognised = sum(len(report.recognised()) for report in self.reports)
        missed = sum(len(report.missed()) for report in self.reports)
        graphs, breaks = len(self.reports), len(self.graph_breaks)
        counts = f"{fused} regions fused, {recognised} recognised, {missed} not"
        lines = [f"{counts}; {graphs} graphs, {breaks} graph breaks"]
        for i, report in enumerate(self.reports):
            lines += [f"graph {i}:", *("  " + line for line in str(report).splitlines())]
        lines += [f"graph break: {text}" for text in self.graph_breaks]
        return "\n".join(lines)


def explain(model: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Run the model once, eagerly, through Dynamo and our passes, in its own mode (train or eval, grad or no grad).

    The random state is put back; a buffer that the forward changes is changed. `hstu_compile_options={...}`, if given,
    are the options that `torch.compile` would get.

    Returns:
        An Explanation; its text names, per region, what was fused, what was recognised and left to Inductor, or the
        first thing that did not fit, the model's own line, the kernel that will run and why not a faster one, and what
        the backward computes again.
    """
    options, inductor = split(None, kwargs.pop("hstu_compile_options", {}))
    explanation = Explanation()

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        captured, _, _, report = rewrite(gm, example_inputs, options)
        explanation.reports.append(report)
        reason = getattr(gm, "compile_subgraph_reason", None)  # torch 2.11 and 2.13
        if reason is not None and reason.graph_break:
            explanation.graph_breaks.append(_describe(reason))
        if captured is None or options.recompute_budget is None:
            return gm.forward
        eager = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        with torch._functorch.config.patch(enable_autograd_cache=False):  # what a budget chooses, the partitioner knows
            hand_over(captured, gm, example_inputs, options, inductor, report, inner_compile=_not_compiled)
        return eager.forward

    function = getattr(model, "_orig_mod", model)  # of a model that is compiled already
    limits = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}
    with torch._dynamo.config.patch(limits), torch.random.fork_rng(_cuda_devices()):
        torch.compile(function, backend=record)(*args, **kwargs)
    return explanation


def _not_compiled(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Callable:
    return gm.forward


def _describe(reason: Any) -> str:
    """The reason and Dynamo's first hint what to do about it, and the user's line."""
    first, *more = (line.strip() for line in reason.reason.strip().splitlines())
    hints = [line for line in more if line.startswith("Hint: ")]
    text = ". ".join([first, *hints[:1]])
    frames = [frame for frame in reason.user_stack or [] if "/torch/" not in frame.filename]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line} ({text})" if frames else text


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
