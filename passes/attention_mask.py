"""Which member of the mask family a captured mask is, decided by what it evaluates to, not by how it is written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

Scalar = int | fx.Node  # a Python int, or a graph node whose value is a SymInt


@dataclass(frozen=True)
class MaskTerm:
    """One mask applied to the scores; a region may have several, a cell is live where all of them keep it.

    node: a tensor that broadcasts (right-aligned) against the scores.
    layout: what the scores' dimensions are where the term is applied: ("b", "h", "i", "j"), ("h", "b", "i", "j"),
        ("b", "i", "j", "h"), ...; heads folded into the batch: ("bh", "i", "j") for index b * num_heads + h.
        i is the query, j the key.
    role: how it acts: "keeps" (P * mask, where(mask, P, 0)), "drops" (masked_fill(mask, 0)),
        "adds" (scores + mask before silu; 0 keeps, a fill with `silu_of_fill_is_zero` drops).
    """

    node: fx.Node
    layout: tuple[str, ...]
    role: Literal["keeps", "drops", "adds"] = "keeps"


@dataclass(frozen=True)
class MaskMeaning:
    """The mask as parameters of hstu_compile::hstu_attention (see ops/attention_mask.py for the formula).

    Nodes are of the captured graph. seq_lengths, num_targets, num_contextuals: integer tensors of batch_size elements,
    1-D or with unit dimensions around it (reshape(-1) them). Scalars: int, or a SymInt node.
    seq_lengths is only set for dense regions (`seq_offsets` None) where rows and columns beyond it are dead.
    """

    causal: bool
    seq_lengths: fx.Node | None = None
    num_targets: fx.Node | None = None
    num_contextuals: fx.Node | None = None
    contextual_seq_len: Scalar = 0
    target_group_size: Scalar = 1
    max_attn_len: Scalar = 0
    min_full_attn_seq_len: Scalar = 0
    targets_share_position: bool = True

    @property
    def words(self) -> str:
        """For the report: "causal; targets: num_targets, groups of 2; contextual rows: 3; window 64"."""
        raise NotImplementedError


@dataclass(frozen=True)
class Opaque:
    """The mask stays a tensor operand; why."""

    reason: str


def identify(
    terms: Sequence[MaskTerm],
    *,
    batch_size: int | torch.SymInt,
    num_heads: int | torch.SymInt,
    max_seq_len: int | torch.SymInt,
    seq_offsets: fx.Node | None,
    padding_matters: bool,
) -> MaskMeaning | Opaque:
    """Find the member of the mask family that equals the product of `terms`.

    batch_size, num_heads, max_seq_len: sizes of the scores (ints or SymInts, as in `meta["val"].shape`).
    seq_offsets: the [B + 1] offsets of a jagged region, None for a dense one.
    padding_matters: False where cells with row or column >= length can't be seen in the result (a jagged region);
        True compares all max_seq_len x max_seq_len cells with what the op does there.
    No terms: every cell is live.
    """
    raise NotImplementedError


def silu_of_fill_is_zero(value: float, dtype: torch.dtype) -> bool:
    """Whether scores filled with `value` before silu give exactly zero, and zero gradient, in `dtype`.

    True for -1e4, -1e9, finfo.min; False for -inf (NaN) and -30 (-2.8e-12).
    """
    raise NotImplementedError
