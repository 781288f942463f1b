"""The benchmarks of inference, small and on the CPU: they run, write their results, and these make a table."""

import json
from pathlib import Path

import pytest

from bench import inference_e2e, inference_layer, tables
from tests.without_codegen import inductor_without_codegen

compiles = pytest.fixture(inductor_without_codegen)
SMALL = (
    "--device cpu --batch 2 --seq-len 48 --candidates 4 --num-layers 2 --num-heads 2 --head-dim 16 --max-batch 4 "
    "--max-seq-len 64 --page-size 16 --rounds 2 --warm-up 1"
).split()


def test_block_and_model(tmp_path: Path, compiles, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "bench/results/some-gpu/inference.json"
    results.parent.mkdir(parents=True)
    inference_layer.main([*SMALL, "--cached", "0", "0.5", "--json", str(results)])
    for _ in range(2):  # the second takes the place of the first
        inference_e2e.main([*SMALL, "--history", "8", "--json", str(results)])
    rows = [benchmark["extra_info"] for benchmark in json.loads(results.read_text())["benchmarks"]]
    assert [row["what"] for row in rows] == ["block"] * 10 + ["model"] * 5
    assert {row["tier"] for row in rows if row["what"] == "model"} == {None, "gpu", "host", "miss"}
    assert all(row["p99_ms"] >= row["p50_ms"] > 0 for row in rows)
    host = next(row for row in rows if row["tier"] == "host")
    assert host["cached"] == 48 - 12
    assert "host: TierCounters(hits=" in capsys.readouterr().out
    table = tables.render("inference", tmp_path)
    assert "| 2 | 48 | 24 | 4 |" in table and "in host memory, graph" in table
