"""Random traffic over a KV cache: evictions, delays, failures, changed histories, each checked against a dict."""

import copy
from collections.abc import Sequence
from random import Random

import pytest
from torch import Tensor

from hstu_compile.kv_cache import CapacityError, HostKVStorageManager, HostPages, Key, KVCache, PageLayout, StorageError
from hstu_compile.kv_cache.onload import AtOnce
from tests.kv_cache_steps import LAYOUT, Later, PoisonedGpu, PoisonedMemory, Server, late_streams

USERS, NUM_PAGES, MAX_BATCH, MAX_LEN = 4, 10, 2, 70


class Unreliable(PoisonedMemory):
    """Fails when the test says so, and finds damage where the test says there is some."""

    reads_at_once = False
    is_broken = False

    def __init__(self, layout: PageLayout, num_pages: int) -> None:
        super().__init__(layout, num_pages)
        self.damaged: set[int] = set()

    def reserve(self, key: Key, num_pages: int) -> HostPages:
        memory = super().reserve(key, num_pages)
        self.damaged -= set(memory.numbers.tolist())
        return memory

    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        if self.is_broken and layer:
            raise ConnectionError("lost")
        for valid, page in enumerate(self._numbers[key][:num_pages].tolist() if layer else ()):
            if page in self.damaged:
                raise StorageError("not what was written", valid_pages=valid)
        return super().read(key, layer, num_pages)


