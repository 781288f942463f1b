"""The benchmark of a layer, small and on the CPU: what is measured, by which clock, what is printed and written."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import clock, layer, layer_figures, tables
from bench.clock import HEAD_START, Clock, Time
from bench.layer_problem import Measured, Problem, Variant, measure
from bench.measure import StepTimes, TrainingStep, interleaved, memory
from hstu_compile.ops import kernel_table
from tests.without_codegen import Compiled, inductor_without_codegen

CPU = torch.device("cpu")
SMALL = Problem(24, batch=2, num_heads=2, head_dim=16, dtype=torch.float32)
FLAGS = "--device cpu --batchsize 2 --num-heads 2 --dim-per-head 16 --dtype float32 --iters 2 --warmup-iters 1".split()


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    yield from inductor_without_codegen(monkeypatch)


class FakeGPU:
    """Events and sleep: every call takes the host 1 ms and the GPU 2 ms; the GPU sleeps as long as it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cycles_a_call: int) -> None:
        gpu = self
        self.cycles_a_call, self.slept, self.enqueued, self.now = cycles_a_call, [], 0, 0.0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = 2.0 * gpu.enqueued

            def query(self) -> bool:
                return gpu.enqueued * gpu.cycles_a_call > gpu.slept[-1]

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def sleep(self, cycles: int) -> None:
        self.slept.append(cycles)
        self.enqueued = 0

    def call(self) -> None:
        self.enqueued += 1
        self.now += 1e-3


def test_the_gpu_waits_for_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch, cycles_a_call=3 * HEAD_START)
    watch = Clock(torch.device("cuda"))
    times = watch.time(gpu.call, gpu.call)
    assert [time.ms for time in times] == [2.0, 2.0] and [time.host_ms for time in times] == pytest.approx([1.0, 1.0])
    assert gpu.slept == [HEAD_START * factor for factor in (1, 2, 4, 8)]
    watch.time(gpu.call)
    assert gpu.slept[-1] == 8 * HEAD_START  # it has learnt how long the host takes
    endless = FakeGPU(monkeypatch, cycles_a_call=10**12)
    with pytest.raises(RuntimeError, match="wait for the GPU"):
        watch.time(endless.call)


def test_private_functions_of_torch_are_where_they_were() -> None:
    assert callable(torch.cuda._sleep)  # bench/clock.py


