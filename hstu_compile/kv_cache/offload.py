"""Full pages from the GPU to the host, behind the step that filled them, and from there into the storage."""

import logging
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hstu_compile.kv_cache.layout import Key
from hstu_compile.kv_cache.onload import indices
from hstu_compile.kv_cache.storage import KVStorage
from hstu_compile.kv_cache.streams import Event, Stream

log = logging.getLogger("hstu_compile")


@dataclass
class Stored:
    """What is stored of one user."""

    key: Key
    first: int  # page of the history
    pages: array  # on the GPU
    memory: list[Tensor]  # on the host, [num_layers, n, 2, page_size, H, D] each
    is_stored: bool = False


def write(storage: KVStorage, users: Sequence[Stored], copied: Event) -> None:
    """The thread's part: wait until the copies have landed in host memory, and have the storage keep it."""
    copied.synchronize()
    for user in users:
        try:
            storage.append(user.key, user.first, user.memory)
            user.is_stored = True
        except Exception as error:
            log.warning("hstu_compile: pages of user %r could not be stored: %s", user.key.user, error)


def copy_out(users: Sequence[Stored], pools: Sequence[Tensor], stream: Stream, after: Event) -> Event:
    """Have the stream copy pages to host memory after an event; returns the event of their having landed."""
    stream.wait(after)
    pages = array("i")
    for user in users:
        pages.extend(user.pages)

    def copy() -> None:
        chosen = indices(pages, pools[0].device)
        for layer, pool in enumerate(pools):
            gathered = pool.index_select(0, chosen)
            first = 0
            for user in users:
                for memory in user.memory:
                    count = memory.shape[1]
                    memory[layer].copy_(gathered[first : first + count], non_blocking=True)
                    first += count

    stream.run(copy)
    return stream.record()
