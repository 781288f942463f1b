"""verify="first": before the first call, the original graph beside the rewritten one, within the field's error budget.

    max|rewritten - exact| <= m * max|original - exact|        exact: the original in float64; m = 2 forward, 5 backward

Both run eagerly, forward and (where gradients are on) backward, on copies of the call's inputs. Two runs cannot draw
the same dropout mask from fused and separate code, so dropout is the identity in both.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from hstu_compile.capture import placeholders
from hstu_compile.ops import validation
from hstu_compile.passes import CALLS_OF_SUBGRAPHS, parts

log = logging.getLogger("hstu_compile")

FORWARD, BACKWARD = 2.0, 5.0
DROPOUT_OFF = {
    "aten::dropout": ("train", False),
    "aten::native_dropout": ("train", False),
    "hstu_compile::norm_gate_dropout": ("dropout_ratio", 0.0),
    "hstu_compile::gated_silu_attention": ("dropout_ratio", 0.0),
}


def verified_once(original: fx.GraphModule, rewritten: fx.GraphModule, compiled: Callable) -> Callable:
    """The compiled function; its first call with numbers compares the two graphs (taken over, no longer the caller's).

    That call raises RuntimeError with the figures if a value is out of budget.
    """
    for gm in (original, rewritten):
        _without_dropout(gm)
    pending = True

    def call(*args: Any) -> Any:
        nonlocal pending
        # Dynamo's DDPOptimizer calls each piece with fake tensors while it compiles; numbers come with the next call.
        if pending and not any(isinstance(x, FakeTensor) for x in args):
            _compare(original, rewritten, args)
            pending = False
        return compiled(*args)

    return call


def _without_dropout(gm: fx.GraphModule) -> None:
    for part in parts(gm):
        for node in part.graph.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.name in DROPOUT_OFF:
                name, neutral = DROPOUT_OFF[schema.name]
                position = [argument.name for argument in schema.arguments].index(name)
                if position < len(node.args):
                    node.update_arg(position, neutral)
                else:
                    node.update_kwarg(name, neutral)
        part.recompile()


def _compare(original: fx.GraphModule, rewritten: fx.GraphModule, args: tuple) -> None:
    devices = {x.device for x in args if isinstance(x, Tensor) and x.device.type == "cuda"}
    with torch.random.fork_rng(devices), validation.values_checked():
        ours = _run(fx.Interpreter(rewritten), args)
        try:
            eager = _run(fx.Interpreter(original), args)
            exact = _run(_Float64(original), [_widen(x) for x in args])
        except (RuntimeError, NotImplementedError) as error:  # out of memory among them
            warnings.warn(f"hstu_compile: could not verify: the original graph does not run: {error}", stacklevel=2)
            return
    figures = [
        figures_of(ours_value, eager_value, exact_value, m)
        for kind, m in (("outputs", FORWARD), ("gradients", BACKWARD))
        for ours_value, eager_value, exact_value in zip(
            getattr(ours, kind), getattr(eager, kind), getattr(exact, kind), strict=True
        )
    ]
    text = "\n".join(map(str, figures))
    log.info("verify='first':\n%s", text)
    if not all(figure.fits for figure in figures):
        raise RuntimeError(f"hstu_compile: the fused graph is out of its error budget (dropout off)\n{text}")


@dataclass
class _Run:
    outputs: list[tuple[str, Tensor]]
    gradients: list[tuple[str, Tensor]]


def _run(interpreter: fx.Interpreter, args: Any) -> _Run:
    torch.manual_seed(0)  # what remains of randomness
    names = [node.name for node in placeholders(interpreter.module)]
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in args]
    results = [x for x in pytree.tree_leaves(interpreter.run(*inputs)) if isinstance(x, Tensor)]
    outputs = [(f"output {i}", x.detach()) for i, x in enumerate(results)]
    targets = [x for x in results if x.requires_grad]
    sources = [(name, x) for name, x in zip(names, inputs, strict=True) if isinstance(x, Tensor) and x.requires_grad]
    if not targets or not sources:
        return _Run(outputs, [])
    torch.manual_seed(0)  # the two graphs may have drawn other numbers of random numbers
    incoming = [torch.randn(x.shape, device=x.device).to(x.dtype) for x in targets]
    grads = torch.autograd.grad(targets, [x for _, x in sources], incoming, allow_unused=True)
    found = zip(sources, grads, strict=True)
    return _Run(outputs, [(f"gradient of {name}", grad) for (name, _), grad in found if grad is not None])


def _widen(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.double()
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


class _Float64(fx.Interpreter):
    """Runs a captured graph with every floating value in float64, autocast and casts included."""

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if getattr(target, "__name__", "") in ("_enter_autocast", "_exit_autocast"):
            return None
        if target in CALLS_OF_SUBGRAPHS:
            body = args[0]
            return _Float64(body).run(*args[len(args) - len(placeholders(body)) :])
        args, kwargs = pytree.tree_map(_widen, (args, kwargs))
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return pytree.tree_map(_widen, super().call_function(target, args, kwargs))


@dataclass
class Figures:
    name: str
    error: float
    budget: float

    @property
    def fits(self) -> bool:
        return self.error <= self.budget  # false for NaN

    def __str__(self) -> str:
        return f"  {self.name}: error {self.error:.3e}, budget {self.budget:.3e}{'' if self.fits else '   OUT'}"


def figures_of(ours: tuple[str, Tensor], eager: tuple[str, Tensor], exact: tuple[str, Tensor], m: float) -> Figures:
    name, reference = exact
    largest = reference.abs().max().item() if reference.numel() else 0
    rounding = torch.finfo(eager[1].dtype).eps / 2 * largest if eager[1].is_floating_point() else 0.0
    budget = m * max(_max_error(eager[1], reference), rounding)
    return Figures(name, _max_error(ours[1], reference), budget)


def _max_error(x: Tensor, reference: Tensor) -> float:
    if x.shape != reference.shape:
        return float("nan")
    return (x.double() - reference.double()).abs().max().item() if x.numel() else 0.0
