"""Paged HSTU attention on Hopper (sm_90): the forward of attention_sm90, whose streamed tiles of history lie in pages.

One product, persistent, with its output tiles drawn by ticket; where a small batch would leave multiprocessors idle,
its keys are split, and the parts of output tiles dealt out by rank. Deterministic.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels.attention_sm90 import (
    COUNTER,
    ROWS,
    SILU_TILES,
    batch_of,
    describe,
    family_of,
    filled_dim,
    group_of,
    kernels,
    loadable,
    pairs_of,
    result_of,
    ticket_sizes,
)
from hstu_compile.ops.kernels.launch import Extent, Launch, processors
from hstu_compile.ops.kernels.paged_attention_triton import pages_of
from hstu_compile.ops.kernels.paged_parts import parts_of, run_in_parts
from hstu_compile.ops.kernels.partial_sums import Parts

SWIZZLED = 64  # elements of a row in which TMA swizzles as one
REGISTERS = 232  # of a consumer's thread: with 240, as unpaged, there are too few for the producer to find pages with


def unsupported(capability: tuple[int, int], *, dtype: torch.dtype, dim: int) -> str | None:
    """Why the kernel can't run a call, in words; None if it can."""
    return attention_sm90.unsupported(
        capability, dtype=dtype, attn_dim=dim, hidden_dim=dim, has_mask=False, has_bias=False
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    *,
    memory: dict[Hashable, Any] | None = None,
    gate: dict[str, Any] | None = None,
    **call: Any,
) -> Tensor:
    """As in paged_attention_triton."""
    sms = processors(q.device)
    launch = functools.partial(attention_launch, sms)
    operands = q, k, v, pool, page_table, cached_lengths
    return run_in_parts(*operands, launch, parts_for(q, sms), COUNTER, memory, call, gate)


def parts_for(q: Tensor, sms: int) -> Parts:
    """On a GPU with so many multiprocessors."""
    cols, *_ = SILU_TILES[filled_dim(q, q)]
    return functools.partial(parts_of, q.shape[1], 2 * ROWS, cols, sms)


def attention_launch(
    sms: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    result: Tensor,
    counter: Tensor | None,
    *,
    page_size: int,
    parts: Parts,
    **call: Any,
) -> Launch:
    """See `run_in_parts`."""
    call |= {"cached_lengths": cached_lengths, "attn_mask": None, "attn_bias": None}
    (q, k, v, pool), _ = loadable(q, k, v, pool)
    width = filled_dim(q, q)
    cols, b_stages, c_stages = SILU_TILES[width]
    sizes = functools.partial(paged_sizes, q.shape[1], width, parts, sms)
    programs, numbers = sizes(Extent(q.shape[0], call["seq_offsets"].shape[0] - 1, call["max_seq_len"]))
    N, batch_rows, num_heads, *tickets = numbers.values()
    each, _, _, _, *mask = batch_of(q, 0, call)
    a_rows = describe(q, ROWS, width)
    arguments = (
        a_rows,
        a_rows,
        describe(k, cols, width),
        describe(v, cols, width),
        describe(pool, min(page_size, cols), min(width, SWIZZLED)),
        pages_of(page_table, cached_lengths, page_size),
        result_of(result),
        0.5 * call["alpha"],
        float(call["scale"]),
        each,
        N,
        batch_rows,
        num_heads,
        *mask,
        pairs_of(q, call),
        counter,
        *tickets,
    )
    constants = {"DIM": q.shape[-1], "D": width, "COLS": cols, "B_STAGES": b_stages, "C_STAGES": c_stages}
    constants |= {"GRAD": False, "IN_REGISTERS": width <= 128, "REGISTERS": REGISTERS}
    constants |= {"BEGINS_EARLY": True, "launch_pdl": True}
    constants |= {"FAMILY": family_of(call), "num_warps": 4, "maxnreg": 168}
    return Launch(kernels().product, programs, arguments, constants, sizes)


def paged_sizes(heads: int, width: int, parts: Parts, sms: int, extent: Extent) -> tuple[int, dict[str, int]]:
    """In the order of the kernel's arguments."""
    number = parts(extent)
    new = extent._replace(max_seq_len=min(extent.max_seq_len, extent.rows))
    programs, tickets = ticket_sizes(True, heads * number, 2 * ROWS, width, sms, new)
    tickets |= {"N": extent.max_seq_len, "group": group_of(heads, width, extent.max_seq_len), "parts": number}
    first = {"N": tickets.pop("N"), "batch_rows": extent.rows, "num_heads": heads * number}
    return programs, first | tickets
