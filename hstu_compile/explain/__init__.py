"""hstu_compile.explain: what of a model is fused, what is not and why, without compiling any kernel."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from hstu_compile.capture import end_of
from hstu_compile.compiler import hand_over, rewrite
from hstu_compile.explain import graph_breaks
from hstu_compile.options import split
from hstu_compile.passes.report import Report, once_each


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
        counts = f"fused: {fused}, recognised and left to Inductor: {recognised}, not fused: {missed}"
        lines = [f"{counts}; graphs: {graphs}, graph breaks: {breaks}", *once_each(self.graph_breaks)]
        alike: dict[str, list[int]] = {}
        for i, report in enumerate(self.reports):
            alike.setdefault(str(report), []).append(i)
        for text, numbers in alike.items():
            name = "graph" if len(numbers) == 1 else "graphs"
            lines += [f"{name} {', '.join(map(str, numbers))}:", *("  " + line for line in text.splitlines())]
        return "\n".join(lines)


def explain(model: Callable, *args: Any, **kwargs: Any) -> Explanation:
    """Run the model once, eagerly, through Dynamo and our passes, in its own mode (train or eval, grad or no grad).

    The random state is put back; a buffer that the forward changes is changed. `hstu_compile_options={...}`, if given,
    are the options that `torch.compile` would get.

    Returns:
        An Explanation. Its text begins with what breaks the graph. Then it names, per graph, what was not fused (the
        most costly first): the first thing that did not fit, at which of the model's lines, and what to write instead;
        what was fused and could be faster; what was fused or recognised and left to Inductor, with the kernel that will
        run and why not a faster one; and what the backward computes again.
    """
    options, inductor = split(None, kwargs.pop("hstu_compile_options", {}))
    explanation = Explanation()
    reasons: list[Any] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable:
        captured, _, _, report = rewrite(gm, example_inputs, options)
        explanation.reports.append(report)
        reason = end_of(gm)
        if reason is not None and reason.graph_break:
            reasons.append(reason)
        if captured is None or options.recompute_budget is None:
            return gm.forward
        eager = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        with torch._functorch.config.patch(enable_autograd_cache=False):  # what a budget chooses, the partitioner knows
            hand_over(captured, gm, example_inputs, options, inductor, report, inner_compile=_not_compiled)
        return eager.forward

    function = getattr(model, "_orig_mod", model)  # of a model that is compiled already
    before = graph_breaks.count()
    limits = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}
    with torch._dynamo.config.patch(limits), torch.random.fork_rng(_cuda_devices()):
        torch.compile(function, backend=record)(*args, **kwargs)
    explanation.graph_breaks += map(graph_breaks.describe, reasons)
    explanation.graph_breaks += graph_breaks.describe_unseen(graph_breaks.count() - before, reasons)
    return explanation


def _not_compiled(gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Callable:
    return gm.forward


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
