"""What a page is, and whose it is."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

PAGE_SIZES = (16, 32, 64, 128, 256)


class Key(NamedTuple):
    """Whose keys and values these are: never served under other weights, nor to a history that was changed."""

    user: int | str
    version: int | str  # of the weights
    epoch: int | str  # of the history: within one it only grows


@dataclass(frozen=True)
class PageLayout:
    """The shape of a page: keys and values of `page_size` consecutive tokens of one user, in each layer.

    Raises:
        ValueError: a size that is not positive, or a page size other than 16, 32, 64, 128, 256.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    page_size: int = 32
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"PageLayout: {name} is {getattr(self, name)}, expected a positive number")
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"PageLayout: page_size is {self.page_size}, expected one of {PAGE_SIZES}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a page in one layer: [0] keys, [1] values."""
        return (2, self.page_size, self.num_heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        return 2 * self.num_layers * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """Of a page in one layer."""
        return self.page_size * self.token_bytes // self.num_layers

    def pages(self, tokens: int) -> int:
        """How many pages hold so many tokens."""
        return -(-tokens // self.page_size)
