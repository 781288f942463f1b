"""Models in the spellings of public code, through every pass and AOTAutograd: what is known of a layer, the numbers."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hstu_compile
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.models import MODELS
from tests.without_codegen import Compiled, inductor_without_codegen

# name -> what is fused beside attention and output
SPELLINGS = {
    "meta_stu": {"packed_gradient"},
    "meta_stu group norm": {"packed_gradient"},
    "meta_stu checkpointed": {"packed_gradient"},
    "nvidia_native": {"packed_gradient"},
    "research": set(),
    "item padding": {"packed_gradient"},
}


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield from inductor_without_codegen(monkeypatch)


def values(call: Any, model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The first output, and the gradients of x and of the parameters that have one."""
    x = arguments[0].detach().requires_grad_()
    out = call(x, *arguments[1:])
    out = out[0] if isinstance(out, tuple) else out
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    grads = torch.autograd.grad(out, [x, *model.parameters()], upstream, allow_unused=True)
    return [out, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_graph_whole_layers_and_the_numbers(name: str, inductor: Compiled) -> None:
    torch.manual_seed(0)
    case = MODELS[name]
    model, arguments = case.model(), case.arguments(3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (report,) = hstu_compile.explain(model, *arguments).reports
        fused = {"attention", "output"} | SPELLINGS[name]
        assert {region.pass_name for region in report.fused()} - {"table_lookup"} == fused
        assert all(len(report.fused(pass_name)) == 1 for pass_name in fused)
        assert all(region.what.endswith("-> gate") for region in report.fused("packed_gradient"))
        assert len(report.recognised("uvqk")) == 1
        torch._dynamo.reset()
        ours = values(torch.compile(model, backend=hstu_compile.backend), model, arguments)
    eager = values(model, model, arguments)
    double = copy.deepcopy(model).double()
    wide = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    with in_plain_pytorch():
        exact = values(double, double, wide)
    for i, triple in enumerate(zip(ours, eager, exact, strict=True)):
        assert_within_budget(*triple, BACKWARD if i else FORWARD, f"value {i}")


def test_dropout_of_a_checkpointed_layer_is_the_same_again() -> None:
    """With Inductor's own random numbers: the backward, whose y makes the weight's gradient, drops as the forward."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            a = torch.tril(torch.nn.functional.silu(x @ x.mT)) @ x / x.shape[1]
            y = torch.nn.functional.dropout(torch.nn.functional.layer_norm(a, (8,)) * self.gate(x), 0.5)
            return y @ self.weight

    torch.manual_seed(0)
    model = Projected()

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    torch._dynamo.reset()
    out = torch.compile(run, backend=hstu_compile.backend, options={"expect": 1})(torch.randn(2, 6, 8))
    out.sum().backward()
    assert model.weight.grad is not None
    torch.testing.assert_close((model.weight.grad * model.weight).sum(), out.sum())
