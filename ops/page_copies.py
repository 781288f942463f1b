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

ALIGNMENT = 16  # bytes, of the addresses that the kernel copies
_memory: dict[Hashable, Any] = {}
_lock = threading.Lock()  # pages are loaded and stored in threads of their own


def load_pages(pool: Tensor, pages: array, parts: Sequence[Tensor]) -> None:
    """pool[pages] = the parts, one behind the other, in the order of the current stream.

    Args:
        pool: [num_pages, ...], contiguous.
        pages: numbers of pages, none twice.
        parts: [n, ...] each, together as many pages, in host memory; they stay as they are until the copy is over.
    """
    if _by_kernel(pool, parts):
        _copy(pool, _of_parts(parts), _of_pool(pool, pages))
    else:
        pool.index_copy_(0, _indices(pages, pool.device), torch.cat(list(parts)).to(pool.device))


def store_pages(pool: Tensor, pages: array, parts: Sequence[Tensor]) -> None:
    """The parts, one behind the other, = pool[pages], in the order of the current stream; arguments as `load_pages`."""
    if _by_kernel(pool, parts):
        _copy(pool, _of_pool(pool, pages), _of_parts(parts))
    else:
        found = pool.index_select(0, _indices(pages, pool.device))
        for part, piece in zip(parts, found.split([part.shape[0] for part in parts]), strict=True):
            part.copy_(piece, non_blocking=True)


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


def _copy(pool: Tensor, sources: np.ndarray, targets: np.ndarray) -> None:
    addresses = torch.from_numpy(np.stack([sources, targets])).pin_memory().to(pool.device, non_blocking=True)
    kernels = _kernels()
    assert kernels is not None
    with _lock:
        kernels.copy_pages(addresses, _step(pool), _memory)


def _step(pages: Tensor) -> int:
    """Bytes from page to page."""
    return pages.stride(0) * pages.element_size()


def _of_parts(parts: Sequence[Tensor]) -> np.ndarray:
    """Addresses, int64 [pages]."""
    return np.concatenate([part.data_ptr() + _step(part) * np.arange(part.shape[0]) for part in parts])


def _of_pool(pool: Tensor, pages: array) -> np.ndarray:
    return pool.data_ptr() + _step(pool) * np.frombuffer(pages, dtype=np.int32).astype(np.int64)


def _indices(pages: array, device: torch.device) -> Tensor:
    """int64 [pages]; the host does not wait for them."""
    found = torch.frombuffer(pages, dtype=torch.int32).long()
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found
