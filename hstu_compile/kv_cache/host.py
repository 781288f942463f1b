"""Users that the GPU has evicted: which the storage keeps, which go first, and copies to and from it."""

from hstu_compile.kv_cache.storage import KVStorage


class HostKVStorageManager:
    """Whole pages of users in a `KVStorage`, up to a capacity, the least recently used users evicted."""

    def __init__(self, storage: KVStorage, capacity_pages: int) -> None:
        raise NotImplementedError
