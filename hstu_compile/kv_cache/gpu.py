"""Pages of keys and values on the GPU: whose they are, who uses them, and which users go first."""

import torch

from hstu_compile.kv_cache.layout import PageLayout


class CapacityError(RuntimeError):
    """A batch needs more pages than there are, or than are not in use."""


class GpuKVCacheManager:
    """The pools of every layer, [num_pages, 2, page_size, H, D], and the pages of every user in them."""

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device | str = "cuda") -> None:
        raise NotImplementedError
