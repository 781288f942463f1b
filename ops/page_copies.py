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
    """Copies for one layer after the other; where pages lie goes to the GPU again only if it is elsewhere than before.

    That is their distances from the first one, which are the same where the layers' memory is laid out alike.
    """

    def __init__(self) -> None:
        self._distances: np.ndarray | None = None
        self._on_device: Tensor

    def load(self, pool: Tensor, pages: array, parts: Sequence[Tensor]) -> None:
        """pool[pages] = the parts, one behind the other, in the order of the current stream.

        Args:
            pool: [num_pages, ...], contiguous.
            pages: numbers of pages, none twice.
            parts: [n, ...] each, together as many pages, in host memory. What is `addressable` has to
                stay as it is until the copy is over.
        """
        if _by_kernel(pool, parts):
            self._copy(pool, parts[0], pool, _in_parts(parts), _in_pool(pool, pages))
        else:
            pool.index_copy_(0, _indices(pages, pool.device), torch.cat(list(parts)).to(pool.device))

    def store(self, pool: Tensor, pages: array, parts: Sequence[Tensor]) -> None:
        """The parts, one behind the other, = pool[pages]; arguments as in `load`."""
        if _by_kernel(pool, parts):
            self._copy(pool, pool, parts[0], _in_pool(pool, pages), _in_parts(parts))
        else:
            found = pool.index_select(0, _indices(pages, pool.device))
            for part, piece in zip(parts, found.split([part.shape[0] for part in parts]), strict=True):
                part.copy_(piece, non_blocking=True)

    def _copy(self, pool: Tensor, source: Tensor, target: Tensor, *distances: np.ndarray) -> None:
        both = np.stack(distances)
        if self._distances is None or not np.array_equal(both, self._distances):
            self._distances = both
            self._on_device = torch.from_numpy(both).pin_memory().to(pool.device, non_blocking=True)
        kernels = _kernels()
        assert kernels is not None
        with _lock:
            kernels.copy_pages(self._on_device, source, target, _step(pool), _memory)


def addressable(part: Tensor) -> bool:
    """Whether a GPU can read and write these pages where they are: pinned, aligned, each in one piece."""
    aligned = not (part.data_ptr() | _step(part)) % ALIGNMENT
    return aligned and part[:1].is_contiguous() and part.is_pinned()


def _by_kernel(pool: Tensor, parts: Sequence[Tensor]) -> bool:
    return pool.is_cuda and not _step(pool) % ALIGNMENT and all(map(addressable, parts)) and _kernels() is not None


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("hstu_compile.ops.kernels.page_copies")


def _step(pages: Tensor) -> int:
    """Bytes from page to page."""
    return pages.stride(0) * pages.element_size()


def _in_parts(parts: Sequence[Tensor]) -> np.ndarray:
    """Bytes from the first page to each, int64 [pages]."""
    counts = [part.shape[0] for part in parts]
    starts = np.array([part.data_ptr() for part in parts])
    within = np.arange(sum(counts)) - np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    return np.repeat(starts - starts[0], counts) + within * np.repeat([_step(part) for part in parts], counts)


def _in_pool(pool: Tensor, pages: array) -> np.ndarray:
    """Bytes from page 0 to each."""
    return np.frombuffer(pages, dtype=np.int32).astype(np.int64) * _step(pool)


def _indices(pages: array, device: torch.device) -> Tensor:
    """int64 [pages]; the host does not wait for them."""
    found = torch.frombuffer(pages, dtype=torch.int32).long()
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