def test_interleaved() -> None:
    x = torch.ones(3, requires_grad=True)
    sets = [(x, torch.tensor(i), torch.ones(3)) for i in range(2)]
    weight, seen, advanced = nn.Parameter(torch.ones(3)), [], []

    def model(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        seen.append(lengths.item())
        return x * weight

    steps = {name: TrainingStep(model, [weight], sets) for name in "ab"}
    times = interleaved(steps, CPU, 3, lambda: advanced.append(len(seen)))
    assert seen == [0, 0, 1, 1, 0, 0] and advanced == [1, 2, 3, 4, 5, 6]
    assert x.grad is None and weight.grad is None and steps["a"].out is None
    for found in times.values():
        assert 0 < found.forward.ms < found.step.ms and 0 < found.backward.ms < found.step.ms


def test_memory() -> None:
    kept = []

    def call() -> None:
        kept.append(torch.empty(2**20, dtype=torch.uint8))
        torch.empty(3 * 2**20, dtype=torch.uint8)

    found = memory(call, CPU)
    assert found.held == pytest.approx(1, abs=0.01) and found.peak == pytest.approx(4, abs=0.01)


def test_what_is_recomputed_is_not_held(inductor: Compiled) -> None:
    variants = {
        "hstu": Variant("hstu"),
        "norm": Variant("hstu", ("input_layernorm",)),
        "uvqk": Variant("hstu", ("uvqk",)),
    }
    found = measure(SMALL, variants, CPU, warm_up=1, rounds=1)
    held = {name: one.held_mib * 2**20 for name, one in found.items() if isinstance(one, Measured)}
    activation = SMALL.batch * SMALL.seq_len * 32 * 4  # bytes of [B, N, E]
    assert held["hstu"] - held["norm"] >= activation and held["hstu"] - held["uvqk"] >= 5 * activation


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(self: Variant, model: nn.Module) -> Callable:
        def native(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            if self.implementation == "inductor":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.\nMore words")
            return model(x, lengths)

        return native

    monkeypatch.setattr(Variant, "compiled", compiled)
    found = measure(SMALL, {name: Variant(name) for name in ("inductor", "native")}, CPU, warm_up=1, rounds=1)
    assert list(found) == ["inductor", "native"] and isinstance(found["native"], Measured)
    assert found["inductor"] == "inductor at N=24 does not fit: CUDA out of memory. Tried to allocate 16.00 GiB."


def test_random_lengths() -> None:
    _, lengths, _ = SMALL._replace(full=False, batch=500).inputs(CPU)
    assert lengths.min() == 1 and lengths.max() == 24
    assert SMALL.inputs(CPU)[1].tolist() == [24, 24]


def test_the_command_that_people_know(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = """run --device cpu --iters 100 --warmup-iters 50 --layer-type native --kernel-backend triton
        --dim-per-head 256 --num-heads 4 --num-layers 1 --dtype bfloat16 --max-seqlen 1024 --full-sequence True
        --batchsize 32 --recompute-input-layernorm --recompute-input-silu False"""
    asked = []

    def nothing_fits(problem: Problem, variants: dict[str, Variant], *others: object) -> dict[str, str]:
        asked.append((problem, variants, *others))
        return {name: f"{name} does not fit" for name in variants}

    monkeypatch.setattr(layer, "measure", nothing_fits)
    assert layer.main(command.split()) == 1
    assert asked[0][:5] == (Problem(1024), {"native": Variant("native")}, CPU, 50, 100)
    out = capsys.readouterr().out
    assert "native is the layer as it is" in out and "native does not fit" in out
    assert layer.main(["run", "--recompute-uvqk", "--recompute-input-silu", "True", "--full-sequence", "false"]) == 1
    assert asked[1][:2] == (Problem(1024, full=False), {"fused": Variant("hstu", ("input_silu", "uvqk"))})
    with pytest.raises(SystemExit):
        layer.main(["run", "--full-sequence", "perhaps"])


def test_run(inductor: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    command = ["run", *FLAGS, "--max-seqlen", "24", "--recompute-uvqk", "--kernel-backend", "reference"]
    assert layer.main([*command, "--json", str(file), "--snapshot", str(tmp_path / "snapshot")]) == 0
    assert kernel_table.forced is None
    out = capsys.readouterr().out
    assert "no memory snapshot" in out and "held after the forward" in out and "backward" in out
    forward, step = (benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"])
    known = {
        "implementation": "hstu",
        "recompute": ["uvqk"],
        "seq_len": 24,
        "batch": 2,
        "dropout": 0.2,
        "num_layers": 1,
    }
    assert forward.items() >= (known | {"direction": "forward"}).items() and known.items() <= step.items()
    assert 0 < forward["ms"] < step["ms"] and 0 < step["held_mib"] <= step["peak_mib"] and step["host_ms"] > 0
    assert "| hstu, uvqk recomputed |" in tables.layer([forward, step])


def test_a_kernel_that_cannot_run(inductor: Compiled) -> None:
    with pytest.raises(Exception, match="forced to run on attention_triton"):
        layer.main(["run", *FLAGS, "--max-seqlen", "24", "--kernel-backend", "triton"])


def test_sweep(inductor: Compiled, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert layer.main(["sweep", *FLAGS, "--max-seqlen", "16", "24", "--json", str(file)]) == 0
    assert "public" not in capsys.readouterr().out.split("Public figures")[0]
    rows = [benchmark["extra_info"] for benchmark in json.loads(file.read_text())["benchmarks"]]
    assert len(rows) == 2 * 2 * len(layer.SWEEP)
    assert [row["recompute"] for row in rows[::2]][3:5] == [["input_layernorm"], ["input_layernorm", "input_silu"]]
    steps = tables.layer_steps(rows)
    assert len(steps) == 2 * (len(layer.SWEEP) - 1)  # without the one in which attention alone is rewritten


def test_sweep_beside_figures() -> None:
    names = list(layer.SWEEP)
    time = Time(2.0, 1.0)
    one = Measured(None, StepTimes(time, time, Time(3.25, 1.0)), 10.0, 20.0, 30.0)  # type: ignore[arg-type]
    found = {4096: {name: "does not fit" if name == "native" else one for name in names}}
    text = layer._beside_figures(found, lambda one: f"{one.times.step.ms:.2f}", layer_figures.STEP_MS)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["4096", "ours", "-", "3.25", "3.25", "3.25", "3.25"] in lines
    text = text.replace("\n", " ")
    assert all(figure in text for figure in ("36.07", "19.18", "19.74", "15.8", "16.2"))
