"""A soak, small and on the CPU: it repeats itself, and finds a cache that serves what it must not."""

import json
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bench import soak
from bench.soak_checks import Violation
from bench.soak_traffic import FailingMemory, Traffic
from hstu_compile.kv_cache import GpuKVCacheManager, Key
from hstu_compile.serving import Engine
from hstu_compile.serving import engine as engine_module

SMALL = (
    "--device cpu --users 60 --num-layers 1 --max-batch 3 --max-seq-len 48 --check-every 5 --reload-every 40 "
    "--faults 0.3 --settled"
).split()
TIMES = {"seconds", "requests_per_s", "p50_ms", "p99_ms"}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewritten graph as it is: Inductor would take most of the time."""
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)


def test_a_seed_is_a_run(tmp_path: Path) -> None:
    results, runs = tmp_path / "soak.json", []
    for _ in range(2):
        row = soak.main([*SMALL, "--requests", "100", "--json", str(results)])
        assert json.loads(results.read_text())["benchmarks"][0]["extra_info"] == row
        assert row["p99_ms"] >= row["p50_ms"] > 0
        runs.append({name: value for name, value in row.items() if name not in TIMES})
    assert runs[0] == runs[1]
    row = runs[0]
    assert row["requests"] == 100 and row["samples"] == 20 and row["reloads"] == 2
    assert all(row[name] > 0 for name in ("gpu_hit_rate", "host_hit_rate", "miss_rate", "histories_changed"))
    assert row["gpu_evictions"] and row["host_evictions"] and row["failures"] >= row["reads_failed"] > 0
    assert 0 < row["worst_of_budget"] <= 1


def test_the_time_is_bounded() -> None:
    assert soak.main([*SMALL, "--requests", "1000000", "--seconds", "0"])["requests"] == 1


def test_every_fault_and_every_kind_of_history_comes() -> None:
    traffic = Traffic(0, num_users=60, zipf=1.0, max_batch=3, max_seq_len=48, num_layers=2, faults=0.3)
    requests = [traffic.request() for _ in range(3000)]
    assert {r.fault.kind for r in requests if r.fault} == {"raises", "damaged", "short", "late"}
    assert any(r.changed for r in requests) and {len(r.users) for r in requests} == {1, 2, 3}
    assert {0, 42} <= {n for r in requests for n in r.histories} and 0 in {n for r in requests for n in r.targets}
    for users, histories, targets, (items, offsets, counts, longest), _, _ in requests:
        lengths = [h + n for h, n in zip(histories, targets, strict=True)]
        assert len(set(users)) == len(users) and offsets.diff().tolist() == lengths and len(items) == sum(lengths)
        assert counts.tolist() == targets and longest == 48 >= max(lengths)


def other_pages(self: FailingMemory, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
    """Not those of the user, and no error."""
    return [self._memory[layer, :num_pages].nan_to_num() + 1.0]


def same_version(self: Engine, state: dict[str, Tensor]) -> None:
    self.model.load_state_dict(state)


def lost_page(self: GpuKVCacheManager, count: int, take: Any = GpuKVCacheManager._take) -> array:
    taken = take(self, count)
    self._free = self._free[1:]
    return taken


WRONG = {
    "what is loaded": (FailingMemory, "read", other_pages, "the answer is not that of the model without a cache"),
    "weights": (Engine, "reload", same_version, "tokens of .* were cached, expected at most 0"),
    "history": (Engine, "forget", lambda self, user: None, "expected"),
    "pages": (GpuKVCacheManager, "_take", lost_page, "pages in flight is"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, message = WRONG[what]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(Violation, match=f"request .*, seed 0, .*{message}"):
        soak.main([*SMALL, "--requests", "300"])
