"""Which users may be evicted, the least recently used first."""

from collections import OrderedDict
from collections.abc import Iterator

from hstu_compile.kv_cache.layout import Key


class Recency:
    """Reference counts of keys, and the order in which those without a reference lost their last one."""

    def __init__(self) -> None:
        self._references: dict[Key, int] = {}
        self._idle: OrderedDict[Key, None] = OrderedDict()

    def hold(self, key: Key) -> bool:
        """Count a reference more; whether it is the first."""
        count = self._references.get(key, 0)
        self._references[key] = count + 1
        self._idle.pop(key, None)
        return count == 0

    def release(self, key: Key) -> bool:
        """Count a reference less; whether it was the last: then the key is the most recently used."""
        count = self._references[key] - 1
        if count:
            self._references[key] = count
            return False
        del self._references[key]
        self._idle[key] = None
        return True

    def remove(self, key: Key) -> None:
        """Forget a key without references."""
        del self._idle[key]

    def is_held(self, key: Key) -> bool:
        return key in self._references

    def idle(self) -> Iterator[Key]:
        """The keys without references, the one that was used longest ago first."""
        return iter(self._idle)
