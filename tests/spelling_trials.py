"""Spelled layers through the passes: what was recognised, and whether the numbers are those that were written.

python -m tests.spelling_trials --count 1000 --seed 0            # the recognition rate, and the misses by choice
python -m tests.spelling_trials --seed 17 --count 1 --show       # one layer: its text and its report
python -m tests.spelling_trials --mutated --count 1000           # layers that mean something else
python -m tests.spelling_trials --through dynamo --count 100     # the whole way, as torch.compile goes it
python -m tests.spelling_trials --batches 1 1 --count 1000       # one sequence, a size that is fixed in the graph
python -m tests.spelling_trials --device cuda --count 100        # larger layers, through the kernels
python -m tests.spelling_trials --device cuda --through inductor # and through Inductor's code
"""

import argparse
import collections
import copy
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import hstu_compile
from hstu_compile import compiler
from hstu_compile.passes import NAMES, apply
from hstu_compile.passes.contents import offer
from hstu_compile.passes.inplace import make_out_of_place
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.spelled import MUTATIONS, Layer, Setting, arguments, build, write
from tests.tracing import traced
from tests.without_codegen import inductor_without_codegen

BATCHES = (3, 5)  # one is captured, the others must run on the same graph
DRAWS = 24  # at most: an error that is bad luck is gone in the maximum over more draws; a wrong number is not
NUDGES = 8  # of the inputs and parameters of each draw
SETTINGS = {"cpu": Setting(), "cuda": Setting(64, 32, 150, ("bfloat16",) * 4 + ("float32",), "cuda")}


@dataclass
class Outcome:
    layer: Layer
    report: Report
    graphs: int = 1  # how many were captured
    wrong: str | None = None  # the first value that is out of budget
    ill_conditioned: str | None = None  # the same, where half a unit in the last place of what is given does as much
    seconds: float = 0.0

    def recognised(self, part: str) -> bool:
        return bool(self.report.fused(part) or self.report.recognised(part))

    @property
    def closed_mask(self) -> bool:
        return not any("mask tensor" in region.what for region in self.report.fused("attention"))

    def reasons(self, part: str) -> list[str]:
        missed = [region.reason or "" for region in self.report.missed(part)]
        return missed or ["nothing that looked like it"]


Call = Callable[..., Tensor]


def through_trace(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Call, Report, list]:
    """Capture and passes without Dynamo and AOTAutograd; the rewritten graph runs eagerly. Quick."""
    names, values = zip(*[*module.named_parameters(), *module.named_buffers()], strict=True)

    def call(*given: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, given, strict=False)), given[len(names) :])

    gm = traced(call, list(args), fixed=list(values))
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), values, strict=False):
        if isinstance(value, nn.Parameter):
            node.meta["example_value"] = value
        else:
            offer(node, value)
    make_out_of_place(gm)
    report = Report()
    apply(gm, report, NAMES)
    return lambda *given: gm(*values, *given), report, [gm]


def through_dynamo(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Call, Report, list]:
    """The backend as torch.compile calls it, down to AOTAutograd, and to Inductor's code where that is not left out."""
    torch._dynamo.reset()
    graphs: list[Any] = []
    report, rewrite = Report(), compiler.rewrite

    def watched(*given: Any) -> Any:
        result = rewrite(*given)
        graphs.append(result.graph)
        report.regions.extend(result.report.regions)
        return result

    compiled = torch.compile(module, backend=hstu_compile.backend)

    def call(*given: Tensor) -> Tensor:
        for tensor in given:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        with mock.patch.object(compiler, "rewrite", watched):
            return compiled(*given)

    call(*args)
    return call, report, graphs


