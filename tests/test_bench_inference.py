"""The benchmarks of inference, small and on the CPU: they run, write their results, and these make a table."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from bench import inference_e2e, inference_layer, inference_timeline, tables
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


def test_lanes_of_a_timeline() -> None:
    def event(
        name: str, stream: int, start: float, end: float, device: DeviceType = DeviceType.CUDA
    ) -> SimpleNamespace:
        time_range = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_resource_id=stream, device_type=device, time_range=time_range)

    events = [
        event("cudaLaunchKernel", 0, 0, 3000, DeviceType.CPU),
        event("Memcpy HtoD (Pinned -> Device)", 7, 1000, 1010),
        event("copy_pages_kernel", 7, 1011, 2100),
        event("copy_pages_kernel", 7, 2102, 3500),
        event("product_kernel", 9, 2200, 3000),
        event("product_kernel", 9, 3400, 4000),
        event("copy_pages_kernel", 8, 4100, 4200),
    ]
    named = dict(inference_timeline.lanes(events))
    assert named == {
        "onload": [[0, 2.5]],
        "compute": [[pytest.approx(1.2), 2], [pytest.approx(2.4), 3]],
        "offload": [[pytest.approx(3.1), pytest.approx(3.2)]],
    }
    assert inference_timeline.overlap(named["onload"], named["compute"]) == pytest.approx(0.9)
