"""What a step computes: the new rows of a request, and the pages that hold the others."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hstu_compile.kv_cache import Batch
from hstu_compile.serving.step import Request, Step


class Plan:
    """The new rows of a request: of those that the pages hold, some may be read of the result, and are new again."""

    def __init__(self, request: Request, batch: Batch) -> None:
        self._batch = batch
        self._cached = [min(n, first) for n, first in zip(batch.cached, request.first_read, strict=True)]
        new = [n - cached for n, cached in zip(request.lengths, self._cached, strict=True)]
        self._begins = list(itertools.accumulate(new, initial=0))
        ends = request.offsets[1:]
        pieces = [np.arange(end - count, end, dtype=np.int64) for end, count in zip(ends, new, strict=True)]
        self.rows = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)  # in the request

    @property
    def num_sequences(self) -> int:
        return len(self._cached)

    def tensors(self, rows: int, sequences: int, step: Step, max_pages: int) -> list[Tensor]:
        """The last inputs of a graph with so many rows and sequences, on the CPU: see `fill`."""
        sizes = (
            ((rows,), torch.int64),
            ((sequences + 1,), step.offsets_dtype),
            ((sequences, max_pages), torch.int32),
            ((sequences,), torch.int32),
            ((sequences,), torch.int32),
        )
        made = [torch.empty(size, dtype=dtype, device="cpu") for size, dtype in sizes]
        self.fill([x.numpy() for x in made])
        return made

    def fill(self, rooms: Sequence[np.ndarray]) -> None:
        """Write `paged_attention.INPUTS` to where there is room for as many rows and sequences or more.

        What is added belongs to no sequence: rows that are there once more, and sequences without tokens.
        """
        rows, begins, page_table, cached, valid = rooms
        count, sequences = len(self.rows), self.num_sequences
        rows[:count], rows[count:] = self.rows, self.rows[-1] if count else 0
        begins[: sequences + 1], begins[sequences + 1 :] = self._begins, self._begins[-1]
        cached[:sequences], cached[sequences:] = self._cached, 0
        self._batch.fill(page_table, valid)
