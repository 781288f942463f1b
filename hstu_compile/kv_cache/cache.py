"""The cache that serving uses: pages on the GPU, and the host behind them."""

from collections.abc import Sequence

from hstu_compile.kv_cache.batch import Batch
from hstu_compile.kv_cache.counters import TierCounters
from hstu_compile.kv_cache.gpu import GpuKVCacheManager
from hstu_compile.kv_cache.host import HostKVStorageManager


class KVCache:
    """Plans batches over GPU pages and, where there is one, host storage.

    Args:
        gpu: the pages.
        host: what keeps users that the GPU has evicted; None: they are computed again.
        max_batch_size: users in a batch at most.
        max_seq_len: history tokens of a user at most.
        load_timeout: seconds until a load from the host counts as failed.
    """

    def __init__(
        self,
        gpu: GpuKVCacheManager,
        host: HostKVStorageManager | None = None,
        *,
        max_batch_size: int,
        max_seq_len: int,
        load_timeout: float = 1.0,
    ) -> None:
        raise NotImplementedError

    def begin(
        self,
        users: Sequence[int | str],
        lengths: Sequence[int],
        *,
        version: int | str,
        epochs: Sequence[int | str] | None = None,
    ) -> Batch:
        """Plan a step after which user b's history has lengths[b] tokens. All of the batch, or nothing.

        Raises:
            ValueError: before anything has changed: a user twice, a length that is negative, above max_seq_len or
                below what is cached of this key, too many users, numbers of arguments that differ.
            CapacityError: before anything has changed: the batch needs more pages than can be freed.
            RuntimeError: the batch before is still open.
        """
        raise NotImplementedError

    @property
    def counters(self) -> dict[str, TierCounters]:
        """By tier: "gpu" and "host"."""
        raise NotImplementedError

    def close(self) -> None:
        """Wait for every copy under way, then stop the threads."""
        raise NotImplementedError
