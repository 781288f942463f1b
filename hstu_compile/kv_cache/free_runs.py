"""Free pages as runs of neighbours: what is taken together should lie together, and be copied at once."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import numpy as np

Run = tuple[int, int]  # the first page, and one behind the last
NO_PAGES = np.arange(0)


def pages_in(runs: Iterable[Run]) -> np.ndarray:
    """[n] int64."""
    return np.concatenate([NO_PAGES, *(np.arange(begin, end) for begin, end in runs)])


def runs_of(pages: np.ndarray) -> list[Run]:
    """As few as can be, in the order of the pages."""
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(pages, breaks) if len(run)]


class FreeRuns:
    """Pages 0 ... num_pages - 1, free at first. A piece of n pages takes O(log n) and what Python's insort moves."""

    def __init__(self, num_pages: int) -> None:
        self._count = 0
        self._ends: dict[int, int] = {}  # of runs by their first page
        self._begins: dict[int, int] = {}  # and the other way round
        self._of_length: dict[int, dict[int, None]] = {}  # first pages of runs
        self._lengths: list[int] = []  # that there are, sorted
        self.give((0, num_pages))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        yield from pages_in(self._ends.items()).tolist()

    def take(self, count: int) -> list[Run]:
        """So many pages, no more than are free: of the shortest run that has as many, else the longest ones whole."""
        taken = []
        while count:
            at = min(bisect_left(self._lengths, count), len(self._lengths) - 1)
            begin = next(iter(self._of_length[self._lengths[at]]))
            end = self._remove(begin)
            if end - begin > count:
                self._add(begin + count, end)
                end = begin + count
            taken.append((begin, end))
            count -= end - begin
        return taken

    def give(self, run: Run) -> None:
        """Free a run of pages that are not."""
        begin, end = run
        if begin < end:
            if end in self._ends:
                end = self._remove(end)
            if begin in self._begins:
                before = self._begins[begin]
                self._remove(before)
                begin = before
            self._add(begin, end)

    def _add(self, begin: int, end: int) -> None:
        length = end - begin
        self._ends[begin], self._begins[end] = end, begin
        self._count += length
        if length not in self._of_length:
            self._of_length[length] = {}
            insort(self._lengths, length)
        self._of_length[length][begin] = None

    def _remove(self, begin: int) -> int:
        """Returns its end."""
        end = self._ends.pop(begin)
        del self._begins[end]
        length = end - begin
        self._count -= length
        del self._of_length[length][begin]
        if not self._of_length[length]:
            del self._of_length[length]
            del self._lengths[bisect_left(self._lengths, length)]
        return end
