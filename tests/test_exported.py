"""AOTInductor packages with our ops inside, run by a process that only loads them; docs/export.md."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import hstu_compile
from hstu_compile import exported
from hstu_compile.exported import step_program
from hstu_compile.serving import Answer
from hstu_compile.serving import engine as engine_module
from tests.error_budget import FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.models import MODELS
from tests.models.ranking import Ranking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2, 3, 5, 8)
ops = torch.ops.hstu_compile


def export_case(model: nn.Module, few: tuple[Any, ...], many: tuple[Any, ...]) -> ExportedProgram:
    """The sizes that differ are dynamic."""
    shapes = [
        {d: Dim.DYNAMIC for d, (n, m) in enumerate(zip(x.shape, y.shape, strict=True)) if n != m}
        if isinstance(x, Tensor)
        else None
        for x, y in zip(few, many, strict=True)
    ]
    inside = tuple(shapes)
    with torch.no_grad():
        return export(model.eval(), few, dynamic_shapes=(inside,) if isinstance(model, Autocast) else inside)


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(*args)


class Doubled(nn.Module):
    """The reference of an Autocast: no autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = getattr(model, "model", model)

    def forward(self, *args: Any) -> Any:
        return self.model(*args)


def check(ours: Any, model: nn.Module, args: tuple[Any, ...]) -> None:
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    with torch.no_grad(), in_plain_pytorch():
        pair = model(*args), Doubled(copy.deepcopy(model)).double()(*wide)
    ours, eager, exact = (x[0] if isinstance(x, tuple) else x for x in (ours, *pair))
    assert_within_budget(ours, eager, exact, FORWARD)


def targets(program: ExportedProgram) -> set[Any]:
    parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return {node.target for part in parts for node in part.graph.nodes}


def package(program: ExportedProgram, folder: Path) -> str:
    return torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))


def run_elsewhere(path: str, calls: list[tuple[Any, ...]], folder: Path) -> list[Any]:
    """The results of calls in a process of its own; skips where a package of torch alone can't be run there either.

    Seen where what the C++ compiler had linked into a package crashed in std::regex while it was loaded.
    """
    result = _run_elsewhere(path, calls, folder)
    if result.returncode:
        (plain := folder / "plain").mkdir()
        with torch.no_grad():
            linear = package(export(nn.Linear(8, 8), (torch.randn(3, 8),)), plain)
        if code := _run_elsewhere(linear, [(torch.randn(3, 8),)], plain).returncode:
            pytest.skip(f"a package of a Linear ends with exit code {code}")
    assert not result.returncode, f"exit code {result.returncode}: {result.stderr[-2000:]}"
    return torch.load(folder / "results")


def _run_elsewhere(path: str, calls: list[tuple[Any, ...]], folder: Path) -> subprocess.CompletedProcess[str]:
    torch.save(calls, folder / "calls")
    command = [sys.executable, "-m", "tests.load_package", path, str(folder / "calls"), str(folder / "results")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "meta_stu stack"])
def test_every_model_fuses_as_an_exported_program(name: str) -> None:
    case = MODELS[name]
    model, sizes = case.model(), [case.arguments(n) for n in SIZES[1:3]]
    program = export_case(model, *sizes)
    before = program.graph_module.code
    fused = hstu_compile.fuse(program)
    assert ops.hstu_attention.default in targets(fused) and program.graph_module.code == before
    for args in sizes:
        with torch.no_grad():
            check(fused.module()(*args), model, args)


def test_the_default_device_is_the_callers() -> None:
    case = MODELS["meta_stu"]
    program = export_case(case.model(), case.arguments(3), case.arguments(5))
    with torch.device("meta"):
        fused = hstu_compile.fuse(program)
    assert ops.hstu_attention.default in targets(fused)


def test_autocast_inside_of_the_model() -> None:
    case = MODELS["meta_stu"]
    model, sizes = Autocast(case.model()), [case.arguments(n) for n in SIZES[1:3]]
    fused = hstu_compile.fuse(export_case(model, *sizes))
    assert ops.hstu_attention.default in targets(fused)
    for args in sizes:
        with torch.no_grad():
            check(fused.module()(*args), model, args)


