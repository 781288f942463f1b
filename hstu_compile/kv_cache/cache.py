"""The cache that serving uses: pages on the GPU, and the host behind them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_compile.kv_cache.batch import Batch, Tier
from hstu_compile.kv_cache.counters import TierCounters
from hstu_compile.kv_cache.gpu import GpuKVCacheManager
from hstu_compile.kv_cache.host import HostKVStorageManager
from hstu_compile.kv_cache.layout import Key
from hstu_compile.kv_cache.streams import Streams

ALIGNMENT = 64  # int32 of the page table's address: kernels are compiled, and launched again, for multiples of 16 bytes


class KVCache:
    """Plans batches over GPU pages and, where there is one, host storage. For one thread.

    Args:
        gpu: the pages.
        host: what keeps users that the GPU has evicted; None: they are computed again.
        max_batch_size: users in a batch at most.
        max_seq_len: history tokens of a user at most.
        load_timeout: seconds until a load from the host counts as failed.
        streams: where copies run; None: a stream to the device's memory and one from it, beside the current one.

    Raises:
        ValueError: a number that is not positive, or a host of another layout than the GPU's.
    """

    def __init__(
        self,
        gpu: GpuKVCacheManager,
        host: HostKVStorageManager | None = None,
        *,
        max_batch_size: int,
        max_seq_len: int,
        load_timeout: float = 1.0,
        streams: Streams | None = None,
    ) -> None:
        for name, value in (("max_batch_size", max_batch_size), ("max_seq_len", max_seq_len)):
            if value < 1:
                raise ValueError(f"KVCache: {name} is {value}, expected a positive number")
        if host is not None and host.layout != gpu.layout:
            raise ValueError(f"KVCache: the layout of host is {host.layout}, expected that of gpu, {gpu.layout}")
        self.gpu = gpu
        self.host = host
        self.max_batch_size = max_batch_size
        self.max_seq_len = max_seq_len
        self.load_timeout = load_timeout
        self.streams = streams or Streams.on(gpu.device)
        self.max_pages = gpu.layout.pages(max_seq_len)  # of a user
        self._table_begins = -(-max_batch_size // ALIGNMENT) * ALIGNMENT
        size = self._table_begins + max_batch_size * self.max_pages
        with torch.inference_mode(False):
            self._tables = torch.zeros(size, dtype=torch.int32, device=gpu.device)
        self.page_table, self.cached_lengths = self._views(self._tables)
        self._batch: Batch | None = None

    def begin(
        self,
        users: Sequence[int | str],
        lengths: Sequence[int],
        *,
        version: int | str,
        epochs: Sequence[int | str] | None = None,
    ) -> Batch:
        """Plan a step after which user b's history has lengths[b] tokens. All of the batch, or nothing.

        Raises:
            ValueError: before anything has changed: a user twice, a length that is negative, above max_seq_len or
                below what is cached of this key, too many users, numbers of arguments that differ.
            CapacityError: before anything has changed: the batch needs more pages than can be freed.
            RuntimeError: the batch before is still open.
        """
        batch = self.plan(users, lengths, version=version, epochs=epochs)
        try:
            batch.publish()
        except BaseException:
            batch.abort()
            raise
        return batch

    def plan(
        self,
        users: Sequence[int | str],
        lengths: Sequence[int],
        *,
        version: int | str,
        epochs: Sequence[int | str] | None = None,
    ) -> Batch:
        """Like `begin`, for kernels that read tables of the caller's own: see `Batch.fill`."""
        if self._batch is not None and self._batch.is_open:
            raise RuntimeError("kv_cache: begin() while a batch is open, expected commit() or abort() of it")
        keys = self._keys(users, lengths, version, [0] * len(users) if epochs is None else epochs)
        stored = self._stored(keys, lengths)
        allocation = self.gpu.allocate(keys, lengths)
        cached, load = list(allocation.cached), None
        tiers: list[Tier] = []
        try:
            wanted = []
            for b, key in enumerate(keys):
                tiers.append("gpu" if cached[b] else "host" if stored[b] else "miss")
                if stored[b]:
                    cached[b] = stored[b] * self.gpu.layout.page_size
                    wanted.append((key, allocation.pages[b][: stored[b]]))
            if self.host is not None and wanted:
                load = self.host.load(wanted, self.gpu.pools, self.streams.onload)
            self._batch = Batch(self, allocation, cached, tiers, load)
        except BaseException:
            if load is not None:
                load.cancel()
            self.gpu.abort(allocation, self.streams.onload.record())
            raise
        self._count(tiers, allocation.cached)
        return self._batch

    def publish(self, batch: Batch) -> None:
        """Write what the kernels of a batch read, in the order of the computing stream."""
        host = torch.empty_like(self._tables, device="cpu", pin_memory=self._tables.is_cuda)
        batch.fill(*(x.numpy() for x in self._views(host)))
        self.streams.compute.run(lambda: self._tables.copy_(host, non_blocking=True))

    def _views(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """page_table and cached_lengths."""
        table = tables[self._table_begins :].view(self.max_batch_size, self.max_pages)
        return table, tables[: self.max_batch_size]

    @property
    def counters(self) -> dict[str, TierCounters]:
        """By tier: "gpu" and, where there is one, "host"."""
        return {"gpu": self.gpu.counters} | ({"host": self.host.counters} if self.host is not None else {})

    def close(self) -> None:
        """Wait for every copy under way, then stop the threads."""
        if self._batch is not None and self._batch.is_open:
            self._batch.abort()
        self.gpu.drain()
        if self.host is not None:
            self.host.close()

    def _keys(
        self, users: Sequence[int | str], lengths: Sequence[int], version: int | str, epochs: Sequence[int | str]
    ) -> list[Key]:
        for name, given in (("lengths", lengths), ("epochs", epochs)):
            if len(given) != len(users):
                raise ValueError(f"kv_cache: {name} has {len(given)} items, expected {len(users)}, one for each user")
        if len(users) > self.max_batch_size:
            raise ValueError(f"kv_cache: {len(users)} users, expected at most max_batch_size, {self.max_batch_size}")
        for user, length in zip(users, lengths, strict=True):
            if length > self.max_seq_len:
                raise ValueError(
                    f"kv_cache: the length of user {user!r} is {length}, expected at most {self.max_seq_len}"
                )
        for name, given in (("user", users), ("version", (version,)), ("epoch", epochs)):
            for value in given:
                if not isinstance(value, (int, str)):
                    raise ValueError(f"kv_cache: {name} is {value!r}, expected an int or a string")
        return [Key(user, version, epoch) for user, epoch in zip(users, epochs, strict=True)]

    def _stored(self, keys: Sequence[Key], lengths: Sequence[int]) -> list[int]:
        """Pages of each user that the host can load, where the GPU has none."""
        stored = [0] * len(keys)
        missing = [] if self.host is None else [b for b, key in enumerate(keys) if not self.gpu.lookup(key)]
        if self.host is None or not missing:
            return stored
        self.host.poll()
        for b in missing:
            key, stored[b] = keys[b], self.host.lookup(keys[b])
            if (tokens := stored[b] * self.gpu.layout.page_size) > lengths[b]:
                raise ValueError(
                    f"kv_cache: the length of user {key.user!r} is {lengths[b]}, expected at least the {tokens} tokens "
                    f"that are stored: a history that changed is another epoch than {key.epoch!r}"
                )
        return stored

    def _count(self, tiers: Sequence[Tier], cached: Sequence[int]) -> None:
        misses = len(tiers) - tiers.count("gpu")
        self.gpu.counters.hits += tiers.count("gpu")
        self.gpu.counters.misses += misses
        self.gpu.counters.bytes_read += sum(cached) * self.gpu.layout.token_bytes
        if self.host is not None:
            self.host.counters.hits += tiers.count("host")
            self.host.counters.misses += tiers.count("miss")
