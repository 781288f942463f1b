"""Storages: in memory and on disk behind one interface; what is on disk survives a restart, and damage is found."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hstu_compile.kv_cache import (
    DiskStorage,
    HostKVStorageManager,
    Key,
    KVStorage,
    MemoryStorage,
    PageLayout,
    StorageError,
)
from hstu_compile.kv_cache.free_runs import FreeRuns, pages_in, runs_of
from hstu_compile.kv_cache.onload import AtOnce

LAYOUT = PageLayout(num_layers=2, num_heads=2, head_dim=4, page_size=16, dtype=torch.bfloat16)
A, B = Key("a", 1, 0), Key(7, "w", "e")


@pytest.fixture(params=["memory", "disk"])
def storage(request, tmp_path: Path) -> KVStorage:  # type: ignore[no-untyped-def]
    return MemoryStorage(LAYOUT, 12) if request.param == "memory" else DiskStorage(LAYOUT, tmp_path)


def append(storage: KVStorage, key: Key, first: int, num_pages: int) -> Tensor:
    """Random pages [num_layers, num_pages, ...], stored."""
    pages = torch.randn(LAYOUT.num_layers, num_pages, *LAYOUT.shape).to(LAYOUT.dtype)
    reserved = storage.reserve(key, num_pages)
    reserved.memory[:, reserved.numbers] = pages
    storage.append(key, first, reserved)
    return pages


def read(storage: KVStorage, key: Key, num_pages: int) -> Tensor:
    return torch.stack([torch.cat(list(storage.read(key, layer, num_pages))) for layer in range(LAYOUT.num_layers)])


def test_pages_come_back_as_they_were(storage: KVStorage) -> None:
    first = append(storage, A, 0, 3)
    other = append(storage, B, 0, 2)
    all_pages = torch.cat([first, append(storage, A, 3, 2), append(storage, A, 5, 1)], dim=1)
    for num_pages in (1, 3, 4, 6):
        assert torch.equal(read(storage, A, num_pages), all_pages[:, :num_pages])
    assert torch.equal(read(storage, B, 2), other)


def test_truncated_users_grow_again(storage: KVStorage) -> None:
    first = append(storage, A, 0, 5)
    append(storage, A, 5, 2)
    storage.truncate(A, 3)
    more = append(storage, A, 3, 4)
    assert torch.equal(read(storage, A, 7), torch.cat([first[:, :3], more], dim=1))
    storage.truncate(A, 0)
    storage.truncate(A, 0)  # and nothing is there to drop
    again = append(storage, A, 0, 12)
    assert torch.equal(read(storage, A, 12), again)


def test_what_was_reserved_is_taken_back(storage: KVStorage) -> None:
    kept = append(storage, A, 0, 2)
    for _ in range(5):
        storage.reserve(A, 10)
        storage.truncate(A, 2)
    assert torch.equal(read(storage, A, 2), kept)


def test_memory_is_read_where_it_is_and_as_few_parts() -> None:
    storage = MemoryStorage(LAYOUT, 12)
    append(storage, A, 0, 2)
    append(storage, B, 0, 3)
    append(storage, A, 2, 7)
    assert [part.shape[0] for part in storage.read(A, 0, 9)] == [2, 7]
    storage.truncate(A, 0)
    assert [end - begin for begin, end in runs_of(storage.reserve(A, 9).numbers)] == [7, 2]
    with pytest.raises(StorageError, match="8 pages are asked for, expected at most 0"):
        storage.reserve(B, 8)


@given(data=st.data())
def test_free_pages_are_runs_of_neighbours(data: st.DataObject) -> None:
    free, held = FreeRuns(40), list[tuple[int, int]]()
    for _ in range(data.draw(st.integers(1, 40))):
        if held and data.draw(st.booleans()):
            free.give(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            count = data.draw(st.integers(0, len(free)))
            runs = free.take(count)
            assert sum(end - begin for begin, end in runs) == count
            held += runs
        pages = sorted([*free, *(page for run in held for page in range(*run))])
        assert pages == list(range(40)) and len(free) == len(list(free))
        left = sorted(free)
        longest = max((len(run) for run in _consecutive(left)), default=0)
        if longest:
            assert len(runs := free.take(longest)) == 1  # neighbours were joined
            free.give(runs[0])


def test_runs_of_pages() -> None:
    for runs in ([], [(3, 4)], [(0, 2), (5, 9)], [(7, 9), (0, 1), (3, 7)]):
        assert runs_of(pages_in(runs)) == runs
    assert runs_of(pages_in([(4, 6), (6, 7)])) == [(4, 7)]


def _consecutive(pages: list[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][-1] == page - 1:
            runs[-1].append(page)
        else:
            runs.append([page])
    return runs


def test_a_piece_comes_from_the_shortest_run_that_has_it() -> None:
    free = FreeRuns(20)
    first, between, second, _ = (free.take(n)[0] for n in (5, 1, 3, 1))
    free.give(first)
    free.give(second)
    assert [free.take(n) for n in (3, 4, 11)] == [[second], [(0, 4)], [(10, 20), (4, 5)]]
    assert between == (5, 6) and len(free) == 0


def test_pages_on_disk_survive_a_restart(tmp_path: Path) -> None:
    """Read in another process, which knows nothing but the directory."""
    storage = DiskStorage(LAYOUT, tmp_path)
    pages = torch.cat([append(storage, A, 0, 3), append(storage, A, 3, 2)], dim=1)
    append(storage, B, 0, 4)
    storage.truncate(B, 1)
    torch.save(pages, tmp_path.parent / "pages.pt")
    code = f"""
