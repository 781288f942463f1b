"""Users who come again by a Zipf law with histories that grow, and a storage that fails when it is told to."""

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bench.inference_problem import NUM_ITEMS
from hstu_compile.kv_cache import Key, MemoryStorage, StorageError
from hstu_compile.kv_cache.free_runs import NO_PAGES

FORGOTTEN = 0.005  # of the users of requests: their history is another one from here on

Kind = Literal["raises", "damaged", "short", "late"]


class Fault(NamedTuple):
    """What goes wrong with the loads of a request."""

    kind: Kind
    layer: int
    valid_pages: int  # of a damaged history, before the first wrong one


class Request(NamedTuple):
    users: list[int]
    histories: list[int]  # tokens
    targets: list[int]  # candidates
    arguments: tuple[Tensor, Tensor, Tensor, int]  # of the model, on the CPU
    changed: list[int]  # users whose history is not what it was, only longer
    fault: Fault | None


class Traffic:
    """Requests, all of them drawn from one seed.

    A history that would exceed `max_history` loses its older half, as one that is a window does.
    """

    def __init__(
        self, seed: int, num_users: int, zipf: float, max_batch: int, max_seq_len: int, num_layers: int, faults: float
    ) -> None:
        self.max_batch, self.max_seq_len, self.num_layers, self.faults = max_batch, max_seq_len, num_layers, faults
        self.max_targets = max(2, max_seq_len // 8)
        self.max_history = max_seq_len - self.max_targets
        self._rng, self._generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self._weights = list(itertools.accumulate(rank**-zipf for rank in range(1, num_users + 1)))
        self.histories = [self._items(self._rng.randint(0, self.max_history)) for _ in range(num_users)]

    def request(self) -> Request:
        rng = self._rng
        wanted = rng.randint(1, self.max_batch)
        users: dict[int, None] = {}
        while len(users) < min(wanted, len(self.histories)):
            users |= dict.fromkeys(rng.choices(range(len(self.histories)), cum_weights=self._weights))
        changed = [user for user in users if self._goes_on(user)]
        histories = [self.histories[user] for user in users]
        targets = [rng.randint(0 if len(h) > 1 else 2, self.max_targets) for h in histories]  # no sequence is empty
        lengths = [len(h) + n for h, n in zip(histories, targets, strict=True)]
        offsets = torch.tensor([0, *itertools.accumulate(lengths)])
        pieces = [x for h, n in zip(histories, targets, strict=True) for x in (h, self._items(n))]
        fault = None
        if rng.random() < self.faults:
            fault = Fault(rng.choice(get_args(Kind)), rng.randrange(self.num_layers), rng.randrange(3))
        arguments = torch.cat(pieces), offsets, torch.tensor(targets), self.max_seq_len
        return Request(list(users), [len(h) for h in histories], targets, arguments, changed, fault)

    def _goes_on(self, user: int) -> bool:
        """Some tokens more, often none; whether the history is another one besides."""
        rng, history = self._rng, self.histories[user]
        more = rng.choice([0, 0, 1, 1, 2, 3, max(1, self.max_seq_len // 16)])
        is_another = rng.random() < FORGOTTEN
        if is_another:
            history = self._items(rng.choice([0, rng.randint(0, self.max_history)]))
        if len(history) + more > self.max_history:
            history, is_another = history[len(history) // 2 :], True
        self.histories[user] = torch.cat([history, self._items(more)])
        return is_another

    def _items(self, count: int) -> Tensor:
        return torch.randint(NUM_ITEMS, (count,), generator=self._generator)


class FailingMemory(MemoryStorage):
    """Memory whose reads fail while a fault is set, and are never late otherwise; pages that are dropped become NaN."""

    reads_at_once = False
    met = 0  # reads that have failed
    _fault: Fault | None = None

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self._answers = threading.Event()

    @contextlib.contextmanager
    def failing(self, fault: Fault | None) -> Iterator[None]:
        """Inside, reads of the fault's layer fail; what is late comes at the end."""
        self._fault, self._answers = fault, threading.Event()
        try:
            yield
        finally:
            self._answers.set()
            self._fault = None

    def read(self, key: Key, layer: int, num_pages: int) -> Sequence[Tensor]:
        fault, answers = self._fault, self._answers
        if fault is None or fault.layer != layer or (fault.kind == "damaged" and num_pages <= fault.valid_pages):
            return super().read(key, layer, num_pages)
        self.met += 1
        if fault.kind == "raises":
            raise OSError("the storage is not there")
        if fault.kind == "damaged":
            raise StorageError("a page is damaged", fault.valid_pages)
        if fault.kind == "late":
            answers.wait()
        return super().read(key, layer, num_pages - (fault.kind == "short"))

    def truncate(self, key: Key, num_pages: int) -> None:
        dropped = self._numbers.get(key, NO_PAGES)[num_pages:], self._reserved.get(key, NO_PAGES)
        super().truncate(key, num_pages)
        for pages in dropped:
            self._memory[:, torch.from_numpy(pages)] = torch.nan
