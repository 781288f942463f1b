"""Pages of a cache from host memory into a pool on the GPU, and back: one launch for any number of pieces of memory.

Copies by the driver would be one for each run of pages that lie together on both sides, or one for each that lies
together on the host and another launch that spreads them; both cost the host more time than a small load takes.
"""

import functools
import importlib
import importlib.util
import threading
from array import array
from collections.abc import Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of what the kernel copies
_memory: dict[Hashable, Any] = {}
_lock = threading.Lock()  # pages are loaded and stored in threads of their own


class HostPages(NamedTuple):
    """Pages in host memory, wherever they lie in it: a number each, and no tensor."""

    memory: Tensor  # [num_layers, N, ...]
    numbers: np.ndarray  # [n] int32 or int64: which of the N, in their order

    @classmethod
    def all_of(cls, memory: Tensor) -> "HostPages":
        return cls(memory, np.arange(memory.shape[1]))

    def layer(self, layer: int) -> Tensor:
        """[n, ...], a copy."""
        return self.memory[layer].index_select(0, torch.from_numpy(self.numbers))


class PageCopies:
    """Copies of pages, layer by layer, between host memory that is laid out alike in every layer and a pool each.

    So the host finds out once where pages lie, and sends it to the GPU once.

    Args:
        pages: numbers of pages of a pool, none twice.
        parts: together as many pages.
    """

    def __init__(self, pages: array, parts: Sequence[HostPages]) -> None:
        self._pages = np.frombuffer(pages, dtype=np.int32).astype(np.int64)
        self._parts = parts  # keeps what the kernel copies
        memories = list({id(part.memory): part.memory for part in parts}.values())
        alike = memories[0].shape[0] == 1 or len({memory.stride(0) for memory in memories}) == 1
        self._by_kernel = alike and addressable(memories) and _kernels() is not None
        self._distances: Tensor | None = None  # these two are where the pools are, once they are asked for
        self._chosen: Tensor | None = None

    def load(self, pool: Tensor, layer: int) -> None:
        """pool[pages] = the parts' layer, one behind the other, in the order of the current stream."""
        if self._by_kernel and pool.is_cuda:
            self._copy(pool, self._parts[0].memory[layer], pool, into_pool=True)
        else:
            pool.index_copy_(
                0, self._indices(pool), torch.cat([part.layer(layer) for part in self._parts]).to(pool.device)
            )

    def store(self, pool: Tensor, layer: int) -> None:
        """The parts' layer, one behind the other, = pool[pages], in the order of the current stream."""
        if self._by_kernel and pool.is_cuda:
            self._copy(pool, pool, self._parts[0].memory[layer], into_pool=False)
        else:
            found = pool.index_select(0, self._indices(pool)).cpu()
            for part, piece in zip(self._parts, found.split([len(part.numbers) for part in self._parts]), strict=True):
                part.memory[layer].index_copy_(0, torch.from_numpy(part.numbers), piece)

    def _copy(self, pool: Tensor, source: Tensor, target: Tensor, into_pool: bool) -> None:
        step, kernels = pool.stride(0) * pool.element_size(), _kernels()
        if self._distances is None:
            distances = [_distances(self._parts), self._pages * step]
            both = torch.from_numpy(np.stack(distances if into_pool else distances[::-1]))
            self._distances = both.pin_memory().to(pool.device, non_blocking=True)
        assert kernels is not None
        with _lock:
            kernels.copy_pages(self._distances, source, target, step, _memory)

    def _indices(self, pool: Tensor) -> Tensor:
        """int64 [pages]; the host does not wait for them."""
        if self._chosen is None:
            found = torch.from_numpy(self._pages)
            self._chosen = found.pin_memory().to(pool.device, non_blocking=True) if pool.is_cuda else found
        return self._chosen


def addressable(memories: Sequence[Tensor]) -> bool:
    """Whether a GPU can use pages, [num_layers, N, ...], where they are: pinned, aligned, each in one piece."""
    together = 0
    for memory in memories:
        together |= memory.data_ptr() | memory.stride(0) * memory.element_size() | _page_bytes(memory)
    whole = all(memory[:1, :1].is_contiguous() for memory in memories)
    return whole and not together % ALIGNMENT and all(memory.is_pinned() for memory in memories)


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("hstu_compile.ops.kernels.page_copies")


def _page_bytes(memory: Tensor) -> int:
    """From page to page."""
    return memory.stride(1) * memory.element_size()


def _distances(parts: Sequence[HostPages]) -> np.ndarray:
    """Bytes from where the first part's memory begins to each page, int64 [pages]."""
    first = parts[0].memory.data_ptr()
    numbers = [part.numbers.astype(np.int64, copy=False) for part in parts]  # in bytes they are larger
    each = [n * _page_bytes(p.memory) + (p.memory.data_ptr() - first) for n, p in zip(numbers, parts, strict=True)]
    return np.concatenate(each)
