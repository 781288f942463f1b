"""Steps of serving over a KV cache without a model: what is read is known, streams are late, free pages are NaN."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from zlib import crc32

import torch
from torch import Tensor

from hstu_compile.kv_cache import (
    Batch,
    GpuKVCacheManager,
    HostKVStorageManager,
    Key,
    KVCache,
    KVStorage,
    LoadFailed,
    MemoryStorage,
    PageLayout,
)
from hstu_compile.kv_cache.onload import AtOnce
from hstu_compile.kv_cache.streams import Event, Streams

LAYOUT = PageLayout(num_layers=3, num_heads=1, head_dim=2, page_size=16, dtype=torch.float32)


class LateStream:
    """Work is done when somebody waits for it, or when the test lets time pass; never when it is given."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def run(self, work: Callable[[], object]) -> None:
        self.work.append(work)

    def record(self) -> "LateEvent":
        return LateEvent(self, len(self.work))

    def wait(self, event: Event) -> None:
        self.work.append(event.synchronize)

    def advance(self, until: int) -> None:
        while self.done < min(until, len(self.work)):
            self.done += 1
            self.work[self.done - 1]()


class LateEvent:
    def __init__(self, stream: LateStream, position: int) -> None:
        self.stream, self.position = stream, position

    def query(self) -> bool:
        return self.stream.done >= self.position

    def synchronize(self) -> None:
        self.stream.advance(self.position)


def late_streams() -> Streams:
    return Streams(*(LateStream() for _ in range(3)))


class Later(Executor):
    """Runs what it is given when it is told to."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future, Callable[[], object]]] = []

    def submit(self, work, /, *args, **kwargs) -> Future:  # type: ignore[no-untyped-def]
        future: Future = Future()
        self.waiting.append((future, lambda: work(*args, **kwargs)))
        return future

    def run_all(self) -> None:
        while self.waiting:
            future, work = self.waiting.pop(0)
            future.set_result(work())


class PoisonedGpu(GpuKVCacheManager):
    """Pages are NaN from being free to being written."""

    def poison(self) -> None:
        for pool in self.pools:
            pool[list(self._free)] = torch.nan

    def _take(self, count: int):  # type: ignore[no-untyped-def]
        self.poison()
        return super()._take(count)


class PoisonedMemory(MemoryStorage):
    def truncate(self, key: Key, num_pages: int) -> None:
        super().truncate(key, num_pages)
        self._memory[:, list(self._free)] = torch.nan


def tokens(key: Key, layer: int, first: int, last: int, layout: PageLayout = LAYOUT, device: str = "cpu") -> Tensor:
    """Keys and values, [2, last - first, H, D], of these tokens: no others have the same."""
    seed = crc32(repr((key, layer)).encode())
    shape = (2, last - first, layout.num_heads, layout.head_dim)
    inner = torch.arange(2 * layout.num_heads * layout.head_dim, device=device).view(2, 1, *shape[2:])
    position = torch.arange(first, last, device=device).view(1, -1, 1, 1)
    return ((seed + 7919 * position + 104729 * inner) % 2**23).to(layout.dtype)


def rows(pool: Tensor, page_table: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Page and row in it of tokens first ... last - 1 of one user."""
    position = torch.arange(first, last, device=pool.device)
    page_size = pool.shape[2]
    return page_table[position // page_size].long(), position % page_size


class Server:
    """Computes steps: checks every token that it finds cached, writes the new ones."""

    def __init__(self, cache: KVCache, writer: Later | None = None) -> None:
        self.cache = cache
        self.writer = writer or Later()
        self.wrong: list[str] = []

    def step(self, users: Sequence[int | str], lengths: Sequence[int], version=0, epochs=None, commit=True) -> Batch:  # type: ignore[no-untyped-def]
        with self.cache.begin(users, lengths, version=version, epochs=epochs) as batch:
            self.compute(batch, version, epochs)
            if commit:
                batch.commit()
        return batch

    def compute(self, batch: Batch, version=0, epochs=None) -> None:  # type: ignore[no-untyped-def]
        epochs = [0] * len(batch.users) if epochs is None else epochs
        keys = [Key(user, version, epoch) for user, epoch in zip(batch.users, epochs, strict=True)]
        while True:
            try:
                for layer in range(self.cache.gpu.layout.num_layers):
                    batch.wait_layer(layer)
                    self.layer(batch, keys, layer)
                return
            except LoadFailed:
                batch.rollback()

    def layer(self, batch: Batch, keys: Sequence[Key], layer: int) -> None:
        """What a layer's kernels do: they see the tables when they run, not when they are launched."""
        planned, lengths = list(batch.cached), list(batch.lengths)

        def kernels() -> None:
            pool, layout = batch.pool(layer), self.cache.gpu.layout
            for b, key in enumerate(keys):
                cached = int(batch.cached_lengths[b])
                if cached != planned[b]:
                    self.wrong.append(f"{key}: cached_lengths is {cached}, expected {planned[b]}")
                page, row = rows(pool, batch.page_table[b], 0, cached)
                found = pool[page, :, row].transpose(0, 1)
                if not torch.equal(found, tokens(key, layer, 0, cached, layout)):
                    self.wrong.append(f"{key}, layer {layer}: {cached} cached tokens are not what was computed")
                page, row = rows(pool, batch.page_table[b], cached, lengths[b])
                new = tokens(key, layer, cached, lengths[b], layout)
                pool[page, :, row] = new.transpose(0, 1)

        self.cache.streams.compute.run(kernels)

    def time_passes(self) -> None:
        """All work is done, in whatever order it asks for, and taken notice of."""
        streams = self.cache.streams
        for stream in (streams.offload, streams.onload, streams.compute):
            if isinstance(stream, LateStream):
                stream.advance(len(stream.work))
        self.writer.run_all()
        self.cache.gpu.poll()
        if self.cache.host is not None:
            self.cache.host.poll()


def late_server(
    num_pages: int, storage: KVStorage | None = None, layout: PageLayout = LAYOUT, reader: Executor | None = None
) -> Server:
    """A server on late streams, which evicts into a storage that is written when time passes."""
    writer = Later()
    host = (
        HostKVStorageManager(storage, 1000, reader=reader or AtOnce(), copier=AtOnce(), writer=writer)
        if storage is not None
        else None
    )
    gpu = PoisonedGpu(layout, num_pages, "cpu")
    longest = max(600, num_pages * layout.page_size)
    cache = KVCache(gpu, host, max_batch_size=4, max_seq_len=longest, load_timeout=0, streams=late_streams())
    return Server(cache, writer)


def evict(server: Server) -> None:
    """Another user takes the whole GPU, and time passes."""
    server.time_passes()
    server.step(["another"], [server.cache.gpu.num_pages * server.cache.gpu.layout.page_size], version="other")
    server.time_passes()
