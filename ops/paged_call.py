"""Which calls of the ops on a paged cache are of one kind: see call_kinds.py."""

from collections.abc import Hashable, Sequence

from torch import Tensor


def paged_features(
    new: Sequence[Tensor], pool: Tensor, page_table: Tensor, per_sequence: Sequence[Tensor | None]
) -> Hashable:
    """All of the tensors that checks ask for and launches differ in, but for addresses, T and B.

    new: [T, ...] each; per_sequence: seq_offsets [B + 1], and [B] or None.
    """
    tokens, batch = new[0].shape[:1], page_table.shape[0]
    counts = [None if t is None else (t.dtype, t.get_device(), t.numel() - batch, t.stride()) for t in per_sequence]
    rows = [(t.shape[:1] == tokens, t.shape[1:], t.stride(), t.dtype, t.get_device()) for t in new]
    paging = pool.shape, pool.stride(), pool.dtype, pool.get_device()
    table = page_table.shape[1:], page_table.stride(), page_table.dtype, page_table.get_device()
    return *counts, *rows, tokens > (1,), batch > 0, *paging, *table
