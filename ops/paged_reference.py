"""The ops on a paged cache in plain PyTorch: the CPU implementation, and in float64 the oracle of their tests."""

import torch
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import hstu_attention_reference


def places(seq_offsets: Tensor, cached_lengths: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that belong to a sequence, which one, and at which position of it."""
    row = torch.arange(total, device=seq_offsets.device)
    sequence = torch.searchsorted(seq_offsets[1:].contiguous(), row, right=True)  # empty ones own no row
    row, sequence = row[sequence < cached_lengths.numel()], sequence[sequence < cached_lengths.numel()]
    return row, sequence, cached_lengths[sequence] + row - seq_offsets[sequence]


def append_kv_reference(
    pool: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None,
    valid_lengths: Tensor | None,
) -> None:
    """Arguments as in `hstu_compile.ops.append_kv`."""
    num_pages, _, page_size = pool.shape[:3]
    row, sequence, position = places(seq_offsets, cached_lengths, k.shape[0])
    stored = position < page_table.shape[1] * page_size
    if num_targets is not None:
        stored &= row < seq_offsets[1:][sequence] - num_targets[sequence]
    if valid_lengths is not None:
        stored &= position // page_size >= valid_lengths[sequence] // page_size
    row, sequence, position = row[stored], sequence[stored], position[stored]
    page = page_table[sequence, position // page_size].long()
    known = (page >= 0) & (page < num_pages)
    row, page, position = row[known], page[known], position[known]
    pool[page, 0, position % page_size] = k[row]
    pool[page, 1, position % page_size] = v[row]


def paged_hstu_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    *,
    seq_offsets: Tensor,
    max_seq_len: int,
    **others,
) -> Tensor:
    """Arguments as in `hstu_compile.ops.paged_hstu_attention`: unpaged attention of whole, contiguous sequences."""
    lengths = cached_lengths + seq_offsets.diff()
    longest = int(lengths.max()) if lengths.numel() else 0  # max_seq_len may be far above it
    whole = [q.new_zeros(lengths.numel(), longest, *q.shape[1:]) for _ in range(3)]
    queries, keys, values = whole
    sequence, position = torch.nonzero(torch.arange(longest, device=q.device) < cached_lengths[:, None], as_tuple=True)
    page_size = pool.shape[2]
    page = page_table[sequence, position // page_size].long()
    keys[sequence, position] = pool[page, 0, position % page_size]
    values[sequence, position] = pool[page, 1, position % page_size]
    row, sequence, position = places(seq_offsets, cached_lengths, q.shape[0])
    for new, padded in zip((q, k, v), whole, strict=True):
        padded[sequence, position] = new[row]
    padded_out = hstu_attention_reference(queries, keys, values, seq_lengths=lengths, max_seq_len=longest, **others)
    out = q.new_zeros(q.shape)
    out[row] = padded_out[sequence, position]
    return out