import torch
from hstu_compile.kv_cache import HostKVStorageManager
from tests.test_kv_cache_storage import A, B, LAYOUT, DiskStorage, read
host = HostKVStorageManager(DiskStorage(LAYOUT, {str(tmp_path)!r}), 100)
assert (host.lookup(A), host.lookup(B), host.num_pages) == (5, 1, 6)
assert torch.equal(read(host.storage, A, 5), torch.load({str(tmp_path.parent / "pages.pt")!r}))
host.close()
"""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": ".", "PATH": ""}, check=True)


def test_a_restart_evicts_what_exceeds_the_capacity(tmp_path: Path) -> None:
    storage = DiskStorage(LAYOUT, tmp_path)
    append(storage, A, 0, 3)
    append(storage, B, 0, 3)
    host = HostKVStorageManager(DiskStorage(LAYOUT, tmp_path), 4, reader=AtOnce(), copier=AtOnce(), writer=AtOnce())
    assert sorted([host.lookup(A), host.lookup(B)]) == [0, 3] and host.counters.evictions == 1
    assert len(list(tmp_path.rglob("*.kv"))) == 1


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "a bit of the last page":
        content[-1] ^= 1
    elif how == "a bit of the first page of the last layer":
        content[-3 * LAYOUT.layer_bytes] ^= 16
    elif how == "a bit of the header":
        content[60] ^= 1
    elif how == "cut":
        del content[-LAYOUT.layer_bytes - 5 :]
    elif how == "empty":
        content.clear()
    elif how == "garbage":
        content[:] = bytes(range(256)) * 4
    path.write_bytes(content)


DAMAGE = {
    "a bit of the last page": 2,
    "a bit of the first page of the last layer": 0,
    "a bit of the header": 0,
    "cut": 1,
    "empty": 0,
    "garbage": 0,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_on_disk_is_found(how: str, tmp_path: Path) -> None:
    storage = DiskStorage(LAYOUT, tmp_path)
    before = append(storage, A, 0, 2)
    pages = torch.cat([before, append(storage, A, 2, 3)], dim=1)
    damage(next(path for path in tmp_path.iterdir() if path.is_dir()) / "00000002-00000003.kv", how)
    with pytest.raises(StorageError) as error:
        read(storage, A, 5)
    valid = error.value.valid_pages
    assert valid == 2 + DAMAGE[how]
    assert torch.equal(read(storage, A, valid), pages[:, :valid])
    storage.truncate(A, valid)
    after_restart = DiskStorage(LAYOUT, tmp_path)
    assert list(after_restart.scan()) == [(A, valid)]
    more = append(after_restart, A, valid, 1)
    assert torch.equal(read(after_restart, A, valid + 1), torch.cat([pages[:, :valid], more], dim=1))


def test_a_restart_deletes_what_cannot_be_read_or_does_not_follow(tmp_path: Path) -> None:
    storage = DiskStorage(LAYOUT, tmp_path)
    append(storage, A, 0, 2)
    append(storage, A, 2, 1)
    append(storage, A, 3, 1)
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    damage(folder / "00000002-00000001.kv", "a bit of the header")
    (folder / "00000002-00000001.part").write_bytes(b"half of a file")
    assert list(DiskStorage(LAYOUT, tmp_path).scan()) == [(A, 2)]
    assert [path.name for path in folder.iterdir()] == ["00000000-00000002.kv"]


def test_another_layout_is_refused(tmp_path: Path) -> None:
    DiskStorage(LAYOUT, tmp_path)
    with pytest.raises(ValueError, match="the layout of .* is .*bfloat16.*, expected .*float16"):
        DiskStorage(PageLayout(2, 2, 4, 16, torch.float16), tmp_path)
