"""One step of serving: which pages it reads and writes, and when they may be read."""

import time
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from hstu_compile.kv_cache.gpu import Allocation
from hstu_compile.kv_cache.onload import LayerwiseLoad
from hstu_compile.kv_cache.streams import AllOf, Event

if TYPE_CHECKING:
    from hstu_compile.kv_cache.cache import KVCache

Tier = Literal["gpu", "host", "miss"]


class LoadFailed(RuntimeError):
    """A load from the host failed, was late or corrupt; `rollback` says what is to be computed instead."""

    def __init__(self, users: dict[int | str, str]) -> None:
        self.users = users  # and why
        super().__init__(f"kv_cache: loads failed: {users}; expected rollback() and another try of the step")


class Batch:
    """What `KVCache.begin` has planned. The package's docstring is the protocol.

    Attributes:
        users: in the order given.
        lengths: history tokens of each user after this step.
        cached: of these, how many are in its pages; the step computes the others.
        tiers: where they were found.
        page_table: [max_batch_size, max_pages] int32 on the device, one address for the life of the cache.
        cached_lengths: [max_batch_size] int32, likewise.
    """

    def __init__(
        self, cache: "KVCache", allocation: Allocation, cached: list[int], tiers: list[Tier], load: LayerwiseLoad | None
    ) -> None:
        self.users: list[int | str] = [key.user for key in allocation.keys]
        self.lengths = allocation.lengths
        self.cached = cached
        self.tiers = tiers
        self.page_table: Tensor = cache.page_table
        self.cached_lengths: Tensor = cache.cached_lengths
        self._cache = cache
        self._allocation = allocation
        self._load = load
        self._deadline = time.monotonic() + cache.load_timeout
        self._waited: set[int] = set()
        self._is_published = False

    @property
    def is_open(self) -> bool:
        return self._allocation.is_open

    def pool(self, layer: int) -> Tensor:
        """[num_pages, 2, page_size, H, D] of this layer."""
        return self._cache.gpu.pools[layer]

    def publish(self) -> None:
        """Write `page_table` and `cached_lengths`, as `begin` has done."""
        self._is_published = True
        self._cache.publish(self)

    def fill(self, page_table: np.ndarray, cached_lengths: np.ndarray) -> None:
        """Write what these two are to host memory, for as many users as there are or more."""
        page_table.fill(-1)
        for b, pages in enumerate(self._allocation.pages):
            page_table[b, : len(pages)] = pages
        users = len(self.users)
        cached_lengths[:users], cached_lengths[users:] = self.cached, 0

    def wait_layer(self, layer: int) -> None:
        """Have the current stream wait until what is cached of this layer is in the pages.

        Raises:
            LoadFailed: a user's history could not be loaded.
            ValueError: there is no such layer.
            RuntimeError: the batch is committed or aborted.
        """
        self._check_open()
        if not 0 <= layer < self._cache.gpu.layout.num_layers:
            raise ValueError(f"kv_cache: layer is {layer}, expected 0 to {self._cache.gpu.layout.num_layers - 1}")
        self._waited.add(layer)
        if not self._is_loading:
            return
        assert self._load is not None and self._cache.host is not None
        given = self._load.is_given(layer)
        event = self._load.wait(layer, self._deadline - time.monotonic())
        if failed := self._load.failed():
            self._waited.clear()
            raise LoadFailed({user.key.user: user.reason for user in failed})
        assert event is not None
        if not given or not event.query():
            self._cache.host.counters.waits += 1
        self._cache.streams.compute.wait(event)

    def rollback(self) -> None:
        """Take back what could not be loaded: lowers `cached` and `cached_lengths` to what is valid.

        The storage forgets what it could not read, not what it was too slow for.

        Raises:
            RuntimeError: the batch is committed or aborted.
        """
        self._check_open()
        self._waited.clear()
        if self._load is None:
            return
        assert self._cache.host is not None
        for user in self._load.failed():
            user.known = user.valid
            b = self._allocation.keys.index(user.key)
            self.cached[b] = user.known * self._cache.gpu.layout.page_size
            self.tiers[b] = "host" if user.known else "miss"
            self._cache.host.fail(user.key, user.known if user.is_wrong else None)
        # Copies of pages that are now computed may be under way: they land before, not after.
        self._cache.streams.compute.wait(self._cache.streams.onload.record())
        if self._is_published:
            self.publish()

    def commit(self) -> None:
        """The step's tokens are valid from here on; pages that became full are copied to the host.

        Raises:
            RuntimeError: the batch is committed or aborted, or a layer of it was not waited for.
        """
        self._check_open()
        gpu = self._cache.gpu
        if self._is_loading and len(self._waited) < gpu.layout.num_layers:
            missing = sorted(set(range(gpu.layout.num_layers)) - self._waited)
            raise RuntimeError(f"kv_cache: commit() without wait_layer() of layers {missing}, expected all")
        until = [self._cache.streams.compute.record()]
        if self._load is not None:
            until.append(self._load)
        if (copied := self._store(until[0])) is not None:
            until.append(copied)
        gpu.commit(self._allocation, AllOf(until))
        token_bytes = gpu.layout.token_bytes
        gpu.counters.bytes_written += token_bytes * (sum(self.lengths) - sum(self.cached))

    def abort(self) -> None:
        """Nothing of this step has been.

        Raises:
            RuntimeError: the batch is committed or aborted.
        """
        self._check_open()
        until = [self._cache.streams.compute.record()]
        if self._load is not None:
            self._load.cancel()
            until.append(self._load)
        self._cache.gpu.abort(self._allocation, AllOf(until))

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_open:
            self.abort()

    @property
    def _is_loading(self) -> bool:
        return self._load is not None and any(user.known for user in self._load.users)

    def _store(self, computed: Event) -> Event | None:
        host = self._cache.host
        if host is None:
            return None
        page_size = self._cache.gpu.layout.page_size
        full = [
            (key, pages[: length // page_size])
            for key, pages, length in zip(self._allocation.keys, self._allocation.pages, self.lengths, strict=True)
        ]
        for key, _ in full:
            host.touch(key)
        return host.store(full, self._cache.gpu.pools, self._cache.streams.offload, computed)

    def _check_open(self) -> None:
        if not self.is_open:
            raise RuntimeError("kv_cache: this batch is committed or aborted, expected the one that is open")
