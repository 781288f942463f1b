"""Users outside of the GPU: whom the storage keeps, who goes first, and copies to and from it."""

import logging
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from hstu_compile.kv_cache.counters import TierCounters
from hstu_compile.kv_cache.layout import Key
from hstu_compile.kv_cache.offload import Offload, Stored
from hstu_compile.kv_cache.onload import AtOnce, LayerwiseLoad, Loaded
from hstu_compile.kv_cache.recency import Recency
from hstu_compile.kv_cache.storage import KVStorage, StorageError
from hstu_compile.kv_cache.streams import AllOf, Event, Finished, InFlight, Stream

log = logging.getLogger("hstu_compile")


@dataclass
class _Pages:
    """How many pages of a user the storage has."""

    readable: int = 0
    taken: int = 0  # readable, being written, or to be dropped once nobody reads them


class HostKVStorageManager:
    """Whole pages of users in a `KVStorage`, up to a capacity, the least recently used users evicted whole.

    Users whose pages are being copied or written are not evicted. Bookkeeping is the host's, for one thread; writing
    the storage is done in another, and reading it in others but where it reads at once.

    Args:
        storage: keeps the pages. What it has at the start is served.
        capacity_pages: how many pages it keeps.
        max_writing_pages: how many may wait to be written; what would be more is not stored, this time.
        reader, copier, writer: what reads the storage, has pages copied to host memory, and writes it, the last two
            one after the other; None: threads of its own, and the caller for what reads at once.

    Raises:
        ValueError: a number of pages that is not positive.
    """

    def __init__(
        self,
        storage: KVStorage,
        capacity_pages: int,
        *,
        max_writing_pages: int | None = None,
        reader: Executor | None = None,
        copier: Executor | None = None,
        writer: Executor | None = None,
    ) -> None:
        self.storage = storage
        self.layout = storage.layout
        self.capacity_pages = capacity_pages
        self.max_writing_pages = capacity_pages if max_writing_pages is None else max_writing_pages
        for name in ("capacity_pages", "max_writing_pages"):
            if getattr(self, name) < 1:
                raise ValueError(f"HostKVStorageManager: {name} is {getattr(self, name)}, expected a positive number")
        self.counters = TierCounters()
        self.num_pages = 0  # taken
        self._users: dict[Key, _Pages] = {}
        self._recency = Recency()
        self._in_flight = InFlight()
        self._writing_pages = 0
        self._threads: list[Executor] = []
        self._reader = reader or (AtOnce() if storage.reads_at_once else self._thread("read", 2))
        self._copier = copier or self._thread("copy")
        self._writer = writer or self._thread("write")
        for key, pages in storage.scan():
            self._users[key] = _Pages(pages, pages)
            self.num_pages += pages
            self.touch(key)
        self._make_room(0)

    def lookup(self, key: Key) -> int:
        """How many pages of this history can be loaded."""
        pages = self._users.get(key)
        return pages.readable if pages is not None else 0

    def poll(self) -> None:
        """Take notice of work that is over."""
        self._in_flight.poll()

    def touch(self, key: Key) -> None:
        """This user is in use, on the GPU: not the next to be evicted."""
        if key in self._users:
            self._recency.hold(key)
            self._recency.release(key)

    def load(self, wanted: Iterable[tuple[Key, array]], pools: Sequence[Tensor], onload: Stream) -> LayerwiseLoad:
        """Begin to copy the first pages of histories into these pages of the pools."""
        users = [Loaded(key, len(pages), pages) for key, pages in wanted]
        load = LayerwiseLoad(self.storage, users, pools, onload)
        for user in load.users:
            self._recency.hold(user.key)
        reading = Finished(self._reader.submit(load.run))
        self._in_flight.add(AllOf([reading, load]), lambda: self._end_load(load))
        return load

    def fail(self, key: Key, valid: int | None) -> None:
        """A load failed: serve no page of this history but the first, valid ones; None: all are."""
        self.counters.failures += 1
        if valid is not None and (pages := self._users.get(key)) is not None:
            self._recency.hold(key)
            pages.readable = min(pages.readable, valid)
            self._release(key)

    def store(
        self, histories: Iterable[tuple[Key, array]], pools: Sequence[Tensor], stream: Stream, after: Event
    ) -> Event | None:
        """Have what the storage does not have of these full pages copied, after an event, and stored.

        Where it cannot be stored, that is counted and logged, and the pages will be computed again.

        Returns:
            the event of the copies having landed in host memory; None: there are none.
        """
        self.poll()
        users = [user for key, pages in histories if (user := self._reserve(key, pages)) is not None]
        if not users:
            return None
        offload = Offload(self.storage, users, pools, stream, after)
        self._copier.submit(offload.copy)
        self._in_flight.add(Finished(self._writer.submit(offload.write)), lambda: self._end_store(users))
        return offload

    def drain(self) -> None:
        """Wait until nothing is read or written."""
        while self._in_flight.wait_for_oldest():
            pass

    def close(self) -> None:
        """Finish what is being written, and stop the threads of its own."""
        self.drain()
        for threads in self._threads:
            threads.shutdown(wait=False)
        self.storage.close()

    def _thread(self, what: str, number: int = 1) -> Executor:
        self._threads.append(ThreadPoolExecutor(number, f"hstu_compile-kv-{what}"))
        return self._threads[-1]

    def _reserve(self, key: Key, pages: array) -> Stored | None:
        have = self._users.get(key, _Pages())
        count = len(pages) - have.taken
        if have.readable < have.taken or count <= 0:  # being written, or dropped while it is read: next time
            return None
        self._users[key] = have
        self._recency.hold(key)
        try:
            if self._writing_pages + count > self.max_writing_pages:
                raise StorageError(f"more than {self.max_writing_pages} pages wait to be written")
            if not self._make_room(count):
                raise StorageError(f"{count} pages more, and no users to evict, exceed {self.capacity_pages} pages")
            memory = self.storage.reserve(key, count)
        except Exception as error:
            log.info("hstu_compile: pages of user %r are not stored: %s", key.user, error)
            self.counters.failures += 1
            self._release(key)
            return None
        first, have.taken = have.taken, len(pages)
        self.num_pages += count
        self._writing_pages += count
        return Stored(key, first, pages[first:], memory)

    def _end_store(self, users: list[Stored]) -> None:
        for user in users:
            self._writing_pages -= len(user.pages)
            pages = self._users[user.key]
            if user.is_stored and pages.readable == user.first:  # else those before were dropped meanwhile
                pages.readable = pages.taken
                self.counters.bytes_written += len(user.pages) * self.layout.layer_bytes * self.layout.num_layers
            else:
                self.counters.failures += 1
            self._release(user.key)

    def _end_load(self, load: LayerwiseLoad) -> None:
        self.counters.bytes_read += load.bytes
        for user in load.users:
            self._release(user.key)

    def _release(self, key: Key) -> None:
        if self._recency.release(key):
            pages = self._users[key]
            if pages.readable < pages.taken or not pages.taken:
                self._truncate(key)

    def _make_room(self, count: int) -> bool:
        """Evict until so many pages more are within the capacity; False, and nobody is evicted: that cannot be."""
        victims = []
        room = self.capacity_pages - self.num_pages
        for key in self._recency.idle():
            if room >= count:
                break
            room += self._users[key].taken
            victims.append(key)
        if room < count:
            return False
        for key in victims:
            self._users[key].readable = 0
            self._truncate(key)
            self.counters.evictions += 1
        return True

    def _truncate(self, key: Key) -> None:
        """Have the storage keep what is readable of a user whom nobody uses."""
        pages = self._users[key]
        try:
            self.storage.truncate(key, pages.readable)
        except Exception as error:
            log.warning("hstu_compile: user %r could not be dropped from the storage: %s", key.user, error)
        self.num_pages -= pages.taken - pages.readable
        pages.taken = pages.readable
        if not pages.taken:
            del self._users[key]
            self._recency.remove(key)
