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
        # Where they begin and end in the request.
        self._spans = [(end - count, end) for end, count in zip(request.offsets[1:], new, strict=True)]
        self.num_sequences, self.num_rows = len(new), self._begins[-1]

    def rows(self) -> np.ndarray:
        """The new rows, as those of the request."""
        found = np.empty(self.num_rows, dtype=np.int64)
        self._fill_rows(found)
        return found

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
        self._fill_rows(rows)
        rows[self.num_rows :] = rows[self.num_rows - 1] if self.num_rows else 0
        sequences = self.num_sequences
        begins[: sequences + 1], begins[sequences + 1 :] = self._begins, self.num_rows
        cached[:sequences], cached[sequences:] = self._cached, 0
        self._batch.fill(page_table, valid)

    def _fill_rows(self, rows: np.ndarray) -> None:
        for begin, (first, last) in zip(self._begins, self._spans, strict=False):
            rows[begin : begin + last - first] = np.arange(first, last)
