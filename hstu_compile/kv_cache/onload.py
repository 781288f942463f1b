"""Pages of a batch from the host to the GPU, layer by layer, so that compute waits for one layer at a time."""

import logging
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from threading import Event as Flag
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hstu_compile.kv_cache.layout import Key
from hstu_compile.kv_cache.storage import KVStorage, StorageError
from hstu_compile.kv_cache.streams import Event, Stream
from hstu_compile.ops.page_copies import HostPages, PageCopies, addressable

log = logging.getLogger("hstu_compile")


@dataclass
class Loaded:
    """What is loaded of one user."""

    key: Key
    valid: int  # pages, the first ones: all, until some cannot be read
    pages: array  # on the GPU
    reason: str = ""  # why some are not valid
    is_wrong: bool = False  # what is stored, not only this load of it
    known: int = field(init=False)  # the `valid` that the batch computes with

    def __post_init__(self) -> None:
        self.known = self.valid


class AtOnce(Executor):
    """In place of a thread, for work that waits for nothing: two that take turns with the interpreter cost more."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except BaseException as error:  # as a thread's, for whoever asks for the result
            future.set_exception(error)
        return future


class LayerwiseLoad:
    """Reads each layer of all users, then has it copied. As an event: no copy is under way, and none will be."""

    def __init__(self, storage: KVStorage, users: list[Loaded], pools: Sequence[Tensor], stream: Stream) -> None:
        self.users = users
        self.bytes = 0
        self._storage = storage
        self._pools = pools
        self._stream = stream
        self._copies: list[PageCopies] = []  # they keep what is being copied
        self._lock = Lock()  # once cancelled, nothing is given to the stream and `users` does not change
        self._cancelled = False
        self._events: list[Event] = []
        self._given = [Flag() for _ in pools]  # to the stream, by layer
        self._ended = Flag()  # by itself, or cancelled

    def run(self) -> None:
        """Until all is given to the streams, or cancelled; the reading thread's part, if there is one."""
        try:
            if self._storage.reads_at_once:
                copies = self._read()
                for layer in range(len(self._pools)):
                    self._give(layer, copies, layer)
            else:
                for layer in range(len(self._pools)):
                    self._give(layer, self._read(layer), 0)
        except Exception as error:
            log.warning("hstu_compile: a load into the KV cache failed", exc_info=True)
            self._fail_all(f"{type(error).__name__}: {error}")
        finally:
            for flag in self._given:
                flag.set()
            self._ended.set()

    def wait(self, layer: int, seconds: float) -> Event | None:
        """The event of a layer's copies, once the storage has read it; None: it has not, see `failed`."""
        if not self._given[layer].wait(max(0.0, seconds)):
            self._fail_all("it was not read in time")
        with self._lock:
            return self._events[layer] if layer < len(self._events) else None

    def is_given(self, layer: int) -> bool:
        return self._given[layer].is_set()

    def failed(self) -> list[Loaded]:
        """The users of whom less is valid than the batch computes with."""
        return [user for user in self.users if user.valid < user.known]

    def cancel(self) -> None:
        """Give no copy to the stream any more. A read of the storage that hangs holds nothing up then."""
        with self._lock:
            self._cancelled = True
            self._ended.set()

    def query(self) -> bool:
        return self._ended.is_set() and all(event.query() for event in self._events[-1:])

    def synchronize(self) -> None:
        self._ended.wait()
        for event in self._events[-1:]:
            event.synchronize()

    def _fail_all(self, reason: str) -> None:
        self.cancel()
        for user in self.users:
            user.valid, user.reason = 0, reason

    def _fail(self, user: Loaded, valid: int, reason: str) -> None:
        with self._lock:
            if not self._cancelled:
                user.valid, user.reason, user.is_wrong = valid, reason, True

    def _read(self, layer: int | None = None) -> PageCopies | None:
        """The valid pages of all users, of one layer or all; None: there are none, or the load is cancelled."""
        parts: list[HostPages] = []
        pages = array("i")
        for user in self.users:
            parts += self._parts_of(user, layer)
            pages.extend(user.pages[: user.valid])
        if not parts:
            return None
        if layer is not None and self._pools[0].is_cuda and not addressable([part.memory for part in parts]):
            parts = [HostPages.all_of(torch.cat([part.memory for part in parts], dim=1).pin_memory())]
        self._copies.append(PageCopies(pages, parts))
        return self._copies[-1]

    def _give(self, layer: int, copies: PageCopies | None, index: int) -> None:
        """index: of the layer among those that were read."""
        pool = self._pools[layer]
        with self._lock:
            if self._cancelled:
                return
            try:
                if copies is not None:
                    self._stream.run(lambda: copies.load(pool, index))
            finally:
                self._events.append(self._stream.record())
            self.bytes += self._storage.layout.layer_bytes * sum(user.valid for user in self.users)
        self._given[layer].set()

    def _parts_of(self, user: Loaded, layer: int | None) -> Sequence[HostPages]:
        """Of one user, in one layer or all, after finding out which pages are valid."""
        layout = self._storage.layout
        while user.valid and not self._cancelled:
            try:
                if layer is None:
                    parts, layers = [self._storage.read_all(user.key, user.valid)], layout.num_layers
                else:
                    read = self._storage.read(user.key, layer, user.valid)
                    parts, layers = [HostPages.all_of(part[None]) for part in read], 1
                expected = (layers, *layout.shape)
                for x, numbers in parts:
                    if (x.shape[0], *x.shape[2:]) != expected or x.dtype != layout.dtype:
                        raise StorageError("pages of another layout were read")
                    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < x.shape[1]:
                        raise StorageError(f"pages were read from outside of a memory of {x.shape[1]}")
                if (count := sum(len(part.numbers) for part in parts)) != user.valid:
                    raise StorageError(f"{count} pages were read, expected {user.valid}")
                return parts
            except Exception as error:
                log.warning("hstu_compile: user %r could not be loaded: %s", user.key.user, error)
                valid = error.valid_pages if isinstance(error, StorageError) else 0
                self._fail(user, max(0, min(valid, user.valid - 1)), f"{type(error).__name__}: {error}")
        return ()
