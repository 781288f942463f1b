"""Memory snapshots: how a step's allocations are read out of them, and that torch still writes them that way."""

import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import layer, memory
from bench.memory import Block, timeline

MIB = 2**20


def entry(action: str, addr: int = 0, size: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size * MIB, "stream": 0}


HISTORY = [
    entry("segment_alloc", 1, 99),
    entry("alloc", 1, 4),
    entry("free_requested", 9, 7),  # held since before the step
    entry("free_completed", 9, 7),
    entry("alloc", 2, 2),
    entry("free_requested", 1, 4),
    entry("free_completed", 1, 4),
    entry("alloc", 1, 1),  # the same address again
    entry("snapshot"),
    entry("alloc", 3, 8),
    entry("free_requested", 2, 2),
    entry("snapshot"),
]
SNAPSHOT = {"segments": [], "device_traces": [[], HISTORY]}


def test_timeline() -> None:
    found = timeline(SNAPSHOT)
    blocks = [Block(4, 0, 2), Block(2, 1, 5), Block(1, 3, 6), Block(8, 4, 6)]
    assert found.blocks == [block._replace(size=block.size * MIB) for block in blocks]
    assert (found.events, found.backward) == (6, 4)
    assert found.held() == [size * MIB for size in (4, 6, 2, 3, 11, 9)]


@pytest.mark.parametrize(
    "snapshot, words",
    [
        ({"segments": []}, "has no history"),
        ({"device_traces": [[entry("snapshot")]]}, "has no history"),
        ({"device_traces": [HISTORY[:3]]}, "has no mark between forward and backward"),
    ],
)
def test_what_is_no_step(snapshot: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        timeline(snapshot)


def test_files_that_are_no_snapshots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    for content in (b"x", pickle.dumps({"device_traces": []})):
        file.write_bytes(content)
        with pytest.raises(SystemExit):
            memory.main([str(file)])
        assert str(file) in capsys.readouterr().err


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("native", "hstu"):
        (tmp_path / f"{name}.pickle").write_bytes(pickle.dumps(SNAPSHOT))
    picture = tmp_path / "memory.png"
    memory.main([str(tmp_path / "native.pickle"), str(tmp_path / "hstu.pickle"), "--out", str(picture)])
    assert picture.stat().st_size > 10_000
    native, hstu = memory.draw({"native": timeline(SNAPSHOT), "hstu": timeline(SNAPSHOT)}).axes
    assert native.get_title() == "native\nheld after the forward 3 MiB, peak 11 MiB"
    total, boundary = hstu.lines
    assert list(total.get_ydata()) == [4, 6, 2, 3, 11, 9] and list(boundary.get_xdata()) == [4, 4]


def test_private_functions_of_torch_are_what_they_were() -> None:
    functions = torch.cuda.memory
    assert {"enabled", "stacks"} <= inspect.signature(functions._record_memory_history).parameters.keys()
    assert "filename" in inspect.signature(functions._dump_snapshot).parameters
    document = functions._snapshot.__doc__ or ""
    assert all(f'"{action}"' in document for action in ("alloc", "free_requested", "snapshot"))
    assert "device_traces" in document


@pytest.mark.cuda
def test_snapshot_of_a_step(tmp_path: Path) -> None:
    flags = "--device cuda --batchsize 2 --num-heads 2 --dim-per-head 64 --num-layers 2 --max-seqlen 256 --iters 2"
    file = tmp_path / "native.pickle"
    command = ["run", *flags.split(), "--layer-type", "native", "--warmup-iters", "2", "--snapshot", str(file)]
    assert layer.main(command) == 0
    found = timeline(pickle.loads(file.read_bytes()))
    held = found.held()
    assert 0 < found.backward < found.events
    assert held[found.backward - 1] >= 2 * 2 * 256 * 256 * 2 * 2  # both layers' scores
    assert held[-1] < held[found.backward - 1] / 10  # a step leaves nothing behind
