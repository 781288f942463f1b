"""What the user reads: explain, its command line, and the logger."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from hstu_compile.explain import Explanation
from hstu_compile.explain.__main__ import main
from hstu_compile.passes.report import Region
from tests.without_codegen import ONLY, SiluPass, install

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def silu_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, SiluPass())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.silu(self.linear(x))
        torch._dynamo.graph_break()
        return F.silu(y) * F.dropout(y, 0.5, self.training) * scale


def explain(model: Callable, *args: Tensor, **kwargs: float) -> Explanation:
    return hstu_compile.explain(model, *args, **kwargs, hstu_compile_options=ONLY)


def test_regions_lines_and_graph_breaks() -> None:
    model, x = Model(), torch.randn(3, 4)
    state = torch.random.get_rng_state()
    explanation = explain(model, x, scale=2.0)
    assert torch.equal(state, torch.random.get_rng_state())
    assert len(explanation.reports) == 2 and len(explanation.graph_breaks) == 1
    text = str(explanation)
    assert "fused: 2, recognised and left to Inductor: 0, not fused: 0; graphs: 2, graph breaks: 1" in text
    assert "y = F.silu(self.linear(x))" in text and __file__ in text
    assert (
        f"{__file__}:" in explanation.graph_breaks[0] and "torch._dynamo.graph_break()" in explanation.graph_breaks[0]
    )


def test_a_graph_break_comes_with_what_to_do_about_it() -> None:
    def model(x: Tensor) -> Tensor:
        return F.silu(x[x > 0]) * 2

    explanation = explain(model, torch.randn(3))
    assert (
        "change: " in explanation.graph_breaks[0] and "capture_dynamic_output_shape_ops" in explanation.graph_breaks[0]
    )


def test_what_did_not_fit_and_the_kernel() -> None:
    explanation = explain(nn.Linear(4, 4), torch.randn(3, 4))
    (report,) = explanation.reports
    assert "nothing in this graph" in str(explanation)
    report.add(Region("attention", "causal", "m.py:3: s = q @ k", reason="a softmax where a silu should be"))
    report.add(Region("attention", "causal", "m.py:9: s = q @ k", kernel="attention_triton; not sm_90: no GPU"))
    report.add(Region("uvqk", "mm -> silu", "m.py:2: z = x @ w", kernel="Inductor", rewritten=False))
    lines = str(explanation).splitlines()
    assert lines[0].startswith("fused: 1, recognised and left to Inductor: 1, not fused: 1")
    for words in ("recognised  uvqk: mm", "because a softmax", "at m.py:3", "kernel: attention_triton; not sm_90"):
        assert any(words in line for line in lines)


def test_a_graph_that_is_not_captured_is_explained() -> None:
    class Failing(SiluPass):
        def run(self, *args: object) -> int:
            raise KeyError("half way")

    with pytest.MonkeyPatch.context() as patch:
        install(patch, Failing())
        text = str(explain(nn.SiLU(), torch.randn(3)))
    assert "not fused  capture" in text and "KeyError: 'half way'" in text


def test_again_and_after_compiling() -> None:
    """Neither Dynamo's caches nor its recompile limit hide anything, and the compiled model keeps its code."""
    model, x, graphs = nn.Sequential(nn.Linear(4, 4), nn.SiLU()), torch.randn(3, 4), []

    def backend(gm: torch.fx.GraphModule, example_inputs: list) -> object:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert len(explain(compiled, x).reports[0].fused()) == 1
    compiled(x)
    assert len(graphs) == 1


FACTORY = """
import torch
def factory():
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.randn(3, 4),)
def with_keywords():
    return torch.nn.functional.relu, (torch.randn(3, 4),), {"inplace": False}
"""


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("factory", "with_keywords"):
        main([f"some_factory:{name}"])
        assert (
            "fused: 0, recognised and left to Inductor: 0, not fused: 0; graphs: 1, graph breaks: 0"
            in capsys.readouterr().out
        )
    with pytest.raises(SystemExit):
        main(["some_factory"])
    assert "pkg.mod:factory" in capsys.readouterr().err


def test_command_line_and_logger_for_real(tmp_path: Path) -> None:
    """`python -m`, with TORCH_LOGS as the user would set it."""
    (tmp_path / "some_factory.py").write_text(FACTORY)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCH_LOGS": "+hstu_compile"}
    command = [sys.executable, "-m", "hstu_compile.explain", "some_factory:factory"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "graphs: 1" in result.stdout
    assert "hstu_compile" in result.stderr and "nothing in this graph" in result.stderr
