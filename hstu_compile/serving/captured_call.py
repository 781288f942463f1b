"""One call of a model as a graph, with the way from the call's arguments to its inputs and from its outputs back.

Dynamo captures the call once, all sizes symbolic. Afterwards nobody asks Dynamo: each input says by its own source how
it is found in (model, args, kwargs), and each tensor that the model returned which output it was.
"""

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from hstu_compile.assumptions import offer_contents
from hstu_compile.capture import NotCaptured, capture, placeholders
from hstu_compile.passes import apply, parts
from hstu_compile.passes.contents import Content, content_of, withdraw
from hstu_compile.passes.report import Report

log = logging.getLogger("hstu_compile")

PASSES = ("attention", "uvqk", "output")


@dataclass
class CapturedCall:
    """A graph whose attention is fused. Its parameters and buffers are attributes of it, its inputs are arguments."""

    graph: fx.GraphModule
    report: Report
    sources: dict[str, str]  # of each input: an expression in L["args"] and L["kwargs"]
    outputs: Callable[[Sequence[Any]], Any]  # what the model returns, of the graph's outputs
    own: list[tuple[CodeType, Tensor]]  # the model's tensors: an expression in L["model"], and what it gave
    assumed: list[tuple[Tensor, Content]]  # tensors of the model that must hold what was read of them

    def __post_init__(self) -> None:
        # Dynamo's own expressions, as one function.
        self._inputs = eval(f"lambda L: [{', '.join(self.sources.values())}]")  # noqa: S307

    @property
    def names(self) -> dict[str, str]:
        """Each input in the caller's terms: args[3]."""
        return {name: source.removeprefix("L['").replace("']", "", 1) for name, source in self.sources.items()}

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's inputs in a call with these arguments."""
        return self._inputs({"args": args, "kwargs": kwargs})

    def holds(self, model: nn.Module) -> bool:
        """Whether the model has the same tensors as when it was captured, and in them what was read."""
        scope = {"L": {"model": model}}
        same = all(eval(source, scope) is tensor for source, tensor in self.own)  # noqa: S307
        return same and all(content_of(tensor) == content for tensor, content in self.assumed)


_SYMBOLS: Any = importlib.import_module("torch.fx.experimental._config")


@contextlib.contextmanager
def sizes_apart() -> Iterator[None]:
    """Inside, Dynamo takes no two sizes for the same that only happen to be equal, and floats for constants."""
    with _SYMBOLS.patch(use_duck_shape=False), torch._dynamo.config.patch(specialize_float=True):  # torch 2.11, 2.13
        yield


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def capture_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CapturedCall:
    """Capture model(*args, **kwargs) and fuse its attention; nothing is computed.

    Raises:
        RuntimeError: it can't be captured as one graph; the message says where and why.
    """
    found: list[tuple[fx.GraphModule, Report, list[int], list[Any], Sequence[Any], fx.GraphModule]] = []
    errors: list[Exception] = []
    stand_ins: list[Any] = []

    def record(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        try:
            captured, report = capture(gm), Report()
            offer_contents(captured, gm, example_inputs)
            apply(captured, report, PASSES)
            read = withdraw(part.graph for part in parts(captured))
            found.append((captured, report, list(read), list(read.values()), example_inputs, gm))
        except (NotCaptured, NotImplementedError) as error:
            errors.append(error)
        (output,) = gm.graph.find_nodes(op="output")
        stand_ins[:] = [torch.empty(0) for _ in output.args[0]]
        return lambda *inputs: tuple(stand_ins)

    with torch.no_grad(), sizes_apart(), _SYMBOLS.patch(backed_size_oblivious=True):  # sizes of 1 are no constants
        try:
            compiled = torch.compile(_call, backend=record, fullgraph=True, dynamic=True)
            result = compiled(model, args, kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(f"serve: the model can't be captured as one graph: {error}") from error
    if errors:
        raise RuntimeError(f"serve: the model can't be captured as one graph: {errors[0]}") from errors[0]
    if len(found) != 1:
        raise RuntimeError("serve: the model calls nothing that could be captured")
    ((captured, report, positions, contents, example_inputs, gm),) = found
    log.info("%s", report)
    assumed = [(example_inputs[i], content) for i, content in zip(positions, contents, strict=True)]
    sources, own = _bind(captured, gm, model)
    return CapturedCall(captured, report, sources, _returned(result, stand_ins), own, assumed)


def _bind(
    captured: fx.GraphModule, gm: fx.GraphModule, model: nn.Module
) -> tuple[dict[str, str], list[tuple[CodeType, Tensor]]]:
    """Make attributes of what belongs to the model; where the other inputs come from, and these."""
    sources, belongings = {}, []
    for old, new in zip(placeholders(gm), placeholders(captured), strict=True):
        name: Any = old._dynamo_source.name  # type: ignore[attr-defined]
        text = name() if callable(name) else name  # torch 2.11, and later a property
        if "L['args']" in text or "L['kwargs']" in text:
            sources[new.name] = text
            continue
        code = compile(text, text, "eval")
        own = eval(code, {"L": {"model": model}})  # noqa: S307
        if not isinstance(own, Tensor):
            raise RuntimeError(f"serve: the model reads {text}, expected its arguments, parameters and buffers only")
        belongings.append((code, own))
        attribute = f"hstu_compile_{new.name}"
        if isinstance(own, nn.Parameter):
            captured.register_parameter(attribute, own)
        else:
            captured.register_buffer(attribute, own, persistent=False)
        with captured.graph.inserting_before(new):
            tensor = captured.graph.get_attr(attribute)
        tensor.meta.update(new.meta)
        new.replace_all_uses_with(tensor)
        captured.graph.erase_node(new)
    captured.recompile()
    return sources, belongings


def _returned(result: Any, stand_ins: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """What the model returns, by which stand-in of an output it was."""
    leaves, spec = pytree.tree_flatten(result)
    places = [next((k for k, given in enumerate(stand_ins) if given is leaf), None) for leaf in leaves]
    for leaf, place in zip(leaves, places, strict=True):
        if place is None and isinstance(leaf, Tensor):
            raise RuntimeError("serve: the model returns one of its arguments, expected what it computes")

    def rebuild(outputs: Sequence[Any]) -> Any:
        picked = [leaf if place is None else outputs[place] for leaf, place in zip(leaves, places, strict=True)]
        return pytree.tree_unflatten(picked, spec)

    return rebuild
