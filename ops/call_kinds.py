"""Kinds of calls of an op: what is found out when the first one of a kind comes in holds for all of them."""

from collections.abc import Callable, Hashable
from types import ModuleType
from typing import Any, NamedTuple

MAX_KINDS = 256  # of an op


class Kind(NamedTuple):
    """Which kernel runs such calls (None: the reference), and what that remembers of them."""

    kernel: ModuleType | None
    memory: dict[Hashable, Any]


class Kinds:
    def __init__(self, checked_kernel: Callable[..., ModuleType | None]) -> None:
        """checked_kernel: checks the arguments of a call and chooses a kernel, for all calls with equal features."""
        self.checked_kernel = checked_kernel
        self.known: dict[Hashable, Kind] = {}

    def kind(self, features: Hashable, *call: Any) -> Kind:
        known = self.known.get(features)
        if known is None:
            known = Kind(self.checked_kernel(*call), {})
            if len(self.known) >= MAX_KINDS:
                self.known.clear()
            self.known[features] = known
        return known
