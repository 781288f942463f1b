"""Where pages are kept outside of the GPU: an interface that a database can implement, and memory as the default."""

from abc import ABC


class KVStorage(ABC):
    """Whole pages of users, each in every layer; they are appended and never change."""