def values_and_gradients(call: Call, leaves: list[Tensor], args: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of x and of the leaves."""
    x, *rest = args
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = call(x, *rest)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    grads = torch.autograd.grad(out, [x, *leaves], upstream, allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip([x, *leaves], grads, strict=True))]


def try_out(layer: Layer, seed: int, through: Callable = through_trace, batches: tuple[int, ...] = BATCHES) -> Outcome:
    """Rewrite the layer and compare it, forward and every gradient, with itself in eager mode and in float64."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    module, double = build(layer), build(layer, double=True)
    double.load_state_dict(module.state_dict())
    first = arguments(layer, batches[0], seed)
    x = first[0].clone().requires_grad_()
    # Entries of that cache cost more than they save where every layer has sizes of its own.
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        call, report, graphs = through(module, (x, *first[1:]))
    outcome = Outcome(layer, report)
    names = ["output", "x", *(name for name, _ in module.named_parameters())]
    triples: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for draw in range(DRAWS):
        args = arguments(layer, batches[draw % len(batches)], seed + draw)
        wide = tuple(t.double() if t.is_floating_point() else t for t in args)
        ours = values_and_gradients(call, list(module.parameters()), args)
        eager = values_and_gradients(module, list(module.parameters()), args)
        with in_plain_pytorch():
            exact = values_and_gradients(double, list(double.parameters()), wide)
        triples.append(list(zip(ours, eager, exact, strict=True)))
        outcome.wrong = _wrong(names, triples)
        if draw + 1 >= len(batches) and outcome.wrong is None:
            break
    if outcome.wrong is not None and _wrong(names, triples + _nudged(layer, double, seed, batches)) is None:
        outcome.wrong, outcome.ill_conditioned = None, outcome.wrong
    outcome.graphs, outcome.seconds = len(graphs), time.perf_counter() - began
    return outcome


def _nudged(
    layer: Layer, double: nn.Module, seed: int, batches: tuple[int, ...]
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """What x and parameters, rounded differently, do to the exact values, as if it were eager's error."""
    dice, half = torch.Generator().manual_seed(seed), torch.finfo(arguments(layer, batches[0], seed)[0].dtype).eps / 2
    nudged_double = copy.deepcopy(double)
    parameters, nudged_parameters = list(double.parameters()), list(nudged_double.parameters())

    def nudge(t: Tensor) -> Tensor:
        return t * (1 + half * (torch.randint(2, t.shape, generator=dice).to(t.device) * 2 - 1))

    found = []
    for draw in range(DRAWS):
        x, *rest = arguments(layer, batches[draw % len(batches)], seed + draw)
        rest = [t.double() if t.is_floating_point() else t for t in rest]
        with in_plain_pytorch():
            exact = values_and_gradients(double, parameters, (x.double(), *rest))
            for _ in range(NUDGES):
                with torch.no_grad():
                    for theirs, parameter in zip(nudged_parameters, parameters, strict=True):
                        theirs.copy_(nudge(parameter))
                nudged = values_and_gradients(nudged_double, nudged_parameters, (nudge(x.double()), *rest))
                found.append(list(zip(exact, nudged, exact, strict=True)))
    return found


def _wrong(names: list[str], draws: list[list[tuple[Tensor, Tensor, Tensor]]]) -> str | None:
    for k, name in enumerate(names):
        ours, eager, exact = (torch.cat([draw[k][which].flatten() for draw in draws]) for which in range(3))
        if eager.isnan().any():
            if not torch.equal(ours.isnan(), eager.isnan()):
                return f"{name}: NaN in other places"
            ours, eager, exact = (t[~eager.isnan()] for t in (ours, eager, exact))
        try:
            assert_within_budget(ours, eager, exact, BACKWARD if k else FORWARD, name)
        except AssertionError as error:
            return str(error)
    return None


def layer_of(seed: int, *, mutated: bool = False, setting: Setting | None = None) -> Layer:
    dice = random.Random(seed)
    return write(dice, dice.choice(MUTATIONS) if mutated else None, setting)


def by_choice(outcomes: list[Outcome], missed: Callable[[Outcome], bool], least: int = 3) -> Iterable[str]:
    """The choices among whose layers the misses are most frequent, beyond what is usual."""
    usual = sum(map(missed, outcomes)) / len(outcomes)
    counts: dict[tuple[str, str], list[int]] = collections.defaultdict(lambda: [0, 0])
    for outcome in outcomes:
        for choice in outcome.layer.choices.items():
            counts[choice][0] += 1
            counts[choice][1] += missed(outcome)
    ranked = sorted(counts.items(), key=lambda item: -(item[1][1] - usual * item[1][0]))
    for (part, way), (total, misses) in ranked[:12]:
        if misses >= least and misses > 1.3 * usual * total:
            yield f"{misses:5} of {total:5}  {part}: {way}"


def summary(outcomes: list[Outcome]) -> str:
    total, lines = len(outcomes), []
    fused = [o for o in outcomes if o.recognised("attention")]
    lines.append(f"{total} layers, {len({o.layer.source for o in outcomes})} distinct; ")
    lines[-1] += f"{sum(o.seconds for o in outcomes) / total:.2f} s each, attention in {len(fused) / total:.1%}"
    parts: list[tuple[str, list[Outcome], Callable[[Outcome], bool]]] = [
        ("attention", outcomes, lambda o: not o.recognised("attention")),
        ("mask in closed form", fused, lambda o: not o.closed_mask),
        ("uvqk", fused, lambda o: not o.recognised("uvqk")),
        ("output", [o for o in fused if o.layer.is_gated], lambda o: not o.recognised("output")),
        ("packed_gradient", fused, lambda o: not o.recognised("packed_gradient")),
    ]
    for part, among, missed in parts:
        misses = [o for o in among if missed(o)]
        lines.append(
            f"\n{part}: {len(among) - len(misses)} of {len(among)} ({1 - len(misses) / max(len(among), 1):.1%})"
        )
        reasons: collections.Counter[str] = collections.Counter()
        for o in misses:
            texts = o.reasons(part) if part in NAMES else [r.slower or "" for r in o.report.fused("attention")]
            reasons.update({re.sub(r"\d+|\[.*?\]|<spelling.*", "#", text)[:110] for text in texts})
        lines += [f"{count:5}  because {reason}" for reason, count in reasons.most_common(12)]
        lines += by_choice(among, missed) if misses else []
    for o in outcomes:
        if o.wrong:
            lines.append(f"WRONG {o.layer.mutation or ''}: {o.wrong}")
        if o.ill_conditioned:
            lines.append(f"ill-conditioned {o.layer.mutation or ''}: {o.ill_conditioned}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--mutated", action="store_true")
    parser.add_argument("--through", choices=["trace", "dynamo", "inductor"], default="trace")
    parser.add_argument("--device", choices=list(SETTINGS), default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="how many sequences, in turn")
    parser.add_argument("--show", action="store_true", help="print each layer's text and report")
    parser.add_argument("--missed", help="print the seeds of layers in which this pass found nothing")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    through = through_trace if chosen.through == "trace" else through_dynamo
    outcomes: list[Outcome] = []
    for _ in [None] if chosen.through == "inductor" else inductor_without_codegen(pytest.MonkeyPatch()):
        for seed in range(chosen.seed, chosen.seed + chosen.count):
            layer = layer_of(seed, mutated=chosen.mutated, setting=SETTINGS[chosen.device])
            try:
                outcomes.append(try_out(layer, seed, through, chosen.batches))
            except Exception as error:
                outcomes.append(Outcome(layer, Report(), wrong=f"seed {seed}: {type(error).__name__}: {error}"))
                continue
            outcome = outcomes[-1]
            for name in ("wrong", "ill_conditioned"):
                if getattr(outcome, name):
                    setattr(outcome, name, f"seed {seed}: {getattr(outcome, name)}")
            if chosen.show:
                print(layer.source, outcome.report, outcome.wrong or "", sep="\n")
            if chosen.missed and not outcome.recognised(chosen.missed):
                print(seed, outcome.reasons(chosen.missed))
    print(summary(outcomes))


if __name__ == "__main__":
    main()
