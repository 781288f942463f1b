"""The backend: capture, passes, graft, and on to Inductor. What cannot be rewritten is compiled as Inductor would."""

import copy
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from hstu_compile.assumptions import offer_contents, while_they_hold
from hstu_compile.capture import NotCaptured, capture, end_of, graft, placeholders
from hstu_compile.ops import validation
from hstu_compile.options import KNOWN, Options, split
from hstu_compile.passes import apply, parts
from hstu_compile.passes.contents import Content, withdraw
from hstu_compile.passes.recompute import ROLES, SaveResults, cached_apart, recompute
from hstu_compile.passes.recompute_budget import WithinBudget
from hstu_compile.passes.report import UNKNOWN, Region, Report, source_line
from hstu_compile.verify import verified_once

log = logging.getLogger("hstu_compile")  # TORCH_LOGS="hstu_compile" and "+hstu_compile" turn it on


def backend(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Callable[..., Any]:
    """The compiler behind `torch.compile(model, backend=hstu_compile.backend)`, also known as `backend="hstu"`.

    Args:
        mode: as in torch.compile: "default", "reduce-overhead", "max-autotune", ...
        options: ours (`hstu_compile.options.Options`) and Inductor's, mixed.
        **kwargs: our options again, for `functools.partial(hstu_compile.backend, strict=True)`, which goes together
            with a mode; keywords of newer torch releases are accepted and ignored.

    Raises:
        ValueError: an unknown option.
        RuntimeError: what `strict`, `expect` and `verify` ask for.
    """
    from torch._inductor.compile_fx import compile_fx

    given = {**(options or {}), **{name: value for name, value in kwargs.items() if name in KNOWN}}
    chosen, inductor = split(mode, given)
    inductor.update(kwargs.get("config_patches") or {})  # what Dynamo's own debug override passes
    captured, original, assumed, report = rewrite(gm, example_inputs, chosen)
    _judge(gm, report, chosen)
    if captured is None:
        compiled: Any = compile_fx(gm, example_inputs, config_patches=inductor)
    else:
        # From the graft on, the captured graph belongs to Inductor.
        verified = original and functools.partial(verified_once, original, copy.deepcopy(captured))
        unread = copy.deepcopy(gm) if assumed else None
        compiled = hand_over(captured, gm, example_inputs, chosen, inductor, report)
        compiled = verified(compiled) if verified else compiled
        if unread is not None:
            # There the model's tensors are arguments like others, and nothing is assumed of them.
            again = functools.partial(backend, mode=mode, options=options, **kwargs)
            compiled = while_they_hold(assumed, compiled, lambda: torch.compile(unread, backend=again))
    return validation.values_checked()(compiled) if chosen.debug_checks else compiled


def hand_over(
    captured: fx.GraphModule,
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    inductor: Mapping[str, Any],
    report: Report,
    **how: Any,
) -> Callable[..., Any]:
    """Inductor's compile_fx of the rewritten graph, in the place of Dynamo's; reports what a budget recomputes.

    **how: more arguments of compile_fx.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    def own(name: str) -> Any:
        return inductor.get(name, getattr(config, name))

    hooks: dict[str, Any] = {"joint_custom_pre_pass": SaveResults(own("joint_custom_pre_pass"))}
    partitioner = None
    if options.recompute_budget is not None:
        partitioner = WithinBudget(options.recompute_budget, own("custom_partitioner_fn"))
        hooks["custom_partitioner_fn"] = partitioner
    graft(captured, gm)
    with cached_apart(captured):
        compiled: Any = compile_fx(gm, example_inputs, config_patches={**inductor, **hooks}, **how)
    if partitioner is not None:
        report.recomputed += partitioner.chosen
        log.info("%s", "\n".join(map(str, partitioner.chosen)))
    return compiled


def _reset() -> None:
    """What torch.compiler.reset() asks of a backend: forget recorded CUDA graphs, as Inductor does."""
    if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
        trees.reset_cudagraph_trees()


backend.reset = _reset  # type: ignore[attr-defined]


class Rewritten(NamedTuple):
    """What the passes made of a graph and what they decided."""

    graph: fx.GraphModule | None  # captured and rewritten; None when no pass fired
    original: fx.GraphModule | None  # to verify it: the graph as it was captured
    assumed: dict[int, Content]  # what it takes for granted of the inputs at these positions
    report: Report


def rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Rewritten:
    """Capture and passes; `gm` is left alone."""
    result = _rewrite(gm, example_inputs, options)
    log.info("%s", result.report)
    if result.graph is not None:
        log.debug("%s", result.graph.print_readable(print_output=False))
    return result


def _rewrite(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Rewritten:
    report = Report()
    try:
        captured = capture(gm)
        original = copy.deepcopy(captured) if options.verify else None
        offer_contents(captured, gm, example_inputs)
        found = apply(captured, report, options.passes)
        assumed = withdraw(part.graph for part in parts(captured))
        budgeted = options.recompute_budget is not None
        recompute(captured, ROLES if budgeted else _recomputed_roles(options), report, choose=budgeted)
        return Rewritten(captured if found else None, original, assumed, report)
    except NotCaptured as error:
        reason = str(error)
    except Exception as error:
        if options.strict:
            raise
        # Whatever goes wrong here must not break a model that Inductor can compile.
        log.exception("hstu_compile: a graph could not be rewritten and is compiled as Inductor would")
        reason = f"{type(error).__name__}: {error}"
    return Rewritten(None, None, {}, Report([Region("capture", "the whole graph", where(gm), reason)]))


def _recomputed_roles(options: Options) -> set[str]:
    if options.recompute_uvqk:
        return set(ROLES)
    chosen = {"input_layernorm": options.recompute_input_layernorm, "input_silu": options.recompute_input_silu}
    return {role for role, wanted in chosen.items() if wanted}


def where(gm: fx.GraphModule) -> str:
    """The first of the user's lines in a graph."""
    lines = (source_line(node) for node in gm.graph.nodes if node.op.startswith("call"))
    return next((line for line in lines if line != UNKNOWN), UNKNOWN)


def _judge(gm: fx.GraphModule, report: Report, options: Options) -> None:
    known = report.fused() or report.recognised()
    if known and (options.expect is None or len(report.fused("attention")) >= options.expect):
        return
    if _is_glue(gm):
        return
    if options.expect is not None:
        found = len(report.fused("attention"))
        raise RuntimeError(f"hstu_compile: {found} attention regions fused, expected {options.expect}\n{report}")
    if options.strict:
        raise RuntimeError(f"hstu_compile: nothing was fused (strict=True)\n{report}")
    _warn_once(where(gm))


_warned = False


def _warn_once(source: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"hstu_compile: nothing was fused in the graph at {source}; it runs as backend='inductor' would run it. "
            "hstu_compile.explain(model, *args) says why.",
            stacklevel=2,
        )


_PRODUCTS = {"einsum", "matmul", "bmm", "baddbmm", "scaled_dot_product_attention"}


def _is_glue(gm: fx.GraphModule) -> bool:
    """A piece that a graph break left over, without any product of activations: nothing to match, nothing missed."""
    if not any(isinstance(n.meta.get("example_value"), Tensor) for n in placeholders(gm)):
        return True
    reason = end_of(gm)
    resumed = any("torch_dynamo_resume_in_" in node.meta.get("stack_trace", "") for node in gm.graph.nodes)
    if not (resumed or getattr(reason, "graph_break", False)):
        return False
    names = {getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes}
    return not names & _PRODUCTS
