"""What a tier of the cache has done."""

from dataclasses import dataclass


@dataclass
class TierCounters:
    """Counts since the tier was made; hits and misses per user and batch, of the host where the GPU missed."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    waits: int = 0  # for pages in use (GPU), for copies that had not landed (host)
    evictions: int = 0  # users
    failures: int = 0  # loads that failed, were late or corrupt; pages that could not be stored

    @property
    def hit_rate(self) -> float:
        return self.hits / max(1, self.hits + self.misses)
