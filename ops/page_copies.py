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
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of what the kernel copies
_memory: dict[Hashable, Any] = {}
_lock = threading.Lock()  # pages are loaded and stored in threads of their own


class PageCopies:
    """Copies of pages, layer by layer, between host memory that is laid out alike in every layer and a pool each.

    So the host finds out once where pages lie, and sends it to the GPU once.

    Args:
        pages: numbers of pages of a pool, none twice.
        parts: [num_layers, n, ...] each, together as many pages, in host memory.
    """

    def __init__(self, pages: array, parts: Sequence[Tensor]) -> None:
        self._pages = np.frombuffer(pages, dtype=np.int32).astype(np.int64)
        self._parts = parts  # keeps what the kernel copies
        alike = parts[0].shape[0] == 1 or len({part.stride(0) for part in parts}) == 1
        self._by_kernel = alike and addressable(parts) and _kernels() is not None
        self._distances: Tensor | None = None  # these two are where the pools are, once they are asked for
        self._chosen: Tensor | None = None

    def load(self, pool: Tensor, layer: int) -> None:
        """pool[pages] = the parts' layer, one behind the other, in the order of the current stream."""
        if self._by_kernel and pool.is_cuda:
            self._copy(pool, self._parts[0][layer], pool, into_pool=True)
        else:
            pool.index_copy_(0, self._indices(pool), torch.cat([part[layer] for part in self._parts]).to(pool.device))

    def store(self, pool: Tensor, layer: int) -> None:
        """The parts' layer, one behind the other, = pool[pages], in the order of the current stream."""
        if self._by_kernel and pool.is_cuda:
            self._copy(pool, pool, self._parts[0][layer], into_pool=False)
        else:
            found = pool.index_select(0, self._indices(pool))
            for part, piece in zip(self._parts, found.split([part.shape[1] for part in self._parts]), strict=True):
                part[layer].copy_(piece, non_blocking=True)

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


def addressable(parts: Sequence[Tensor]) -> bool:
    """Whether a GPU can read and write pages, [num_layers, n, ...], where they are: pinned, aligned, each in one piece.

    A request has many parts, mostly of one memory, and waits meanwhile: what they share is asked for once.
    """
    memory = {part.untyped_storage().data_ptr(): part for part in parts}
    inner = {(part.shape[2:], part.stride()[2:]): part for part in parts}
    together = 0
    for part in parts:
        together |= part.data_ptr() | part.stride(0) * part.element_size() | _page_bytes(part)
    whole = all(part[:1, :1].is_contiguous() for part in inner.values())
    return whole and not together % ALIGNMENT and all(part.is_pinned() for part in memory.values())


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("hstu_compile.ops.kernels.page_copies")


def _page_bytes(part: Tensor) -> int:
    """From page to page."""
    return part.stride(1) * part.element_size()


def _distances(parts: Sequence[Tensor]) -> np.ndarray:
    """Bytes from the first page to each, int64 [pages]."""
    first = parts[0].data_ptr()
    each = [np.arange(part.shape[1]) * _page_bytes(part) + (part.data_ptr() - first) for part in parts]
    return each[0] if len(each) == 1 else np.concatenate(each)
