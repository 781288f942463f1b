"""What the kernels of attention read from the keywords of a call, on the way to every launch."""

from typing import Any

from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent


def num_sequences(q: Tensor, call: dict[str, Any]) -> int:
    offsets = call["seq_offsets"]
    return q.shape[0] if offsets is None else offsets.shape[0] - 1


def extent_of(q: Tensor, call: dict[str, Any]) -> Extent:
    return Extent(q.shape[0], num_sequences(q, call), call["max_seq_len"])


def given_tensors(call: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """All but q, k, v, gradients and results."""
    cells, states, _ = call["attn_mask"] or (None, None, 0)
    counts = call["seq_offsets"], call["seq_lengths"], call["num_targets"], call["num_contextuals"]
    return *counts, call["attn_bias"], cells, states
