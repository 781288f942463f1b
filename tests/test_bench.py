"""The documents' tables come from the results files; the demo tells what happened; the suites collect."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import demo, show, tables

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


def test_layer_table(tmp_path: Path) -> None:
    step = {"direction": "step", "peak_mib": 1000.4}
    write_results(
        tmp_path,
        "layer",
        step | {"implementation": "native", "ms": 5.254},
        step | {"implementation": "hstu", "ms": 2.5},
        step | {"implementation": "hstu", "ms": 9.9, "recompute": ["input_silu"]},
        step | {"implementation": "hstu", "ms": 9.9, "direction": "forward"},
    )
    text = tables.rewritten("a\n<!-- bench.tables: layer -->\nold\n<!-- end -->\nb", tmp_path)
    assert "some-gpu; torch 2.11.0; 2026-01-31" in text
    assert "| N | native, ms | hstu, ms | native, peak MiB | hstu, peak MiB |" in text
    assert "| 1024 | 5.25 | 2.50 | 1000 | 1000 |" in text
    assert "old" not in text and "9.90" not in text
    assert tables.rewritten(text, tmp_path) == text


def test_attention_table(tmp_path: Path) -> None:
    write_results(
        tmp_path,
        "attention",
        {"implementation": "sm90", "direction": "forward", "tflops": 480.2},
        {"implementation": "sm90", "direction": "backward", "tflops": 310.0},
        {"implementation": "portable", "direction": "forward", "tflops": 300.0},
    )
    text = tables.render("attention", tmp_path)
    assert "| sm90, D=256 | 480 / 310 |" in text and "| portable, D=256 | 300 / - |" in text


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
