"""A load from the host that fails, is late or finds damage: computed again, never served. And an offload that fails."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from hstu_compile.kv_cache import (
    DiskStorage,
    GpuKVCacheManager,
    HostKVStorageManager,
    HostPages,
    Key,
    KVCache,
    LoadFailed,
    StorageError,
)
from tests.kv_cache_steps import LAYOUT, Later, LateStream, PoisonedMemory, Server, evict, late_server

PAGE = LAYOUT.page_size


class Failing(PoisonedMemory):
    """Fails for user 1 from layer 1 on, where more than `valid` pages are read."""

    error: Exception | None = None
    valid = 0

    reads_at_once = False

    def read(self, key, layer, num_pages):  # type: ignore[no-untyped-def]
        if self.error is not None and key.user == 1 and layer and num_pages > self.valid:
            raise self.error
        return super().read(key, layer, num_pages)


FAILURES: dict[str, tuple[Exception, int]] = {
    "the connection": (ConnectionError("lost"), 0),
    "a page": (StorageError("page 2 is not what was written", valid_pages=2), 2),
    "an error that is wrong": (StorageError("what?", valid_pages=99), 3),
}


@pytest.mark.parametrize("name", FAILURES)
def test_promise_5_a_failed_load_is_computed_again(name: str) -> None:
    storage = Failing(LAYOUT, 30)
    server = late_server(8, storage)
    server.step([1, 2], [4 * PAGE + 3, PAGE])
    evict(server)
    storage.error, storage.valid = FAILURES[name]
    batch = server.cache.begin([1, 2], [4 * PAGE + 3, PAGE + 5], version=0)
    assert batch.cached == [4 * PAGE, PAGE]
    with pytest.raises(LoadFailed) as failed:
        for layer in range(LAYOUT.num_layers):
            batch.wait_layer(layer)
    assert list(failed.value.users) == [1]
    batch.rollback()
    assert batch.cached == [storage.valid * PAGE, PAGE]
    server.compute(batch)
    batch.commit()
    storage.error = None
    server.time_passes()
    evict(server)  # what is stored is right again
    assert server.step([1], [4 * PAGE + 3]).cached[0] >= storage.valid * PAGE
    server.time_passes()
    assert not server.wrong and server.cache.counters["host"].failures >= 1


def test_promise_5_a_plan_whose_load_fails() -> None:
    """The tables that the caller writes say what is valid, and the cache writes none."""
    storage = Failing(LAYOUT, 30)
    server = late_server(8, storage)
    server.step([1, 2], [4 * PAGE + 3, PAGE])
    evict(server)
    storage.error = ConnectionError("lost")
    published = server.cache.page_table.clone()
    with server.cache.plan([1, 2], [4 * PAGE + 3, PAGE + 5], version=0) as batch:
        with pytest.raises(LoadFailed):
            for layer in range(LAYOUT.num_layers):
                batch.wait_layer(layer)
        batch.rollback()
        table, lengths = (np.empty(x.shape, np.int32) for x in (server.cache.page_table, server.cache.cached_lengths))
        batch.fill(table, lengths)
        server.cache.streams.compute.advance(10**9)  # type: ignore[attr-defined]
    assert lengths.tolist() == [0, PAGE, 0, 0] and torch.equal(server.cache.page_table, published)
    assert ((table >= 0).sum(1) == [5, 2, 0, 0]).all()


def test_promise_5_a_late_load_is_computed_again_and_its_copies_never_land() -> None:
    reader = Later()
    server = late_server(4, PoisonedMemory(LAYOUT, 10), reader=reader)
    server.step([1], [2 * PAGE])
    evict(server)
    batch = server.cache.begin([1], [2 * PAGE], version=0)
    assert batch.tiers == ["host"]
    server.compute(batch)
    assert (batch.cached, batch.tiers) == ([0], ["miss"])
    batch.commit()
    reader.run_all()  # now it comes
    assert server.step([1], [2 * PAGE]).cached == [2 * PAGE]
    server.time_passes()
    assert not server.wrong
    assert server.cache.host is not None and server.cache.host.lookup(Key(1, 0, 0)) == 2  # it was late, not wrong


def test_promise_5_copies_under_way_land_before_the_recomputed_tokens() -> None:
    storage = Failing(LAYOUT, 10)
    server = late_server(4, storage)
    server.step([1], [3 * PAGE])
    evict(server)
    storage.error = OSError("gone")  # of layer 1; layer 0 is under way
    storage._memory[0].zero_()  # and would be seen
    server.step([1], [3 * PAGE])
    server.cache.streams.compute.advance(10**9)
    server.cache.streams.onload.advance(10**9)
    storage.error = None
    assert server.step([1], [3 * PAGE]).tiers == ["gpu"]
    server.time_passes()
    assert not server.wrong


def test_promise_5_nothing_is_copied_once_a_load_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    """The step is aborted while the storage reads."""

    class Slow(PoisonedMemory):
        reads_at_once = False

        def read(self, key, layer, num_pages):  # type: ignore[no-untyped-def]
            batch.abort()
            return super().read(key, layer, num_pages)

    reader = Later()
    server = late_server(2, Slow(LAYOUT, 10), reader=reader)
    server.step([1], [2 * PAGE])
    evict(server)
    batch = server.cache.begin([1], [2 * PAGE], version=0)
    given = len(server.cache.streams.onload.work)  # type: ignore[attr-defined]
    reader.run_all()
    assert not batch.is_open and len(server.cache.streams.onload.work) == given  # type: ignore[attr-defined]
    assert not caplog.records  # it has not failed
    server.step([2], [2 * PAGE])  # in the same pages
    server.time_passes()
    assert not server.wrong


def test_promise_5_pages_behind_those_that_were_dropped_are_dropped() -> None:
    """Pages 2 and 3 are being written when page 0 turns out to be damaged."""
    storage = Failing(LAYOUT, 40)
    server = late_server(4, storage)
    server.step([1], [2 * PAGE])
    evict(server)
    server.step([1], [4 * PAGE])
    for stream in (server.cache.streams.compute, server.cache.streams.offload):
        stream.advance(10**9)  # type: ignore[attr-defined]
    server.step(["another"], [4 * PAGE], version="other")
    storage.error, storage.valid = StorageError("damaged"), 0
    assert server.step([1], [4 * PAGE]).cached == [0]
    storage.error = None
    server.time_passes()
    assert server.cache.host is not None and server.cache.host.lookup(Key(1, 0, 0)) == 0
    assert server.step([1], [4 * PAGE]).tiers == ["gpu"]
    server.time_passes()
    assert server.cache.host.lookup(Key(1, 0, 0)) == 4  # it is stored again
    assert not server.wrong


def test_promise_5_corrupt_files_are_computed_again(tmp_path) -> None:  # type: ignore[no-untyped-def]
    server = late_server(5, DiskStorage(LAYOUT, tmp_path))
    server.step([1], [5 * PAGE])
    evict(server)
    (path,) = [
        path for path in tmp_path.rglob("*.kv") if path.stem.endswith("5") and "another" not in path.read_text("latin1")
    ]
    content = bytearray(path.read_bytes())
    content[-LAYOUT.layer_bytes - 1] ^= 1  # the last page but one of the last layer
    path.write_bytes(content)
    batch = server.step([1], [5 * PAGE])
    server.time_passes()
    assert batch.cached == [3 * PAGE] and not server.wrong


def test_a_copy_to_the_host_that_fails_costs_nothing_but_the_pages_there() -> None:
    class NoRoom(PoisonedMemory):
        def reserve(self, key, num_pages):  # type: ignore[no-untyped-def]
            memory, numbers = super().reserve(key, num_pages)
            return HostPages(memory[:, :, :, :, :, :1], numbers)  # of a wrong shape

    server = late_server(2, NoRoom(LAYOUT, 10))
    server.cache = KVCache(server.cache.gpu, server.cache.host, max_batch_size=4, max_seq_len=600)  # plain streams
    server.step([1], [2 * PAGE])
    server.time_passes()
    host = server.cache.host
    assert host is not None and host.lookup(Key(1, 0, 0)) == 0
    assert (host.num_pages, host.counters.failures) == (0, 1)
    assert server.step([2], [2 * PAGE]).tiers == ["miss"] and server.step([1], [2 * PAGE]).tiers == ["miss"]
    assert not server.wrong


class OneTooFew(PoisonedMemory):
    """User 1 gets a page less, user 2 one more: together as many as were asked for."""

    def read_all(self, key, num_pages):  # type: ignore[no-untyped-def]
        memory, numbers = super().read_all(key, num_pages)
        return HostPages(memory, numbers[:-1] if key.user == 1 else numbers[[*range(num_pages), 0]])


class OfAnotherType(PoisonedMemory):
    def read_all(self, key, num_pages):  # type: ignore[no-untyped-def]
        memory, numbers = super().read_all(key, num_pages)
        return HostPages(memory.half(), numbers)


class FromOutside(PoisonedMemory):
    def read_all(self, key, num_pages):  # type: ignore[no-untyped-def]
        memory, numbers = super().read_all(key, num_pages)
        return HostPages(memory, numbers + memory.shape[1])


class OfAnotherShape(PoisonedMemory):
    def read_all(self, key, num_pages):  # type: ignore[no-untyped-def]
        memory, numbers = super().read_all(key, num_pages)
        return HostPages(memory.transpose(2, 3), numbers)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("kind", [OneTooFew, OfAnotherType, OfAnotherShape, FromOutside])
def test_promise_5_what_was_not_asked_for_is_not_served(kind: type[PoisonedMemory], at_once: bool) -> None:
    storage = kind(LAYOUT, 40)
    storage.reads_at_once = at_once
    server = late_server(8, storage)
    server.step([1, 2], [3 * PAGE, 3 * PAGE])
    evict(server)
    batch = server.cache.begin([1, 2], [3 * PAGE, 3 * PAGE], version=0)
    with pytest.raises(LoadFailed) as failed:
        batch.wait_layer(0)
    assert set(failed.value.users) == {1, 2} and all("were read" in why for why in failed.value.users.values())
    batch.abort()


class OutOfMemory(LateStream):
    """Fails after some of the work was given to it."""

    def run(self, work: Callable[[], object]) -> None:
        super().run(work)
        raise torch.OutOfMemoryError


def test_copies_under_way_when_others_fail_keep_their_pages() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 20))
    gpu = server.cache.gpu
    server.step([1], [2 * PAGE])
    evict(server)
    late = server.cache.streams
    server.cache.streams = replace(late, onload=OutOfMemory())
    with server.cache.begin([1], [3 * PAGE], version=0) as batch, pytest.raises(LoadFailed, match="OutOfMemory"):
        batch.wait_layer(0)
    late.compute.advance(10**9)  # type: ignore[attr-defined]
    gpu.poll()
    assert gpu.num_in_flight == 3
    server.time_passes()
    assert gpu.num_in_flight == 0
    server.cache.streams = late
    assert server.step([1], [3 * PAGE]).tiers == ["host"]  # it was not the storage
    server.time_passes()
    assert not server.wrong


def test_a_load_is_cancelled_where_begin_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Later()
    server = late_server(4, PoisonedMemory(LAYOUT, 20), reader=reader)
    server.step([1], [2 * PAGE])
    evict(server)

    def fail(*args: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(server.cache, "publish", fail)
        server.cache.begin([1], [2 * PAGE], version=0)
    given = len(server.cache.streams.onload.work)  # type: ignore[attr-defined]
    reader.run_all()
    assert len(server.cache.streams.onload.work) == given  # type: ignore[attr-defined]
    server.step([2], [4 * PAGE])
    server.time_passes()
    assert not server.wrong and server.cache.gpu.num_in_flight == 0


def test_commit_without_having_waited_is_refused() -> None:
    server = late_server(4, PoisonedMemory(LAYOUT, 10))
    server.step([1], [2 * PAGE])
    evict(server)
    with server.cache.begin([1], [2 * PAGE], version=0) as batch:
        batch.wait_layer(0)
        with pytest.raises(RuntimeError, match=r"wait_layer\(\) of layers \[1, 2\]"):
            batch.commit()


@pytest.mark.parametrize("at_once", [True, False])
def test_which_thread_reads(at_once: bool) -> None:
    """The one that serves, where nothing is waited for: all layers are given to the streams when `begin` returns."""

    class Watched(PoisonedMemory):
        reads_at_once = at_once
        readers: set[int]

        def read_all(self, key, num_pages):  # type: ignore[no-untyped-def]
            self.readers.add(threading.get_ident())
            return super().read_all(key, num_pages)

    storage = Watched(LAYOUT, 30)
    storage.readers = set()
    host = HostKVStorageManager(storage, 30)
    server = Server(KVCache(GpuKVCacheManager(LAYOUT, 8, "cpu"), host, max_batch_size=2, max_seq_len=8 * PAGE))
    server.step([1, 2], [4 * PAGE + 3, PAGE])
    server.cache.gpu.drain()
    host.drain()
    evict(server)
    assert server.step([1, 2], [4 * PAGE + 3, PAGE + 5]).tiers == ["host", "host"] and not server.wrong
    assert (storage.readers == {threading.get_ident()}) == at_once and storage.readers
    server.cache.close()
