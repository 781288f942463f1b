"""Jagged batches padded to a few token counts, for each of which CUDA graphs are recorded once: docs/cuda_graphs.md."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 128  # tokens: the tile of matrix products


def _expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"TokenBuckets: {name} is {value}, expected {expected}")


class TokenBuckets:
    """Pads jagged batches of any token count T to the next of a few, and of up to `batch_size` sequences to that many.

    Pad rows are zeros behind the last offset: they belong to no sequence. `out[:T]` are the rows that were there.

    Args:
        sizes: the token counts, in any order.
        batch_size: the number of sequences; None: as many as there are.

    Raises:
        ValueError: no sizes, or a number that is not positive.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int | None = None) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        self.batch_size = batch_size
        _expect(bool(self.sizes) and self.sizes[0] > 0, "sizes", list(sizes), "at least one, all positive")
        _expect(batch_size is None or batch_size > 0, "batch_size", batch_size, "a positive number of sequences")

    @classmethod
    def geometric(
        cls, min_tokens: int, max_tokens: int, count: int = 5, batch_size: int | None = None
    ) -> "TokenBuckets":
        """`count` sizes from min_tokens to max_tokens, each larger than the one before by the same factor.

        They are rounded up to multiples of 128, and are fewer than `count` where that makes two of them the same.

        Raises:
            ValueError: not 0 < min_tokens <= max_tokens, or no count of at least 2.
        """
        _expect(min_tokens > 0, "min_tokens", min_tokens, "a positive number")
        _expect(max_tokens >= min_tokens, "max_tokens", max_tokens, f"at least min_tokens, {min_tokens}")
        _expect(count >= 2, "count", count, "at least 2")
        factor = (max_tokens / min_tokens) ** (1 / (count - 1))
        exact = [*(round(min_tokens * factor**i) for i in range(count - 1)), max_tokens]
        return cls([math.ceil(size / ALIGNMENT) * ALIGNMENT for size in exact], batch_size)

    def __repr__(self) -> str:
        return f"TokenBuckets({list(self.sizes)}, batch_size={self.batch_size})"

    def size(self, num_tokens: int) -> int:
        """The smallest size that holds so many tokens.

        Raises:
            ValueError: none does.
        """
        for size in self.sizes:
            if num_tokens <= size:
                return size
        raise ValueError(
            f"TokenBuckets: num_tokens is {num_tokens}, expected at most {self.sizes[-1]}, the largest size"
        )

    def pad_tokens(self, x: Tensor) -> Tensor:
        """[T, ...] of any dtype -> [size(T), ...], zeros behind; differentiable: the gradient is that of the T rows.

        Raises:
            ValueError: T is above the largest size.
        """
        return _with_rows(x, self.size(x.shape[0]))

    def pad_sequences(self, x: Tensor) -> Tensor:
        """[B, ...], lengths or numbers of targets for example, -> [batch_size, ...], zeros behind: empty sequences.

        Raises:
            ValueError: B is above batch_size.
        """
        return _with_rows(x, self._sequences(x.shape[0]))

    def pad_offsets(self, seq_offsets: Tensor) -> Tensor:
        """[B + 1] -> [batch_size + 1], the last offset again and again: empty sequences.

        Raises:
            ValueError: B is above batch_size.
        """
        missing = self._sequences(seq_offsets.shape[0] - 1) + 1 - seq_offsets.shape[0]
        return torch.cat([seq_offsets, seq_offsets[-1:].expand(missing)])

    def _sequences(self, number: int) -> int:
        if self.batch_size is None:
            return number
        _expect(number <= self.batch_size, "the number of sequences", number, f"at most batch_size, {self.batch_size}")
        return self.batch_size


def _with_rows(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, rows - x.shape[0]])
