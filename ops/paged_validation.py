"""Argument checks of the ops on a paged cache. Every message names the argument, its value and what was expected."""

from typing import Any

import torch
from torch import Tensor

from hstu_compile.ops.validation import check_attention_arguments, check_attention_values, expect, expect_same

PAGE_SIZES = (16, 32, 64, 128, 256)


def check_pages(
    k: Tensor, v: Tensor, pool: Tensor, page_table: Tensor, cached_lengths: Tensor, seq_offsets: Tensor
) -> None:
    """The pool, the table of its pages and what they hold; reads no tensor's content."""
    expect(pool.dim() == 5, "the shape of pool", tuple(pool.shape), "[num_pages, 2, page_size, H, D]")
    expect(pool.shape[1] == 2, "the shape of pool", tuple(pool.shape), "2 in dimension 1: keys and values")
    expect(pool.shape[2] in PAGE_SIZES, "the page size of pool", pool.shape[2], f"one of {PAGE_SIZES}")
    expect(pool.is_contiguous(), "the strides of pool", pool.stride(), "contiguous")
    for name, t in (("k", k), ("v", v)):
        expect(t.dim() == 3, f"the shape of {name}", tuple(t.shape), "[T, H, D]")
        expect(t.stride(-1) == 1 or t.shape[-1] == 1, f"the strides of {name}", t.stride(), "the last one 1")
        expect(t.dtype == pool.dtype, f"the dtype of {name}", t.dtype, f"that of pool, {pool.dtype}")
        expect(t.device == pool.device, f"the device of {name}", t.device, f"that of pool, {pool.device}")
        expect_same(t.shape[0], k.shape[0], f"the shape of {name}", tuple(t.shape), lambda: f"T = {k.shape[0]} as in k")
        for size, wanted in zip(t.shape[1:], pool.shape[3:], strict=True):
            expect_same(size, wanted, f"the shape of {name}", tuple(t.shape), lambda: f"[T, H, D] of pool {pool.shape}")
    batch = seq_offsets.shape[0] - 1
    for name, t, dims in (
        ("seq_offsets", seq_offsets, 1),
        ("page_table", page_table, 2),
        ("cached_lengths", cached_lengths, 1),
    ):
        dtypes = (torch.int32,) if t is page_table else (torch.int32, torch.int64)
        expect(t.dim() == dims, f"the shape of {name}", tuple(t.shape), f"{dims} dimensions")
        expect(t.dtype in dtypes, f"the dtype of {name}", t.dtype, " or ".join(map(str, dtypes)))
        expect(t.device == pool.device, f"the device of {name}", t.device, f"that of pool, {pool.device}")
        if t is not seq_offsets:
            expect_same(
                t.shape[0], batch, f"the shape of {name}", tuple(t.shape), lambda: f"B = {batch} of seq_offsets"
            )


def check_per_sequence(name: str, counts: Tensor | None, seq_offsets: Tensor) -> None:
    if counts is not None:
        batch = seq_offsets.shape[0] - 1
        expect(counts.dim() == 1, f"the shape of {name}", tuple(counts.shape), "one dimension")
        expect(counts.dtype in (torch.int32, torch.int64), f"the dtype of {name}", counts.dtype, "int32 or int64")
        device = seq_offsets.device
        expect(counts.device == device, f"the device of {name}", counts.device, f"that of all, {device}")
        expect_same(counts.shape[0], batch, f"the shape of {name}", tuple(counts.shape), lambda: f"B = {batch}")


def check_paged_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    *,
    seq_offsets: Tensor,
    **others: Any,
) -> None:
    """Of `paged_hstu_attention`; reads no tensor's content."""
    nothing: dict[str, Any] = dict.fromkeys(("seq_lengths", "attn_mask", "attn_bias", "mask_tile_states"))
    check_attention_arguments(q, k, v, seq_offsets=seq_offsets, **nothing, **others)
    check_pages(k, v, pool, page_table, cached_lengths, seq_offsets)


def check_paged_values(
    q: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    *,
    seq_offsets: Tensor,
    num_targets: Tensor | None,
    num_contextuals: Tensor | None,
    max_seq_len: int,
    contextual_seq_len: int,
    **_others,
) -> None:
    """Offsets, lengths, counts and page numbers themselves. On a GPU this waits for the device."""
    check_attention_values(
        q,
        seq_offsets=seq_offsets,
        seq_lengths=None,
        num_targets=num_targets,
        num_contextuals=num_contextuals,
        attn_mask=None,
        mask_tile_states=None,
        max_seq_len=max_seq_len,
        contextual_seq_len=contextual_seq_len,
    )
    if cached_lengths.numel() == 0:
        return
    num_pages, _, page_size = pool.shape[:3]
    room = page_table.shape[1] * page_size
    expect(bool((cached_lengths >= 0).all()), "cached_lengths", cached_lengths.tolist(), "no negative length")
    cached = int(cached_lengths.max())
    expect(cached <= room, "cached_lengths", cached_lengths.tolist(), f"at most {room}, the tokens of a row of pages")
    longest = int((cached_lengths + seq_offsets.diff()).max())
    expect(longest <= max_seq_len, "max_seq_len", max_seq_len, f"at least the longest sequence, {longest}")
    first_token = torch.arange(page_table.shape[1], device=page_table.device) * page_size
    pages = page_table[first_token < cached_lengths[:, None]]
    unknown = pages[(pages < 0) | (pages >= num_pages)].tolist()
    expect(not unknown, "page_table", unknown[:1], f"pages of history from 0 to {num_pages - 1}")
