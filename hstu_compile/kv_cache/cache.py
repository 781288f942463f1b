"""The cache that serving uses: pages on the GPU, and the host behind them."""

from array import array
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
        self._max_pages = gpu.layout.pages(max_seq_len)
        self._table_begins = -(-max_batch_size // ALIGNMENT) * ALIGNMENT
        size = self._table_begins + max_batch_size * self._max_pages
        with torch.inference_mode(False):
            self._plan = torch.zeros(size, dtype=torch.int32, device=gpu.device)
        self.cached_lengths: Tensor = self._plan[:max_batch_size]
        self.page_table: Tensor = self._plan[self._table_begins :].view(max_batch_size, self._max_pages)
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
        if self._batch is not None and self._batch.is_open:
            raise RuntimeError("kv_cache: begin() while a batch is open, expected commit() or abort() of it")
        keys = self._keys(users, lengths, version, [0] * len(users) if epochs is None else epochs)
        if self.host is not None:
            self.host.poll()
        stored = [self._stored(key, length) for key, length in zip(keys, lengths, strict=True)]
        allocation = self.gpu.allocate(keys, lengths)
        cached, tiers, load = list(allocation.cached), list[Tier](), None
        try:
            wanted = []
            for b, key in enumerate(keys):
                tiers.append("gpu" if cached[b] else "host" if stored[b] else "miss")
                if stored[b]:
                    cached[b] = stored[b] * self.gpu.layout.page_size
                    wanted.append((key, allocation.pages[b][: stored[b]]))
            if self.host is not None and wanted:
                load = self.host.load(wanted, self.gpu.pools, self.streams.arrivals, self.streams.onload)
            self._batch = Batch(self, allocation, cached, tiers, load)
        except BaseException:
            if load is not None:
                load.cancel()
            self.gpu.abort(allocation, self.streams.onload.record())
            raise
        self._count(tiers, allocation.cached)
        return self._batch

    def publish(self, pages: Sequence[array], cached: Sequence[int]) -> None:
        """Write what the kernels read: the page table and what is cached, in the order of the computing stream."""
        plan = array("i", cached)
        plan.extend([0] * (self._table_begins - len(cached)))
        for row in pages:
            plan.extend(row)
            plan.extend(array("i", [-1]) * (self._max_pages - len(row)))
        plan.extend(array("i", [-1]) * (self._max_pages * (self.max_batch_size - len(pages))))
        host = torch.frombuffer(plan, dtype=torch.int32)
        if self._plan.is_cuda:
            host = host.pin_memory()
        self.streams.compute.run(lambda: self._plan.copy_(host, non_blocking=True))

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
        keys = [Key(user, version, epoch) for user, epoch in zip(users, epochs, strict=True)]
        for key in keys:
            for name, value in key._asdict().items():
                if not isinstance(value, (int, str)):
                    raise ValueError(f"kv_cache: {name} is {value!r}, expected an int or a string")
        return keys

    def _stored(self, key: Key, length: int) -> int:
        """Pages of a user that the host can load, if the GPU has none."""
        if self.host is None or self.gpu.lookup(key):
            return 0
        stored = self.host.lookup(key)
        if (tokens := stored * self.gpu.layout.page_size) > length:
            raise ValueError(
                f"kv_cache: the length of user {key.user!r} is {length}, expected at least the {tokens} tokens that "
                f"are stored: a history that changed is another epoch than {key.epoch!r}"
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
