"""Masks read from the model's own tensors: right after every way to change these, and no wait where none changed."""

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hstu_compile
from hstu_compile import assumptions, compiler
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.without_codegen import inductor_without_codegen

compiles = pytest.fixture(autouse=True)(inductor_without_codegen)
LONGEST = 20


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.uvqk, self.out = nn.Linear(16, 64), nn.Linear(16, 16)
        self.register_buffer("causal", torch.ones(LONGEST, LONGEST, dtype=torch.bool).tril())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        u, v, q, k = F.silu(self.uvqk(F.layer_norm(x, (16,)))).chunk(4, -1)
        mask = self.causal[: x.shape[1], : x.shape[1]] if mask is None else mask
        return x + self.out(F.layer_norm(F.silu(q @ k.mT) / 50 * mask @ v, (16,)) * u)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    found, rewrite = [], compiler.rewrite

    def watched(*args):
        result = rewrite(*args)
        found.append(result.report)
        return result

    monkeypatch.setattr(compiler, "rewrite", watched)
    return found


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were compared while the model ran."""
    found, compare = [], assumptions.content_of

    def watched(tensor):
        found.append(tensor)
        return compare(tensor)

    monkeypatch.setattr(assumptions, "content_of", watched)
    monkeypatch.setattr(assumptions.validation, "checks_values", lambda device: False)  # as on a GPU
    return found


def closed(report: Report) -> bool:
    assert report.fused("attention")
    return "mask tensor" not in str(report)


def assert_right(run: Callable, model: nn.Module, length: int = 12, *rest: Tensor) -> None:
    """Forward and the gradient of x of `run` against the model as it is now."""
    values = []
    for call, dtype in ((run, torch.float32), (model, torch.float32), (copy.deepcopy(model).double(), torch.float64)):
        x = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(length))
        x = x.to(dtype).requires_grad_()
        out = call(x, *rest)
        values.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for triple, m in zip(zip(*values, strict=True), (FORWARD, BACKWARD), strict=True):
        assert_within_budget(*triple, m)


def compiled(model: nn.Module, dynamic: bool | None = True) -> Callable:
    torch._dynamo.reset()
    return torch.compile(model, backend=hstu_compile.backend, dynamic=dynamic)


def upper(model: Stack) -> Tensor:
    return model.layers[1].causal.mT.contiguous()


def in_place(model: Stack) -> None:
    model.layers[1].causal.copy_(upper(model))


def one_cell(model: Stack) -> None:
    model.layers[1].causal[9, 4] = False


def through_a_view(model: Stack) -> None:
    model.layers[1].causal.view(-1)[:60].fill_(True)


def another_tensor(model: Stack) -> None:
    model.layers[1].causal = upper(model)


def other_data(model: Stack) -> None:
    model.layers[1].causal.data = upper(model)


def loaded(model: Stack) -> None:
    model.load_state_dict({**model.state_dict(), "layers.1.causal": upper(model)})


def in_inference_mode(model: Stack) -> None:
    with torch.inference_mode():
        model.layers[1].causal.logical_not_()


CHANGES = [in_place, one_cell, through_a_view, another_tensor, other_data, loaded, in_inference_mode]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: Callable, reports: list[Report], comparisons: list, caplog) -> None:
    model = Stack()
    run = compiled(model)
    assert_right(run, model)
    assert_right(run, model, 15)
    assert [closed(report) for report in reports] == [True]
    change(model)
    with caplog.at_level(logging.WARNING, "hstu_compile"):
        for length in (12, 15):
            assert_right(run, model, length)
    assert "no longer taken for granted" in caplog.text
    # Compiled again, once: with a mask tensor, to which further changes do not matter.
    assert [closed(report) for report in reports[:2]] == [True, False]
    count = len(reports)
    seen = len(comparisons)
    model.layers[1].causal.logical_not_()
    assert_right(run, model, 15)
    assert len(reports) == count and len(comparisons) == seen


def test_what_is_written_past_the_version_counter_is_seen_where_values_are_checked(reports: list[Report]) -> None:
    model = Stack()
    run = compiled(model)
    assert_right(run, model)
    model.layers[0].causal.data[9, 4] = False
    assert_right(run, model)
    assert [closed(report) for report in reports] == [True, False]


def test_what_is_written_past_the_version_counter_stops_the_program_elsewhere(
    monkeypatch: pytest.MonkeyPatch, reports: list[Report]
) -> None:
    """As on a GPU, where nobody waits for values."""
    monkeypatch.setattr(assumptions.validation, "checks_values", lambda device: False)
    model = Stack()
    run = compiled(model)
    for length in (12, 15):
        assert_right(run, model, length)
    model.layers[0].causal.data[9, 4] = False
    with pytest.raises(RuntimeError, match="written past autograd's version counter"):
        assert_right(run, model)


ON_A_GPU = """
import torch
from test_assumptions import Stack, compiled
model = Stack().cuda()
run = compiled(model)
x = torch.randn(2, 12, 16, device="cuda")
for _ in range(3):
    run(x)
