"""A paged cache of the keys and values of users' histories: GPU pages, and host storage behind them.

One step of serving is one batch:

    with cache.begin(users, lengths, version=weights, epochs=epochs) as batch:
        while True:
            try:
                # compute history tokens batch.cached[b] ... batch.lengths[b] - 1 of each user b, and its candidates;
                # attention of layer i: batch.wait_layer(i), then append_kv and paged_hstu_attention on batch.pool(i),
                # batch.page_table, batch.cached_lengths
                break
            except LoadFailed:
                batch.rollback()  # batch.cached is smaller now: start the step again
        batch.commit()  # without it the end of the block is batch.abort()

`begin` plans: what of each user is on the GPU, else what the host has (its copy to the GPU is started, layer by layer,
on a stream of its own), and pages for all the rest, which it allocates for the whole batch or not at all. Until
`commit` or `abort` nothing of the batch is evicted. `commit` makes the new tokens valid, and has pages that have become
full copied to the host once the step's work is done. `abort` leaves every user as they were before.

- Key: (user, weights version, history epoch), each an int or a string. Within one epoch a history only grows;
  whoever changes or shortens one counts its epoch up. A shorter history under the same key is an error. Over a storage
  that survives a restart, versions and epochs have to survive it too: the name of a checkpoint is a version, 0 is none.
- Streams: `begin`, `wait_layer`, `rollback`, `commit` and `abort` are called with the stream that computes as torch's
  current one, always the same. The host waits in `begin` only where pages still in use are needed, in `wait_layer`
  only until the storage has read that layer.
- CUDA graphs: `batch.page_table` [max_batch_size, max_pages] and `batch.cached_lengths` [max_batch_size], both int32,
  and the pools have one address for the life of the cache. Rows beyond the batch are -1 and 0. A graph over layer i is
  replayed after `wait_layer(i)`, one over the whole model after `wait_layer` of every layer. Record them with
  capture_error_mode="thread_local": threads of the cache call CUDA at any time.
- `plan` is `begin` for tables of the caller's own: the cache's are not written, `batch.fill` writes others.
- One batch is open at a time; its GPU work need not be over when the next begins.
- History of length 0 is allowed, so are lengths equal to what is cached (only candidates are new).
- `batch.tiers[b]`, "gpu", "host" or "miss", says where the history of user b was found.
"""

from hstu_compile.kv_cache.batch import Batch, LoadFailed
from hstu_compile.kv_cache.cache import KVCache
from hstu_compile.kv_cache.counters import TierCounters
from hstu_compile.kv_cache.disk import DiskStorage
from hstu_compile.kv_cache.gpu import CapacityError, GpuKVCacheManager
from hstu_compile.kv_cache.host import HostKVStorageManager
from hstu_compile.kv_cache.layout import Key, PageLayout
from hstu_compile.kv_cache.storage import KVStorage, MemoryStorage, StorageError
from hstu_compile.ops.page_copies import HostPages

__all__ = [
    "Batch",
    "CapacityError",
    "DiskStorage",
    "GpuKVCacheManager",
    "HostPages",
    "HostKVStorageManager",
    "KVCache",
    "KVStorage",
    "Key",
    "LoadFailed",
    "MemoryStorage",
    "PageLayout",
    "StorageError",
    "TierCounters",
]
