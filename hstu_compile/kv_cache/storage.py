"""Where pages are kept outside of the GPU: an interface that a database can implement, and memory as the default."""

import math
import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hstu_compile.kv_cache.free_runs import FreeRuns, Run
from hstu_compile.kv_cache.layout import Key, PageLayout


class StorageError(RuntimeError):
    """Pages could not be read; the first `valid_pages` of those asked for are right."""

    def __init__(self, message: str, valid_pages: int = 0) -> None:
        super().__init__(message)
        self.valid_pages = valid_pages


class KVStorage(ABC):
    """Whole pages of users, each in every layer; they are appended and never change.

    `HostKVStorageManager` decides who is kept. It calls `scan`, `reserve` and `truncate` from the thread that serves,
    so that they should be quick, `append` from a second and `read` from others; but never `truncate` while a user's
    pages are appended or read, and never two `append` of one user at once.

    Attributes:
        layout: the shape of a page.
        reads_at_once: pages are in pinned memory: `read_all` says where, and waits for nothing. It is called instead of
            `read`, in the thread that serves, and no `load_timeout` ends it.
    """

    reads_at_once = False

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout

    @abstractmethod
    def scan(self) -> Iterable[tuple[Key, int]]:
        """The users that are there at the start, and how many pages each has."""

    def reserve(self, key: Key, num_pages: int) -> list[Tensor]:
        """Host memory for the next pages of a user: [num_layers, n, *layout.shape] each, num_pages together.

        They go to `append`; `truncate` takes them back.
        """
        layout = self.layout
        shape = (layout.num_layers, num_pages, *layout.shape)
        return [torch.empty(shape, dtype=layout.dtype, device="cpu", pin_memory=torch.cuda.is_available())]

    @abstractmethod
    def append(self, key: Key, first_page: int, pages: Sequence[Tensor]) -> None:
        """Keep pages, those of `reserve`, behind the first_page pages that the user has."""

    @abstractmethod
    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        """The first num_pages pages of a user in one layer: [n, *layout.shape] each, in their order.

        Raises:
            StorageError: they are not what was appended.
        """

    def read_all(self, key: Key, num_pages: int) -> Sequence[Tensor]:
        """The same in all layers: [num_layers, n, *layout.shape] each."""
        raise NotImplementedError

    @abstractmethod
    def truncate(self, key: Key, num_pages: int) -> None:
        """Drop a user's pages, if there are any, but the first num_pages, and what was reserved; 0: the user."""

    def close(self) -> None:  # noqa: B027  most have nothing to do
        """Give back what is held outside of Python."""


class MemoryStorage(KVStorage):
    """Pages in one block of host memory a layer, pinned where there is CUDA: read from there without a copy.

    Args:
        layout: the shape of a page.
        num_pages: how many fit.

    Raises:
        ValueError: num_pages is not positive.
    """

    reads_at_once = True

    def __init__(self, layout: PageLayout, num_pages: int) -> None:
        super().__init__(layout)
        if num_pages < 1:
            raise ValueError(f"MemoryStorage: num_pages is {num_pages}, expected a positive number")
        self.num_pages = num_pages
        shape = (layout.num_layers, num_pages, *layout.shape)
        # Memory pages of its own: CUDA pins whole ones, each once. pin_memory=True would take the next power of two.
        block = mmap.mmap(-1, math.prod(shape) * layout.dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory = torch.frombuffer(block, dtype=layout.dtype).view(shape)
        if torch.cuda.is_available():
            cudart, address = torch.cuda.cudart(), self._memory.data_ptr()
            torch.cuda.check_error(cudart.cudaHostRegister(address, len(block), 0))
            self._unpin = weakref.finalize(self, cudart.cudaHostUnregister, address)
        self._free = FreeRuns(num_pages)
        self._reserved: dict[Key, list[Run]] = {}
        self._runs: dict[Key, list[Run]] = {}

    def scan(self) -> Iterable[tuple[Key, int]]:
        return ()

    def reserve(self, key: Key, num_pages: int) -> list[Tensor]:
        if num_pages > len(self._free):
            raise StorageError(f"MemoryStorage: {num_pages} pages are asked for, expected at most {len(self._free)}")
        runs = self._free.take(num_pages)
        self._reserved[key] = runs
        return [self._memory[:, first:last] for first, last in runs]

    def append(self, key: Key, first_page: int, pages: Sequence[Tensor]) -> None:
        self._runs[key] = self._runs.get(key, []) + self._reserved.pop(key)

    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        return [part[layer] for part in self.read_all(key, num_pages)]

    def read_all(self, key: Key, num_pages: int) -> Sequence[Tensor]:
        return [self._memory[:, first:last] for first, last in _split(self._runs[key], num_pages)[0]]

    def truncate(self, key: Key, num_pages: int) -> None:
        kept, dropped = _split(self._runs.pop(key, []), num_pages)
        if kept:
            self._runs[key] = kept
        for run in dropped + self._reserved.pop(key, []):
            self._free.give(run)

    def close(self) -> None:
        if torch.cuda.is_available():
            self._unpin()


def _split(runs: Sequence[Run], num_pages: int) -> tuple[list[Run], list[Run]]:
    """Their first pages, and the others."""
    first: list[Run] = []
    others: list[Run] = []
    for begin, end in runs:
        middle = min(begin + num_pages, end)
        num_pages -= middle - begin
        first += [(begin, middle)] if begin < middle else []
        others += [(middle, end)] if middle < end else []
    return first, others
