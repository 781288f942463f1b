"""Pages of keys and values on the GPU: whose they are, who uses them, and which users go first."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hstu_compile.kv_cache.counters import TierCounters
from hstu_compile.kv_cache.layout import Key, PageLayout
from hstu_compile.kv_cache.recency import Recency
from hstu_compile.kv_cache.streams import Event, InFlight


class CapacityError(RuntimeError):
    """A batch needs more pages than there are, or than are not in use."""


@dataclass
class _History:
    pages: array = field(default_factory=lambda: array("i"))
    length: int = 0  # tokens that are valid


@dataclass
class Allocation:
    """The pages of a batch."""

    keys: list[Key]
    lengths: list[int]  # tokens, after the step
    cached: list[int]  # tokens, before
    pages: list[array]  # of each user: those it has, and new ones behind them
    new: list[array]
    held: list[Key]
    is_open: bool = True


class GpuKVCacheManager:
    """The pools of every layer, [num_pages, 2, page_size, H, D], and the pages of every user in them.

    A page is free, or owned by a user, or in flight: allocated for a batch that is not committed, or given back while
    the GPU may still use it. Users are evicted whole, the least recently used first, and only without references: a
    batch, a copy under way and `hold` are references. Bookkeeping is the host's, for one thread.

    Args:
        layout: the shape of a page.
        num_pages: of each layer.
        device: where the pools are.

    Raises:
        ValueError: num_pages is not positive.
    """

    def __init__(self, layout: PageLayout, num_pages: int, device: torch.device | str = "cuda") -> None:
        if num_pages < 1:
            raise ValueError(f"GpuKVCacheManager: num_pages is {num_pages}, expected a positive number")
        self.layout = layout
        self.num_pages = num_pages
        self.device = torch.device(device)
        self.counters = TierCounters()
        with torch.inference_mode(False):  # tensors of inference mode could not be written outside of it
            self.pools: list[Tensor] = [
                torch.empty(num_pages, *layout.shape, dtype=layout.dtype, device=self.device)
                for _ in range(layout.num_layers)
            ]
        if self.device.type == "cuda":  # other streams than this one may write first
            torch.cuda.synchronize(self.device)
        self._free = array("i", range(num_pages - 1, -1, -1))
        self._histories: dict[Key, _History] = {}
        self._recency = Recency()
        self._open: set[Key] = set()  # in a batch that is neither committed nor aborted
        self._evictable = 0  # pages of users without references
        self._owned = 0
        self._in_flight = InFlight()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_owned(self) -> int:
        return self._owned

    @property
    def num_in_flight(self) -> int:
        return self.num_pages - self.num_free - self.num_owned

    def lookup(self, key: Key) -> int:
        """How many tokens of this history are in the pages."""
        history = self._histories.get(key)
        return history.length if history is not None else 0

    def pages(self, key: Key) -> array:
        """The pages of this history, in the order of its tokens."""
        return self._histories[key].pages[:]

    def hold(self, key: Key) -> None:
        """Keep a user from being evicted, until `release` has been called as often.

        Raises:
            KeyError: nothing of this key is cached.
        """
        pages = self._histories[key].pages
        if self._recency.hold(key):
            self._evictable -= len(pages)

    def release(self, key: Key) -> None:
        """Take back one `hold`."""
        if self._recency.release(key):
            self._evictable += len(self._histories[key].pages)

    def allocate(self, keys: Sequence[Key], lengths: Sequence[int]) -> Allocation:
        """Pages for histories of these lengths: the users' own, and behind them new ones. For all, or for none.

        Evicts users where too few pages are free, and waits for work under way where that does not suffice.

        Raises:
            ValueError: before anything has changed: a key twice or in a batch that is open, or a length that is
                negative or below what is cached.
            CapacityError: before anything has changed: not so many pages can be had.
        """
        histories = self._check(keys, lengths)
        owned = [history.pages if history is not None else array("i") for history in histories]
        needed = [self.layout.pages(length) - len(pages) for length, pages in zip(lengths, owned, strict=True)]
        total = sum(needed)
        if total > len(self._free):
            self._make_sure_of(total, keys, sum(map(len, owned)))
        held = [key for key, history in zip(keys, histories, strict=True) if history is not None]
        for key in held:
            self.hold(key)
        while len(self._free) < total:
            self._evict_oldest()
        new = [self._take(count) for count in needed]
        self._open.update(keys)
        cached = [history.length if history is not None else 0 for history in histories]
        pages = [mine + more for mine, more in zip(owned, new, strict=True)]
        return Allocation(list(keys), list(lengths), cached, pages, new, held)

    def commit(self, allocation: Allocation, until: Event) -> None:
        """The pages are their users' now, who are not evicted before `until`."""
        self._close(allocation)
        for key, length, new in zip(allocation.keys, allocation.lengths, allocation.new, strict=True):
            if not length:
                continue
            if key not in self._histories:
                self._histories[key] = _History()
                self.hold(key)
                allocation.held.append(key)
            history = self._histories[key]
            history.pages.extend(new)
            history.length = length
            self._owned += len(new)
        self._in_flight.add(until, lambda: self._release_all(allocation.held))
        self.poll()

    def abort(self, allocation: Allocation, until: Event) -> None:
        """Every user is as before; the new pages are free, and others' pages evictable, from `until` on."""
        self._close(allocation)

        def give_back() -> None:
            for pages in reversed(allocation.new):
                self._free.extend(reversed(pages))
            self._release_all(allocation.held)

        self._in_flight.add(until, give_back)
        self.poll()

    def poll(self) -> None:
        """Take notice of work that is over."""
        self._in_flight.poll()

    def drain(self) -> None:
        """Wait until no work is under way."""
        while self._in_flight.wait_for_oldest():
            pass

    def _check(self, keys: Sequence[Key], lengths: Sequence[int]) -> list[_History | None]:
        """What is known of each, once the arguments are right."""
        seen: set[Key] = set()
        found = []
        for key, length in zip(keys, lengths, strict=True):
            if key in seen:
                raise ValueError(f"kv_cache: user {key.user!r} is twice in the batch, expected each once")
            seen.add(key)
            if key in self._open:
                raise ValueError(f"kv_cache: user {key.user!r} is in a batch that is open, expected commit or abort")
            if length < 0:
                raise ValueError(f"kv_cache: the length of user {key.user!r} is {length}, expected at least 0")
            history = self._histories.get(key)
            if history is not None and length < history.length:
                raise ValueError(
                    f"kv_cache: the length of user {key.user!r} is {length}, expected at least the {history.length} "
                    f"tokens that are cached: a history that changed is another epoch than {key.epoch!r}"
                )
            found.append(history)
        return found

    def _make_sure_of(self, needed: int, keys: Sequence[Key], owned: int) -> None:
        """Wait, if need be, until so many pages can be had without evicting one of these users."""
        self.poll()
        while True:
            of_batch = sum(
                len(self._histories[key].pages)
                for key in keys
                if key in self._histories and not self._recency.is_held(key)
            )
            available = len(self._free) + self._evictable - of_batch
            if needed <= available:
                return
            if needed + owned > self.num_pages or not self._in_flight.wait_for_oldest():
                raise CapacityError(
                    f"kv_cache: the batch needs {needed} pages besides the {owned} that its users have, expected at "
                    f"most {available}: of {self.num_pages} pages {self.num_free} are free, the others in use"
                )
            self.counters.waits += 1

    def _take(self, count: int) -> array:
        if not count:
            return array("i")
        pages = self._free[-count:]
        del self._free[-count:]
        pages.reverse()
        return pages

    def _evict_oldest(self) -> None:
        key = next(self._recency.idle())  # there is one: _make_sure_of
        self._recency.remove(key)
        pages = self._histories.pop(key).pages
        self._evictable -= len(pages)
        self._owned -= len(pages)
        pages.reverse()
        self._free.extend(pages)
        self.counters.evictions += 1

    def _close(self, allocation: Allocation) -> None:
        assert allocation.is_open
        allocation.is_open = False
        self._open.difference_update(allocation.keys)

    def _release_all(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self.release(key)
