"""The documents' tables come from the results files; the demo tells what happened; the suites collect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import attention_problem, attention_sweep, demo, paged_attention, plots, sanitize, show, tables
from bench.attention_problem import Problem
from bench.launches import in_parallel
from hstu_compile.ops.hstu_attention_reference import live_cells

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = {
    "torch": "2.11.0",
    "dtype": "bfloat16",
    "batch": 32,
    "num_heads": 4,
    "head_dim": 256,
    "seq_len": 1024,
    "recompute": [],
    "lengths": "full",
    "mask": "causal",
}


def write_results(root: Path, suite: str, *benchmarks: dict) -> None:
    folder = root / "bench/results/some-gpu"
    folder.mkdir(parents=True)
    run = {"datetime": "2026-01-31T00:00:00", "benchmarks": [{"extra_info": BENCHMARK | b} for b in benchmarks]}
    (folder / f"{suite}.json").write_text(json.dumps(run))


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_documents_are_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text()
    assert tables.BLOCK.search(text), "no table in this document"
    assert tables.rewritten(text) == text, "run `make tables`"


STEP = {"direction": "step", "full_sequence": True, "num_layers": 1, "dropout": 0.2, "host_ms": 2.25, "held_mib": 70.0}
LAYER = (
    STEP | {"implementation": "native", "ms": 5.254, "peak_mib": 1000.4},
    STEP | {"implementation": "hstu", "ms": 2.5, "peak_mib": 400.0},
    STEP | {"implementation": "hstu", "ms": 9.9, "peak_mib": 3600.0, "seq_len": 4096},
    STEP | {"implementation": "hstu", "ms": 2.75, "peak_mib": 300.0, "recompute": ["input_layernorm", "input_silu"]},
    STEP | {"implementation": "hstu", "ms": 8.88, "peak_mib": 1.0, "direction": "forward"},
    STEP | {"implementation": "hstu", "ms": 8.88, "peak_mib": 1.0, "passes": ["attention"]},
    STEP | {"implementation": "hstu", "ms": 8.88, "peak_mib": 1.0, "full_sequence": False},
    STEP | {"implementation": "native", "ms": 7.0, "peak_mib": 1.0, "num_layers": 2},
)


def test_layer_table(tmp_path: Path) -> None:
    write_results(tmp_path, "layer", *LAYER)
    text = tables.rewritten("a\n<!-- bench.tables: layer -->\nold\n<!-- end -->\nb", tmp_path)
    assert "some-gpu; torch 2.11.0; 2026-01-31" in text
    assert "old" not in text and "8.88" not in text
    assert tables.rewritten(text, tmp_path) == text
    heading, step, _, memory, host, other_heading, other, *_ = tables.render("layer", tmp_path).split("\n\n")[1:]
    assert heading.startswith("Training step of one layer, B=32, H=4, D=256, bfloat16, dropout 0.2, full length")
    assert step.splitlines() == [
        "|  | N=1024 | N=4096 |",
        "| --- | --- | --- |",
        "| native | 5.25 | - |",
        "| hstu | 2.50 | 9.90 |",
        "| hstu, input_layernorm and input_silu recomputed | 2.75 | - |",
        "| *public native* | 5.25 | 36.07 |",
        "| *public CUTLASS fused* | 3.13 | 19.18 |",
        "| *public CUTLASS fused, norm and silu recomputed* | 3.68 | 19.74 |",
        "| *target* | 2.5 | 15.8 |",
        "| *target, norm and silu recomputed* | 2.6 | 16.2 |",
        "| *floor* | 1.6 | 10.1 |",
    ]
    assert "| hstu | 70 / 400 | 70 / 3600 |" in memory and "| *public native* | - | 4482 / 5636 |" in memory
    assert "| *target* | - | - / 3600 |" in memory
    assert host.startswith("The host's time for a step at N=1024: 2.25 ms (native), 2.25 ms (hstu), 2.25 ms (hstu, inp")
    assert "2 layers" in other_heading and other.splitlines()[2:] == ["| native | 7.00 |"]


def test_layer_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_results(tmp_path, "layer", *LAYER)
    step, peak = plots.layer(*next(tables.results("layer", tmp_path))).axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in step.lines}
    assert drawn["hstu"] == [2.5, 9.9] and drawn["native"] == [5.254]
    assert drawn["public native"] == [5.25, 12.99, 36.07, 114.8] and "floor" in drawn
    drawn = {line.get_label(): list(line.get_ydata()) for line in peak.lines}
    assert drawn["hstu"] == [400.0, 3600.0] and drawn["target"] == [3600]


ATTENTION = (
    {"implementation": "sm90", "direction": "forward", "tflops": 480.2, "sustained_tflops": 450.0},
    {"implementation": "sm90", "direction": "backward", "tflops": 310.0, "sustained_tflops": 300.4},
    {"implementation": "portable", "direction": "forward", "tflops": 300.0, "sustained_tflops": 290.0},
    {"implementation": "sm90", "direction": "forward", "tflops": 470.0, "lengths": "zipf", "seq_len": 4096},
    {"implementation": "sm90", "direction": "forward", "tflops": 90.0, "head_dim": 96},
    {"implementation": "sm90", "direction": "forward", "host_us": 27.6, "caller": "compiled"},
)


def test_attention_table(tmp_path: Path) -> None:
    write_results(tmp_path, "attention", *ATTENTION)
    text = tables.render("attention", tmp_path)
    causal, sustained, others = (part.splitlines() for part in text.split("\n\n")[2::2])
    assert causal[2:] == [
        "| D=96 sm90 | 90 / - |",
        "| D=256 portable | 300 / - |",
        "| D=256 sm90 | 480 / 310 |",
        "| *D=256 target* | 480 / 310 |",
        "| *D=256 public CUTLASS* | 422 / 280 |",
        "| *D=256 public Triton* | 298 / 124 |",
    ]
    assert "| D=256 sm90 | 450 / 300 |" in sustained
    assert others[0] == "|  | N=4096 |" and others[2] == "| zipf, causal, D=256 sm90 | 470 / - |"
    assert text.endswith("The host's time for one forward call: 28 µs (sm90, compiled).")


def test_attention_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_results(tmp_path, "attention", *ATTENTION)
    (heading, rows) = next(tables.results("attention", tmp_path))
    forward, backward = plots.attention(heading, rows).axes
    assert (forward.get_title(), backward.get_title()) == ("forward, D=256", "backward, D=256")
    drawn = {line.get_label(): list(line.get_ydata()) for line in forward.lines}
    assert drawn["sm90"] == [480.2] and drawn["target"] == [480, 610, 670, 670]
    assert set(drawn) == {"sm90", "portable", "target", "public CUTLASS", "public Triton"}
    with pytest.raises(SystemExit, match="nvidia-h200/attention.json"):
        plots.draw("attention", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench/results/some-gpu").rename(tmp_path / "bench/results/nvidia-h200")
    assert plots.draw("attention", tmp_path).stat().st_size > 10_000


@pytest.mark.parametrize("mask", ["causal", "targets", "window"])
def test_flops_are_those_of_live_cells(mask: str) -> None:
    problem = Problem(16, 600, mask=mask, width=32, batch=2)
    (history, _) = problem.histories()
    length, targets = history + problem.num_targets, torch.tensor([problem.num_targets])
    live = live_cells(torch.tensor([length]), length, num_targets=targets, max_attn_len=problem.window).sum().item()
    assert problem.flops("forward") == 2 * 2 * live * 32 * 2
    assert problem.flops("backward") == 2.5 * problem.flops("forward")


def test_lengths() -> None:
    zipf = Problem(64, 4096, lengths="zipf").histories()
    assert max(zipf) > 4000 and min(zipf) == 1 and sum(zipf) / len(zipf) == pytest.approx(4096 / 5, rel=0.01)
    assert sum(n * n for n in zipf) == pytest.approx(32 * 4096**2, rel=0.01)
    giant = Problem(64, 8192, lengths="giant").histories()
    assert len(giant) == 2001 and sorted(giant)[-2:] == [64, 8192] and min(giant) == 16
    assert Problem(64, 32, lengths="tiny").histories() == [32] * 10_000


def test_small_tools(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the reference for a kernel."""
    for module in (sanitize, attention_sweep):
        monkeypatch.setattr(module, "kernels", lambda: {"reference": attention_problem.Reference})
    cpu = torch.device("cpu")
    sanitize.main(cpu, (8,), torch.float32)
    assert capsys.readouterr().out == "D=8 reference: finite\n"
    monkeypatch.setattr(attention_sweep, "DEVICE", cpu)
    assert all(error < 0.01 for error in attention_sweep.check(8)["reference"].values())
    rows = attention_sweep.measure(Problem(8, 40, width=16, batch=2), seconds=0.01)
    assert [row["direction"] for row in rows] == ["forward", "backward"]
    assert all(row["tflops"] > 0 and row["sustained_ms"] > 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes a while on a GPU")
def test_paged_attention(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the CPU, with the reference for a kernel."""
    monkeypatch.setattr(paged_attention, "SECONDS", 0.01)
    paged_attention.main(["--batches", "2", "--page-sizes", "16", "--out", str(tmp_path / "paged.json")])
    assert "unpaged" in capsys.readouterr().out
    rows = [run["extra_info"] for run in json.loads((tmp_path / "paged.json").read_text())["benchmarks"]]
    assert len(rows) == 3 and all(row["ms"] > 0 for row in rows)
    paged, whole = (paged_attention.Problem(2, 30, 3, 5, 1, 16).flops(whole) for whole in (False, True))
    live = live_cells(torch.tensor([38]), 38, num_targets=torch.tensor([5]))
    assert (paged, whole) == tuple(2 * 4 * 16 * int(cells.sum()) for cells in (live[:, 30:], live))


RACES = """
========= Error: Race reported between Write access at product_kernel+0x2b0 in schedule.py:{give}
=========     and Read access at product_kernel+0x780 in schedule.py:{take} [28 hazards]
========= Error: Race reported between Read access at product_kernel+0x130 in product.py:{kernel}
=========     and Write access at product_kernel+0xfff0 in product.py:{kernel} [3 hazards]
========= Error: Race reported between Read access at product_kernel+0x130 in product.py:{inside}
=========     and Write access at product_kernel+0xfff0 in schedule.py:{take} [1 hazards]
========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)
"""


def test_races(tmp_path: Path) -> None:
    """Of a known hand-over, of Triton's dispatch, and one that is neither."""
    (tmp_path / "schedule.py").write_text("@jit\ndef hand_over():\n    1\n\n@jit\ndef take_over():\n    1\n")
    (tmp_path / "product.py").write_text("@jit\ndef product_kernel(\n    x,\n):\n    1\n")
    known, others = sanitize.judged(RACES.format(give=3, take=7, kernel=2, inside=5), tmp_path)
    assert sorted(known.values()) == [1, 1] and sanitize.DISPATCH in known
    assert len(others) == 1 and "product.py:5" in others[0]
    hazard = "= Potential {} hazard detected\n=== {} Thread (193,0,0) at\n"
    stored, overwritten = hazard.format("RAW", "    Write"), hazard.format("WAR", "    Write")
    assert sanitize.unseen_lanes(stored * 2 + overwritten.replace("193", "194")) == {0, *range(2, 32)}


def test_in_parallel() -> None:
    in_parallel(print, [])
    with pytest.raises(ZeroDivisionError):
        in_parallel(divmod, [(1, 1), (1, 0)])


def test_plain_table() -> None:
    assert show._plain(["a", "bb"], [["ccc", "d"]]).splitlines() == ["a    bb", "---  --", "ccc  d "]


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """Small and real: fused, within the budget, every implementation timed."""
    sizes = "--device cpu --batch 2 --seq-len 24 --layers 1 --heads 2 --dim 16"
    assert demo.main(sizes.split()) == 0
    out = capsys.readouterr().out
    assert "fused  attention" in out
    assert "OUT OF BUDGET" not in out and "d layers.0.uvqk.weight" in out
    for name in ("native", "inductor", "hstu"):
        assert f"│ {name}" in out or f"  {name}" in out


def test_suites_collect() -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "test_layer.py" in result.stdout and "test_attention.py" in result.stdout
