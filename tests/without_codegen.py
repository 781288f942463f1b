"""Compile tests without a C++ compiler in the loop, and with a pass small enough to see through."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx

from hstu_compile.passes.report import Region, Report, source_line

aten = torch.ops.aten


class Compiled:
    """What Inductor was asked to do, in order."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []  # as handed to compile_fx
        self.targets: list[set[Any]] = []  # of those graphs and their subgraphs, before Inductor touched them
        self.static_inputs: list[list[int]] = []  # of each forward and backward graph
        self.configs: list[dict[str, Any]] = []
        self.aot_graphs: list[fx.GraphModule] = []  # each forward and backward


def inductor_without_codegen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """Inductor up to, and without, its code generation: its graphs run eagerly. Serves `backend="inductor"` too."""
    from torch._inductor import compile_fx as module

    seen, compile_fx = Compiled(), module.compile_fx

    def run_eagerly(gm: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        seen.static_inputs.append(list(kwargs.get("static_input_idxs") or ()))
        seen.aot_graphs.append(gm)
        return make_boxed_func(gm.forward)

    def patched(gm: fx.GraphModule, example_inputs: Any, config_patches: Any = None, **kwargs: Any) -> Any:
        if "inner_compile" in kwargs:  # it calls itself with the config in place
            return compile_fx(gm, example_inputs, **kwargs)
        seen.graphs.append(gm)
        parts = [part for part in gm.modules() if isinstance(part, fx.GraphModule)]
        seen.targets.append({node.target for part in parts for node in part.graph.nodes})
        seen.configs.append(dict(config_patches or {}))
        return compile_fx(gm, example_inputs, inner_compile=run_eagerly, config_patches=config_patches)

    monkeypatch.setattr(module, "compile_fx", patched)
    # Eager random numbers, so that a seed means the same as without compilation.
    with torch._inductor.config.patch(fallback_random=True, fx_graph_cache=False):
        with torch._functorch.config.patch(enable_autograd_cache=False):
            yield seen


class SiluPass(ModuleType):
    """silu(x) -> x * sigmoid(x) * factor, in the place of the attention pass."""

    NAME = "attention"

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__("hstu_compile.passes.attention")
        self.factor = factor

    def run(self, gm: fx.GraphModule, report: Report) -> int:
        calls = gm.graph.find_nodes(op="call_function", target=aten.silu.default)
        for node in calls:
            (x,) = node.args
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(aten.mul.Tensor, (x, gm.graph.call_function(aten.sigmoid.default, (x,))))
                if self.factor != 1.0:
                    new = gm.graph.call_function(aten.mul.Scalar, (new, self.factor))
            report.add(Region(self.NAME, "silu", source_line(node)))
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
        return len(calls)


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    monkeypatch.setitem(sys.modules, "hstu_compile.passes.attention", module)


ONLY = {"enable": "attention"}  # the stand-in alone
