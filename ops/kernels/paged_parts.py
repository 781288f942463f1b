"""Keys split over programs where a small batch would leave multiprocessors idle: partial sums, added in a fixed order.

How many parts is decided from shapes alone: it does not change under a CUDA graph, and no length is read back.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, run
from hstu_compile.ops.kernels.norm_gate_dropout import forward_launch
from hstu_compile.ops.kernels.partial_sums import PartialSums, Parts, buffers_of, sum_launch
from hstu_compile.ops.kernels.zero_tail import zero_launch

LEAST = 4  # tiles of keys of the longest sequence in a part: one more part costs as much time as a seventh of a tile


def parts_of(heads: int, rows: int, cols: int, processors: int, extent: Extent) -> int:
    """Of the keys of each tile of `rows` queries of a head, in tiles of `cols`.

    The last sequence of several counts for nothing: in a CUDA graph it is padding, with few keys or none.
    """
    tiles = max(-(-extent.rows // rows), min(extent.sequences - 1, extent.rows))
    return max(1, min(processors // max(1, tiles * heads), extent.max_seq_len // (LEAST * cols)))


def run_in_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    attention_launch: Callable[..., Launch],
    parts: Parts,
    counter_size: int,
    memory: dict[Hashable, Any] | None,
    call: dict[str, Any],
    gate: dict[str, Any] | None = None,
) -> Tensor:
    """The attention's result, or what the gate makes of it.

    attention_launch: takes the tensors, with the pool as its rows [num_pages * 2 * page_size, H, D]; for its results
        [T, H, D] or partial sums [parts, T, H, D]; a counter, None where there are parts; the page size; `parts`; and
        the call.
    counter_size: int32 elements of the counter, 0 when the attention starts.
    memory: the same for all calls, and no others, whose launches differ at most in addresses and their extent.
    gate: keywords of `norm_gate_dropout.forward` but for a, the attention's result. It adds the parts itself.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if gate is None else gate["out"]
    if not q.numel():
        return out
    seq_offsets = call["seq_offsets"]
    extent = Extent(q.shape[0], seq_offsets.shape[0] - 1, call["max_seq_len"])
    in_parts = parts(extent) > 1
    rows = pool.flatten(0, 2) if pool.numel() else k  # with no page at all, nothing is read
    operands = q, k, v, rows, page_table, cached_lengths

    def launches(workspace: Workspace) -> list[Launch]:
        if in_parts:
            sums = workspace.empty(torch.float32, lambda extent: (parts(extent), extent.rows, *q_shape))
            attention = attention_launch(*operands, sums, None, page_size=pool.shape[2], parts=parts, **call)
            partial = PartialSums(sums, q.dtype, seq_offsets, parts)
            if gate is None:
                return [attention, sum_launch(partial, out, extent)]
            return [attention, forward_launch(partial, **gate, extent=extent)]
        a = out if gate is None else workspace.empty(q.dtype, lambda extent: (extent.rows, *q_shape))
        counters = (workspace.empty(torch.int32, (counter_size,)),) if counter_size else ()
        counter = counters[0] if counters else None
        attention = attention_launch(*operands, a, counter, page_size=pool.shape[2], parts=parts, **call)
        done = [zero_launch((a,), seq_offsets, extent, counters), attention]
        return done if gate is None else [*done, forward_launch(a, **gate, extent=extent)]

    q_shape = q.shape[1:]
    tensors = [*operands, out, seq_offsets, call["num_targets"], call["num_contextuals"]]
    if gate is not None:
        tensors += [gate["u"], gate["weight"], gate["bias"]]
    run(memory, in_parts and buffers_of(parts(extent)), tensors, extent, launches)
    return out
