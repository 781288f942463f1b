"""What has to hold after every request of a soak, and what an answer has to be."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.inference_problem import on
from bench.soak_traffic import FailingMemory, Request
from hstu_compile.kv_cache import Key, KVCache
from hstu_compile.serving import Answer, Engine
from hstu_compile.verify import FORWARD, figures_of


class Violation(AssertionError):
    """The cache, or an answer, is not what it has to be."""


def expect(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise Violation(f"{what} is {found}, expected {expected}")


class Ledger:
    """What the engine was asked for, and so what it may have cached and must have counted."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tiers = {"gpu": 0, "host": 0, "miss": 0}
        self._epochs: dict[int, int] = {}
        self._valid: dict[Key, int] = {}  # tokens that were computed, of the weights and histories of now
        self._computed = 0  # history tokens
        self._users_made = 0  # of the pages

    @property
    def cache(self) -> KVCache:
        assert self.engine._cache is not None
        return self.engine._cache

    def reload(self, state: dict[str, Tensor]) -> None:
        self.engine.reload(state)
        self._valid.clear()

    def forget(self, users: Sequence[int]) -> None:
        for user in users:
            self.engine.forget(user)
            self._epochs[user] = self._epochs.get(user, 0) + 1

    def check(self, request: Request, answer: Answer) -> None:
        """After a request.

        Raises:
            Violation
        """
        batch = self.cache._batch
        assert batch is not None
        sequence = np.searchsorted(request.arguments[1].numpy(), answer.rows.numpy(), side="right") - 1
        rows = np.bincount(sequence, minlength=len(request.users))
        for b, (user, history, targets) in enumerate(
            zip(request.users, request.histories, request.targets, strict=True)
        ):
            key, cached, tier = self._key(user), history + targets - int(rows[b]), batch.tiers[b]
            valid = self._valid.get(key, 0)
            if not 0 <= cached <= valid:
                raise Violation(f"{cached} tokens of {key} were cached, expected at most {valid}, those computed")
            expect(f"whether tokens of {key}, {tier}, were cached", cached > 0, tier != "miss")
            if tier == "gpu":
                expect(f"tokens cached of {key} on the GPU", cached, valid)
            expect(f"tokens of {key} in the pages", self.cache.gpu.lookup(key), history)
            self.tiers[tier] += 1
            self._users_made += tier != "gpu" and history > 0
            self._computed += history - cached
            self._valid[key] = history
        self._check_pages()
        self._check_counters()

    def check_settled(self) -> None:
        """Once nothing is under way, what threads have done besides.

        Raises:
            Violation
        """
        settle(self.cache)
        gpu, host = self.cache.gpu, self.cache.host
        expect("pages in flight", gpu.num_in_flight, 0)
        expect("users with references", len(gpu._recency._references), 0)
        if host is None:
            return
        storage = host.storage
        assert isinstance(storage, FailingMemory)
        expect("users of the host with references", len(host._recency._references), 0)
        expect("pages waiting to be written", host._writing_pages, 0)
        by_user = {key: pages.tolist() for key, pages in storage._numbers.items()}
        stored = [page for pages in by_user.values() for page in pages]
        expect("pages of the storage", sorted([*stored, *storage._free]), list(range(storage.num_pages)))
        expect("pages counted by the host", host.num_pages, len(stored))
        counted = {key: pages.readable for key, pages in host._users.items()}
        expect("pages by user", counted, {key: len(pages) for key, pages in by_user.items()})

    def _key(self, user: int) -> Key:
        return Key(user, self.engine.version, self._epochs.get(user, 0))

    def _check_pages(self) -> None:
        gpu, host = self.cache.gpu, self.cache.host
        owned = [page for history in gpu._histories.values() for page in history.pages]
        expect("pages owned", gpu.num_owned, len(owned))
        expect("pages twice", len(owned) + gpu.num_free - len({*owned, *gpu._free}), 0)
        if gpu.num_in_flight < 0:
            raise Violation(f"{gpu.num_free} free pages and {gpu.num_owned} owned are more than {gpu.num_pages}")
        for key, history in gpu._histories.items():
            expect(f"pages of {key}", len(history.pages), gpu.layout.pages(history.length))
        idle = [key for key in gpu._histories if not gpu._recency.is_held(key)]
        expect("pages that may be evicted", gpu._evictable, sum(len(gpu._histories[key].pages) for key in idle))
        if host is not None:
            expect("pages counted by the host", host.num_pages, sum(pages.taken for pages in host._users.values()))
            expect("whether the host is within its capacity", host.num_pages <= host.capacity_pages, True)

    def _check_counters(self) -> None:
        gpu, host = self.cache.gpu.counters, self.cache.host
        expect("hits of the GPU", gpu.hits, self.tiers["gpu"])
        expect("misses of the GPU", gpu.misses, self.tiers["host"] + self.tiers["miss"])
        expect("users evicted", gpu.evictions, self._users_made - len(self.cache.gpu._histories))
        expect("bytes written", gpu.bytes_written, self._computed * self.cache.gpu.layout.token_bytes)
        if host is not None:
            expect("lookups of the host", host.counters.hits + host.counters.misses, gpu.misses)


def settle(cache: KVCache) -> None:
    """Wait for all copies under way."""
    cache.gpu.drain()
    if cache.host is not None:
        cache.host.drain()


def poison(cache: KVCache) -> None:
    """What is free is NaN."""
    for pool in cache.gpu.pools:
        pool[list(cache.gpu._free)] = torch.nan
    if cache.gpu.device.type == "cuda":  # other streams write next
        torch.cuda.synchronize(cache.gpu.device)


class Uncached:
    """The model without a cache, in its own dtype and in float64: what an answer is held against."""

    def __init__(self, model: nn.Module, max_history: int, max_seq_len: int, device: torch.device) -> None:
        self.model, self.device, self.max_seq_len = model, device, max_seq_len
        self.samples, self.worst = 0, 0.0  # error over budget
        self._sizes = [1, 2, 3] * 8 + [max_history // 2, max_history] * 8
        self.reloaded()

    def reloaded(self) -> None:
        """The model has new weights.

        Of few numbers eager may happen to get all right, and products of few rows lose more: eager's error is that of
        requests of many sizes besides, and of the samples before.
        """
        self._exact = copy.deepcopy(self.model).double()
        generator = torch.Generator().manual_seed(0)
        found = []
        for history in self._sizes:
            items = torch.randint(1000, (history + 1,), generator=generator)
            found.append(self._both((items, torch.tensor([0, history + 1]), torch.tensor([1]), self.max_seq_len)))
        self._others = [torch.cat(parts) for parts in zip(*found, strict=True)]

    def check(self, request: Request, answer: Answer) -> None:
        """Raises:
        Violation
        """
        both, rows = self._both(request.arguments), answer.rows.to(self.device)
        ours = torch.cat([answer.output, self._others[0]])
        self._others = [torch.cat([x[rows], other]) for x, other in zip(both, self._others, strict=True)]
        eager, exact = self._others
        figures = figures_of(("answer", ours), ("eager", eager), ("output", exact), FORWARD)
        if not figures.fits:
            raise Violation(f"the answer is not that of the model without a cache\n{figures}")
        self.samples += 1
        self.worst = max(self.worst, figures.error / figures.budget)

    def _both(self, arguments: tuple) -> tuple[Tensor, Tensor]:
        given = on(self.device, arguments)
        with torch.no_grad():
            return self.model(*given), self._exact(*given)
