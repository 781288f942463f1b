"""The convergence benchmark, small and on the CPU: what is trained, what is written, and which curves pass."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import convergence, plots, tables
from bench.convergence import COMPILED, EAGER, REFERENCE, RUNS
from bench.convergence_check import compare, in_eager_errors, smoothed, window
from bench.convergence_problem import LAG, NOISE, Problem, Ranker, losses, users
from tests.without_codegen import Compiled, inductor_without_codegen

TINY = Problem(seq_len=8, batch=4, num_heads=2, head_dim=8, num_layers=1, num_items=16)
STEPS = 4


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    monkeypatch.setitem(convergence.PROBLEMS, "cpu", TINY)
    yield from inductor_without_codegen(monkeypatch)


def test_trains_and_writes(inductor: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "convergence.json"
    arguments = ["--device", "cpu", "--steps", str(STEPS), "--out", str(out)]
    assert convergence.main(arguments) == 0
    assert any(torch.ops.hstu_compile.gated_silu_attention.default in targets for targets in inductor.targets)
    rows = [benchmark["extra_info"] for benchmark in json.loads(out.read_text())["benchmarks"]]
    found = convergence.curves(rows)
    assert list(found) == [str(run) for run in RUNS] and len(rows) == 5
    assert all(row["torch"] == torch.__version__ and row["gpu"] is None and "commit" in row for row in rows)
    assert all(len(curve) == STEPS and all(map(math.isfinite, curve)) for curve in found.values())
    same, other, compiled = found[str(EAGER[0])], found[str(EAGER[1])], found[str(COMPILED)]
    assert other != same != found[str(REFERENCE)]
    assert compiled == pytest.approx(same, abs=0.01) and other != pytest.approx(same, abs=0.01)
    off = [{**row, "losses": [x + 1 for x in row["losses"]]} if row["run"] == str(COMPILED) else row for row in rows]
    monkeypatch.setattr(convergence, "train", lambda *args: off)
    assert convergence.main(arguments) == 1


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    off = {COMPILED: 0.1}
    curves = {str(run): [4.0 - i / 40 + run.seed / 10 + off.get(run, 0) for i in range(40)] for run in RUNS}
    folder = tmp_path / "bench/results/nvidia-h200"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    rows = [{**TINY._asdict(), "torch": "2.11.0", "run": name, "losses": curve} for name, curve in curves.items()]
    tables.write(folder / "convergence.json", "bench.convergence", rows)
    drawn, distance = plots.convergence(*next(tables.results("convergence", tmp_path))).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn.lines}
    assert lines.keys() == curves.keys()
    assert lines[str(COMPILED)][0] == pytest.approx(4.1 - 0.5 / 40) and len(lines[str(COMPILED)]) == 39
    distances = {line.get_label(): list(line.get_ydata()) for line in distance.lines}
    assert distances[str(COMPILED)] == pytest.approx([0.5] * 39) and not any(distances[str(REFERENCE)])
    assert plots.draw("convergence", tmp_path).stat().st_size > 10_000


def curve(seed: int, steps: int = 200) -> list[float]:
    draw = torch.Generator().manual_seed(seed)
    return (4 * torch.exp(-torch.arange(steps) / 50) + 0.2 * torch.randn(steps, generator=draw)).tolist()


def test_check() -> None:
    """Near the same seed's curve passes; off everywhere, off for a while, diverging or NaN does not."""
    eager = [curve(seed) for seed in range(3)]
    same = eager[0]
    near = compare(eager, [x + 1e-3 * (-1) ** i for i, x in enumerate(same)])
    assert near.passes and near.relative.max() < 0.1
    spreads = compare(eager, same).spread
    least, spread, reach = spreads.min().item(), spreads.max().item(), window(len(same))
    assert compare(eager, [x + 0.99 * least for x in same]).passes
    for off in (
        [x + 1.1 * spread for x in same],
        [x + 1.1 * spread * (100 <= i < 100 + reach) for i, x in enumerate(same)],
        [x + 2 * spread * i / len(same) for i, x in enumerate(same)],
        [*same[:-1], math.nan],
    ):
        assert not compare(eager, off).passes


def test_error_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """What hides in the seeds' spread is seen beside what eager bfloat16 loses."""
    assert in_eager_errors([1.0, 4.0], [1.0, 3.0], [2.0, 3.0]) == 2
    assert math.isnan(in_eager_errors([1.0, math.nan], [1.0, 3.0], [2.0, 3.0]))
    exact = curve(0)
    found = {str(run): curve(run.seed) for run in RUNS} | {str(REFERENCE): exact}
    found[str(EAGER[0])] = [x + 1e-3 * (-1) ** i for i, x in enumerate(exact)]
    for factor, passes in ((1.9, True), (2.1, False)):
        found[str(COMPILED)] = [x - factor * 1e-3 * (-1) ** i for i, x in enumerate(exact)]
        assert convergence.comparison(found).passes
        assert convergence.show(found) == passes
    assert "at most 2   OFF" in capsys.readouterr().out


def test_spread_is_pointwise_and_has_no_gaps() -> None:
    """Two seeds one apart that cross: the spread where they do is that within a window's reach."""
    one, other = [0.0] * 40, [1.0] * 20 + [-1.0] * 20
    result = compare([one, other], one)
    assert window(40) == 2 and torch.equal(result.spread, torch.ones(39, dtype=torch.float64))
    assert smoothed(other)[19] == 0


def test_users_follow_their_rule() -> None:
    problem = Problem(seq_len=200, batch=1, num_heads=1, head_dim=8)
    items, lengths = users(problem, 50)
    strides = (items[:, LAG:] - items[:, :-LAG]) % problem.num_items
    for of_user in strides:
        stride = of_user.mode().values
        assert 1 <= stride <= 4 and (of_user == stride).double().mean() > 1 - 2 * NOISE
    assert lengths.min() >= 50 and lengths.max() <= 200 and len(set(lengths.tolist())) > 20
    assert all(torch.equal(a, b) for a, b in zip((items, lengths), users(problem, 50), strict=True))


def test_padding_is_not_seen() -> None:
    model, lengths = Ranker(TINY), torch.tensor([8, 5, 2, 3])
    items = torch.randint(TINY.num_items, (4, 8))
    padded = torch.where(torch.arange(8) < lengths[:, None], items, 0)
    valid = torch.arange(8) < lengths[:, None]
    assert torch.equal(model(items, lengths)[valid], model(padded, lengths)[valid])


def test_learns() -> None:
    problem = TINY._replace(num_heads=1, learning_rate=3e-2)
    found = losses(problem, 24, 0, torch.float32, torch.device("cpu"))
    assert sum(found[-6:]) < 0.97 * sum(found[:6])
