"""Full pages from the GPU to the host, behind the step that filled them, and from there into the storage."""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event as Flag

from torch import Tensor

from hstu_compile.kv_cache.layout import Key
from hstu_compile.kv_cache.storage import KVStorage
from hstu_compile.kv_cache.streams import Done, Event, Stream
from hstu_compile.ops.page_copies import HostPages, PageCopies

log = logging.getLogger("hstu_compile")


@dataclass
class Stored:
    """What is stored of one user."""

    key: Key
    first: int  # page of the history
    pages: array  # on the GPU
    memory: HostPages  # of as many pages, [num_layers, N, 2, page_size, H, D]
    is_stored: bool = False


class Offload:
    """Copies pages to host memory behind an event, in one thread, and has the storage keep it, in another.

    As an event: the copies have landed, the pages may be written again.
    """

    def __init__(
        self, storage: KVStorage, users: list[Stored], pools: Sequence[Tensor], stream: Stream, after: Event
    ) -> None:
        self.users = users
        self._storage = storage
        self._pools = pools
        self._stream = stream
        self._after = after
        self._given = Flag()  # to the stream
        self._copied: Event = Done()
        self._is_complete = False

    def copy(self) -> None:
        """The first thread's part. Launches are not few, and the step's answer does not wait for them."""
        try:
            self._stream.wait(self._after)
            self._stream.run(self._copy_out)
            self._is_complete = True
        except Exception as error:  # no memory on the GPU, for example
            log.warning("hstu_compile: pages could not be copied to the host: %s", error)
        try:
            self._copied = self._stream.record()
        finally:
            self._given.set()

    def write(self) -> None:
        """The second thread's part: it waits for the copies, and may be slow."""
        self.synchronize()
        for user in self.users if self._is_complete else ():
            try:
                self._storage.append(user.key, user.first, user.memory)
                user.is_stored = True
            except Exception as error:
                log.warning("hstu_compile: pages of user %r could not be stored: %s", user.key.user, error)

    def query(self) -> bool:
        return self._given.is_set() and self._copied.query()

    def synchronize(self) -> None:
        self._given.wait()
        self._copied.synchronize()

    def _copy_out(self) -> None:
        pages = array("i")
        for user in self.users:
            pages.extend(user.pages)
        copies = PageCopies(pages, [user.memory for user in self.users])
        for layer, pool in enumerate(self._pools):
            copies.store(pool, layer)