class Reader(AtOnce):
    """Reads at once, or hangs until the test ends that."""

    def __init__(self) -> None:
        self.hangs = False
        self.later = Later()

    def submit(self, work, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        return (self.later if self.hangs else super()).submit(work, *args, **kwargs)


class Traffic:
    """Operations on a cache, each checked against a dict of what was committed."""

    def __init__(self, host_pages: int) -> None:
        self.reader, self.writer = Reader(), Later()
        self.gpu = PoisonedGpu(LAYOUT, NUM_PAGES, "cpu")
        self.host = None
        if host_pages:
            self.storage = Unreliable(LAYOUT, host_pages)
            self.host = HostKVStorageManager(
                self.storage, host_pages, reader=self.reader, copier=AtOnce(), writer=self.writer
            )
        self.streams = late_streams()
        self.cache = KVCache(
            self.gpu, self.host, max_batch_size=MAX_BATCH, max_seq_len=MAX_LEN, load_timeout=0, streams=self.streams
        )
        self.server = Server(self.cache)
        self.committed: dict[Key, int] = {}  # tokens
        self.epochs = [0] * USERS
        self.held: list[Key] = []

    def key(self, user: int, version: int = 0) -> Key:
        return Key(user, version, self.epochs[user])

    def step(self, rng: Random) -> None:
        """A batch, committed or aborted, perhaps computed twice."""
        users = rng.sample(range(USERS), rng.randint(1, MAX_BATCH))
        version = rng.choice([0, 0, 0, 1])
        keys = [self.key(user, version) for user in users]
        lengths = [min(MAX_LEN, self.committed.get(key, 0) + rng.choice([0, 1, 7, 16, 31, 40])) for key in keys]
        before, on_gpu = self.pages_of_users(), {key: self.gpu.lookup(key) for key in keys}
        epochs = [key.epoch for key in keys]
        try:
            batch = self.cache.begin(users, lengths, version=version, epochs=epochs)
        except CapacityError:
            assert self.pages_of_users() == before
            assert self.held or sum(map(LAYOUT.pages, lengths)) > NUM_PAGES
            return
        for b, key in enumerate(keys):
            assert not on_gpu[key] or batch.cached[b] == on_gpu[key] == self.committed[key]
            assert batch.cached[b] <= self.committed.get(key, 0)
        assert all(self.gpu.lookup(key) for key in self.held)
        with batch:
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                self.server.compute(batch, version, epochs)
                self.time_passes(rng)
            if rng.random() < 0.8:
                self.server.compute(batch, version, epochs)
                batch.commit()
                on_gpu = dict(zip(keys, lengths, strict=True))
                self.committed |= {key: length for key, length in on_gpu.items() if length}
        assert all(self.gpu.lookup(key) == length for key, length in on_gpu.items())

    def something_else(self, rng: Random) -> None:
        rng.choice([self.time_passes, self.time_passes, self.storage_changes, self.history_changes, self.refused])(rng)
        rng.choice([self.time_passes, self.hold, self.release])(rng)

    def time_passes(self, rng: Random) -> None:
        """Streams do some of their work, the thread that writes all of its."""
        for stream in (self.streams.compute, self.streams.onload, self.streams.offload):
            stream.advance(stream.done + rng.choice([0, 0, 1, 5, 1000]))
        if rng.random() < 0.5:
            self.writer.run_all()

    def storage_changes(self, rng: Random) -> None:
        """A page is damaged; from here on it answers, or fails, or hangs."""
        self.reader.hangs = rng.random() < 0.15
        if self.host is not None:
            self.storage.is_broken = rng.random() < 0.2
            if stored := [page for pages in self.storage._numbers.values() for page in pages.tolist()]:
                self.storage.damaged.add(rng.choice(stored))
        if rng.random() < 0.5:
            self.reader.later.run_all()

    def history_changes(self, rng: Random) -> None:
        self.epochs[rng.randrange(USERS)] += 1

    def refused(self, rng: Random) -> None:
        """A shorter history, a user twice."""
        user = rng.randrange(USERS)
        known = self.gpu.lookup(self.key(user))
        users, lengths = ([user], [known - rng.randint(1, 40)]) if known else ([user, user], [60, 60])
        before = self.pages_of_users()
        with pytest.raises(ValueError):
            self.cache.begin(users, lengths, version=0, epochs=[self.epochs[user] for user in users])
        assert self.pages_of_users() == before

    def hold(self, rng: Random) -> None:
        key = self.key(rng.randrange(USERS))
        if self.gpu.lookup(key) and len(self.held) < 2:
            self.gpu.hold(key)
            self.held.append(key)

    def release(self, rng: Random) -> None:
        if self.held:
            assert self.gpu.lookup(self.held[0]) == self.committed[self.held[0]]
            self.gpu.release(self.held.pop(0))

    def pages_of_users(self) -> dict[Key, tuple[int, list[int]]]:
        self.gpu.poll()
        return copy.deepcopy({k: (h.length, list(h.pages)) for k, h in self.gpu._histories.items()})

    def check(self) -> None:
        assert not self.server.wrong
        gpu = self.gpu
        gpu.poison()
        owned = [page for history in gpu._histories.values() for page in history.pages]
        assert gpu.num_owned == len(owned) == len(set(owned))
        assert not set(owned) & set(gpu._free) and len(set(gpu._free)) == gpu.num_free
        assert gpu.num_free + gpu.num_owned + gpu.num_in_flight == NUM_PAGES and gpu.num_in_flight >= 0
        assert all(len(h.pages) == LAYOUT.pages(h.length) for h in gpu._histories.values())
        idle = [key for key in gpu._histories if not gpu._recency.is_held(key)]
        assert gpu._evictable == sum(len(gpu._histories[key].pages) for key in idle)
        assert set(gpu._recency.idle()) == set(idle)
        if self.host is not None:
            stored = [page for pages in self.storage._numbers.values() for page in pages.tolist()]
            stored += [page for pages in self.storage._reserved.values() for page in pages.tolist()]
            assert len(set(stored)) == len(stored) == self.host.num_pages <= self.host.capacity_pages
            assert len(stored) + len(self.storage._free) == self.storage.num_pages
            assert self.host.num_pages == sum(pages.taken for pages in self.host._users.values())
            assert all(pages.readable <= LAYOUT.pages(MAX_LEN) for pages in self.host._users.values())

    def end(self) -> None:
        while self.held:
            self.gpu.release(self.held.pop())
        self.reader.later.run_all()
        self.gpu.drain()
        self.writer.run_all()
        for stream in (self.streams.compute, self.streams.onload, self.streams.offload):
            stream.advance(len(stream.work))
        if self.host is not None:
            self.host.drain()
            assert not self.host._recency._references
        assert self.gpu.num_in_flight == 0 and not self.gpu._recency._references
        assert not self.server.wrong
