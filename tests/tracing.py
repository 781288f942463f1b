"""A module or function as the graph that passes see, without Dynamo: pre-dispatch ATen, first dimensions symbolic."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def traced(function: Callable, args: list[Tensor], fixed: list[Tensor] | tuple[Tensor, ...] = ()) -> fx.GraphModule:
    """The graph of function(*fixed, *args); equal first sizes of `args` share a symbol, all other sizes are fixed."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(t: Tensor, first: DimDynamic) -> Tensor:
        sizes = [first, *[DimDynamic.STATIC] * (t.dim() - 1)][: t.dim()]
        return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    inputs = [fake(t, DimDynamic.STATIC) for t in fixed] + [fake(t, DimDynamic.DUCK) for t in args]
    with mode:
        return make_fx(function, pre_dispatch=True)(*inputs)


def traced_module(module: nn.Module, args: list[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph of (*parameters, *args), and the parameters."""
    names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=False))
        return torch.func.functional_call(module, given, values[len(names) :])

    return traced(call, args, fixed=parameters), list(parameters)