# Jagged with targets; dense with a mask tensor, whose tiles are another op, and a bias.
@pytest.mark.parametrize("name", ["meta_stu", "relative bias"])
def test_a_package_in_a_fresh_process(name: str, tmp_path: Path) -> None:
    case = MODELS[name]
    model, sizes = case.model(), [case.arguments(n) for n in SIZES]
    path = package(hstu_compile.fuse(export_case(model, *sizes[1:3])), tmp_path)
    other = tuple(x if isinstance(x, Tensor) else x + 1 for x in sizes[0])
    *results, of_other = run_elsewhere(path, [*sizes, other], tmp_path)
    for ours, args in zip(results, sizes, strict=True):
        check(ours, model, args)
    assert torch.equal(of_other, results[0])  # a package takes no notice of another number


needs_dtypes = pytest.mark.skipif(not exported.HAS_DTYPES, reason="a dtype reaches an op of a package in torch 2.13")


@needs_dtypes
def test_the_step_of_an_engine_in_a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pools are written in place: later requests read what the package wrote for earlier ones."""
    plans: list[list[Tensor]] = []

    def recorded(step: Any) -> Any:
        def launch(*inputs: Any) -> Any:
            plans.append([x.clone() for x in inputs[-5:]])
            return step.graph(*inputs)

        return launch

    monkeypatch.setattr(engine_module, "compiled", recorded)
    model = Ranking(layers=2, candidates=2).eval()
    traffic, engine = Traffic(model), hstu_compile.serve(model, max_batch=4, max_seq_len=MAX_SEQ_LEN, page_size=16)
    answers = []
    for users, histories, counts in (
        (["a", "b"], [5, 9], [2, 3]),
        (["b", "a", "c"], [20, 9, 3], [2, 2, 3]),
        (["a", "b", "c", "d"], [19, 20, 30, 17], [2, 2, 3, 1]),
    ):
        args = traffic.request(users, histories, counts)
        answers.append((engine(users, *args), args))
    program = step_program(engine, *answers[1][1])
    assert {ops.append_kv.default, ops.gated_paged_attention.default} <= targets(program)
    pools = [torch.zeros_like(pool) for pool in engine._cache.gpu.pools]  # type: ignore[union-attr]
    calls = [(pools, plan, args, {}) for plan, (_, args) in zip(plans, answers, strict=True)]
    results = run_elsewhere(package(program, tmp_path), calls, tmp_path)
    for (output,), (answer, args) in zip(results, answers, strict=True):
        traffic.check(Answer(output, answer.rows), args)


class Divided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        weights = torch.nn.functional.silu(x @ x.mT) / x.shape[1]
        return weights.tril() @ x


def test_what_a_package_cannot_hold_is_refused() -> None:
    x, y = torch.randn(2, 5, 8), torch.randn(3, 7, 8)
    with pytest.raises(RuntimeError, match=r"test_exported.py:\d+: weights = .*divides by what is dynamic"):
        hstu_compile.fuse(export_case(Divided(), (x,), (y,)))
    hstu_compile.fuse(export_case(Divided(), (x,), (y[:, :5],)))
    with pytest.raises(RuntimeError, match="no attention was fused"):
        hstu_compile.fuse(export_case(nn.Linear(8, 8), (x,), (y,)))


def test_dtypes_are_still_checked() -> None:
    """A program that was exported under autocast says so when it runs without."""
    case = MODELS["meta_stu"]
    with torch.autocast("cpu", torch.bfloat16):
        fused = hstu_compile.fuse(export_case(case.model(), case.arguments(3), case.arguments(5)))
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype mismatch"):
        fused.module()(*case.arguments(3))


def test_an_engine_that_has_captured_nothing() -> None:
    engine = hstu_compile.serve(Ranking().eval(), max_batch=2, max_seq_len=MAX_SEQ_LEN)
    with pytest.raises(RuntimeError, match="answered no request" if exported.HAS_DTYPES else "torch is 2"):
        step_program(engine)
