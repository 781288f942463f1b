"""Where pages are kept outside of the GPU: an interface that a database can implement, and memory as the default."""

import math
import mmap
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_compile.kv_cache.free_runs import NO_PAGES, FreeRuns, pages_in, runs_of
from hstu_compile.kv_cache.layout import Key, PageLayout
from hstu_compile.ops.page_copies import HostPages


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

    def reserve(self, key: Key, num_pages: int) -> HostPages:
        """Host memory for the next pages of a user: num_pages of a memory [num_layers, N, *layout.shape].

        They go to `append`; `truncate` takes them back.
        """
        layout = self.layout
        shape = (layout.num_layers, num_pages, *layout.shape)
        pinned = torch.cuda.is_available()
        return HostPages.all_of(torch.empty(shape, dtype=layout.dtype, device="cpu", pin_memory=pinned))

    @abstractmethod
    def append(self, key: Key, first_page: int, pages: HostPages) -> None:
        """Keep pages, those of `reserve`, behind the first_page pages that the user has."""

    @abstractmethod
    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        """The first num_pages pages of a user in one layer: [n, *layout.shape] each, in their order.

        Raises:
            StorageError: they are not what was appended.
        """

    def read_all(self, key: Key, num_pages: int) -> HostPages:
        """The same in all layers: num_pages of a memory [num_layers, N, *layout.shape]."""
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
        self._reserved: dict[Key, np.ndarray] = {}  # of pages, as in HostPages
        self._numbers: dict[Key, np.ndarray] = {}

    def scan(self) -> Iterable[tuple[Key, int]]:
        return ()

    def reserve(self, key: Key, num_pages: int) -> HostPages:
        if num_pages > len(self._free):
            raise StorageError(f"MemoryStorage: {num_pages} pages are asked for, expected at most {len(self._free)}")
        self._reserved[key] = pages_in(self._free.take(num_pages))
        return HostPages(self._memory, self._reserved[key])

    def append(self, key: Key, first_page: int, pages: HostPages) -> None:
        self._numbers[key] = np.concatenate([self._numbers.get(key, NO_PAGES), self._reserved.pop(key)])

    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        memory, numbers = self.read_all(key, num_pages)
        return [memory[layer, first:last] for first, last in runs_of(numbers)]

    def read_all(self, key: Key, num_pages: int) -> HostPages:
        return HostPages(self._memory, self._numbers[key][:num_pages])

    def truncate(self, key: Key, num_pages: int) -> None:
        numbers = self._numbers.pop(key, NO_PAGES)
        if num_pages and len(numbers):
            self._numbers[key] = numbers[:num_pages]
        for pages in (numbers[num_pages:], self._reserved.pop(key, NO_PAGES)):
            for run in runs_of(pages):
                self._free.give(run)

    def close(self) -> None:
        if torch.cuda.is_available():
            self._unpin()
