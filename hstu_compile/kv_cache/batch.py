"""One step of serving: which pages it reads and writes, and when they may be read."""

from typing import Literal

from torch import Tensor

Tier = Literal["gpu", "host", "miss"]


class LoadFailed(RuntimeError):
    """A load from the host failed, was late or corrupt; `rollback` says what is to be computed instead."""

    def __init__(self, users: dict[int | str, str]) -> None:
        self.users = users  # and why
        super().__init__(f"kv_cache: loads failed: {users}; expected rollback() and another try of the step")


class Batch:
    """What `KVCache.begin` has planned. The package's docstring is the protocol."""

    users: list[int | str]
    lengths: list[int]  # history tokens of each user after this step
    cached: list[int]  # of these, how many are in its pages: the step computes the others
    tiers: list[Tier]  # where they were found
    page_table: Tensor  # [max_batch_size, max_pages] int32 on the device, one address for the life of the cache
    cached_lengths: Tensor  # [max_batch_size] int32, likewise

    def pool(self, layer: int) -> Tensor:
        """[num_pages, 2, page_size, H, D] of this layer."""
        raise NotImplementedError

    def wait_layer(self, layer: int) -> None:
        """Have the current stream wait until what is cached of this layer is in the pages.

        Raises:
            LoadFailed: a user's history could not be loaded.
        """
        raise NotImplementedError

    def rollback(self) -> None:
        """Take back what could not be loaded: lowers `cached` and `cached_lengths` to what is valid."""
        raise NotImplementedError

    def commit(self) -> None:
        """The step's tokens are valid from here on; pages that became full are copied to the host."""
        raise NotImplementedError

    def abort(self) -> None:
        """Nothing of this step has been."""
        raise NotImplementedError

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *error: object) -> None:
        raise NotImplementedError