torch.cuda.synchronize()
print("right so far", flush=True)
model.layers[0].causal.data[9, 4] = False
run(x)
torch.cuda.synchronize()
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_is_written_past_the_version_counter_stops_the_program_on_a_gpu() -> None:
    """In a process of its own: what was asserted on a GPU leaves it unusable."""
    paths = {"PYTHONPATH": f".:tests:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], env=os.environ | paths, capture_output=True, text=True)
    assert "right so far" in done.stdout and done.returncode != 0, done.stderr
    assert "device-side assert" in done.stderr or "version counter" in done.stderr, done.stderr


def test_what_stays_is_compared_once(reports: list[Report], comparisons: list) -> None:
    model = Stack()
    run = compiled(model)
    for length in (12, 15, 13):
        assert_right(run, model, length)
    assert len(comparisons) == 2
    model.load_state_dict(model.state_dict())
    model.layers[0].causal = model.layers[0].causal.clone()
    for _ in range(2):
        assert_right(run, model)
    assert len(comparisons) == 4 and [closed(report) for report in reports] == [True]


def test_layers_compiled_one_by_one_share_what_is_compiled(reports: list[Report], comparisons: list) -> None:
    torch._dynamo.reset()
    model, eager = Stack(), Stack()
    eager.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.compile(backend=hstu_compile.backend, dynamic=True)
    for _ in range(2):
        assert_right(model, eager)
    assert [closed(report) for report in reports] == [True] and len(comparisons) == 2
    model.layers[1].causal.fill_(True)
    eager.layers[1].causal.fill_(True)
    assert_right(model, eager)
    assert len(reports) == 2 and not closed(reports[1])


class Checkpointed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def test_inside_a_checkpointed_layer(reports: list[Report]) -> None:
    model = Checkpointed()
    run = compiled(model)
    assert_right(run, model)
    assert len(reports[0].fused("attention")) == 2
    one_cell(model)
    assert_right(run, model)
    assert [closed(report) for report in reports] == [True, False]


class Written(Checkpointed):
    """Changes the second layer's mask before it runs it."""

    def forward(self, x: Tensor) -> Tensor:
        self.layers[1].causal.logical_not_()
        return super().forward(x)


def test_a_mask_that_is_written_in_the_graph_is_not_read_inside_a_region(reports: list[Report]) -> None:
    model, eager = Written(), Written()
    eager.load_state_dict(model.state_dict())
    run = compiled(model)
    for _ in range(3):
        x = torch.randn(3, 12, 16)
        exact = copy.deepcopy(eager).double()(x.double())
        assert_within_budget(run(x), eager(x), exact, FORWARD)
    assert "causal; dense" in str(reports[0]) and "mask tensor" in str(reports[0])
    assert len(reports) == 1


def test_masks_that_come_with_the_call_are_not_read(reports: list[Report]) -> None:
    model = Layer()
    run = compiled(model)
    assert_right(run, model, 12, torch.ones(12, 12, dtype=torch.bool).tril())
    assert [closed(report) for report in reports] == [False]


def test_tensors_that_share_memory_are_not_read(reports: list[Report]) -> None:
    """A write to the other one, in the same call, would not be seen."""
    model = Stack()
    model.layers[1].causal = model.layers[0].causal.view(LONGEST, LONGEST)
    run = compiled(model)
    assert_right(run, model)
    assert [closed(report) for report in reports] == [False]


def test_a_frozen_parameter_and_a_plain_attribute_are_read(reports: list[Report]) -> None:
    for make in (lambda m: nn.Parameter(m, requires_grad=False), lambda m: m):
        model = Layer()
        mask = make(model.causal.float())
        del model.causal
        model.causal = mask
        run = compiled(model, dynamic=None)  # else an attribute has symbolic sizes
        assert_right(run, model)
        with torch.no_grad():
            mask[3, 0] = 0
        assert_right(run, model)
    assert [closed(report) for report in reports] == [True, False] * 2


def test_explain_reads_them_too() -> None:
    torch._dynamo.reset()
    assert "fused  attention: causal" in str(hstu_compile.explain(Stack(), torch.randn(3, 12, 16)))
