"""Where pages are kept outside of the GPU: an interface that a database can implement, and memory as the default."""

import math
import mmap
import weakref
from abc import ABC, abstractmethod
from array import array
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
        reads_at_once: `read` waits for nothing: it only says where in pinned memory pages are. So it is called in the
            thread that serves, and no `load_timeout` ends it.
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
        self._reserved: dict[Key, array] = {}
        self._pages: dict[Key, array] = {}

    def scan(self) -> Iterable[tuple[Key, int]]:
        return ()

    def reserve(self, key: Key, num_pages: int) -> list[Tensor]:
        if num_pages > len(self._free):
            raise StorageError(f"MemoryStorage: {num_pages} pages are asked for, expected at most {len(self._free)}")
        runs = self._free.take(num_pages)
        self._reserved[key] = array("q", (page for run in runs for page in range(*run)))
        return [self._memory[:, first:last] for first, last in runs]

    def append(self, key: Key, first_page: int, pages: Sequence[Tensor]) -> None:
        self._pages[key] = self._pages.get(key, array("q")) + self._reserved.pop(key)

    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        return [self._memory[layer, first:last] for first, last in _runs(self._pages[key][:num_pages])]

    def truncate(self, key: Key, num_pages: int) -> None:
        pages = self._pages.pop(key, array("q"))
        dropped = pages[num_pages:] + self._reserved.pop(key, array("q"))
        if num_pages:
            self._pages[key] = pages[:num_pages]
        for run in _runs(dropped):
            self._free.give(run)

    def close(self) -> None:
        if torch.cuda.is_available():
            self._unpin()


def _runs(pages: Sequence[int]) -> list[Run]:
    """Pages one behind the other in memory."""
    runs: list[Run] = []
    for page in pages:
        if runs and runs[-1][1] == page:
            runs[-1] = (runs[-1][0], page + 1)
        else:
            runs.append((page, page + 1))
    return runs
