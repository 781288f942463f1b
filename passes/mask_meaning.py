"""What a captured mask may turn out to mean: the words in which the passes speak about masks."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx
from torch.nn import functional as F

from hstu_compile.passes.report import spoken

Scalar = int | fx.Node  # a Python int, or a graph node whose value is a SymInt
# What a dense mask does beyond the lengths: no rows and columns there; no columns, while rows attend to history; or
# rows and columns there are like any other, and the lengths only tell where history ends.
Padding = Literal["dead", "dead keys", "live"]


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
    """The mask in terms of hstu_compile::hstu_attention (see ops/attention_mask.py for the formula).

    Nodes are of the captured graph. seq_lengths, num_targets, num_contextuals: integer tensors of batch_size elements,
    1-D or with unit dimensions around it (reshape(-1) them). Scalars: int, or a SymInt node.
    seq_lengths is only set for dense regions (`seq_offsets` None). Where it does not end the sequences (`padding`), all
    tokens beyond history are the op's targets: max_seq_len - (seq_lengths - num_targets) of them.
    """

    causal: bool
    seq_lengths: fx.Node | None = None
    padding: Padding = "dead"
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
        words = ["causal" if self.causal else "full"]
        if self.seq_lengths is not None:
            what = {"dead": "padding", "dead keys": "padding of keys", "live": "history"}[self.padding]
            words.append(f"{what} by lengths: {spoken(self.seq_lengths)}")
        if self.num_targets is not None:
            groups = "" if self.target_group_size == 1 else f", groups of {self.target_group_size}"
            words.append(f"targets: {spoken(self.num_targets)}{groups}")
        if self.num_contextuals is not None:
            words.append(f"contextual rows: {spoken(self.num_contextuals)}")
        elif self.contextual_seq_len != 0:
            words.append(f"contextual rows: {self.contextual_seq_len}")
        if self.max_attn_len != 0:
            where = ""
            if self.num_targets is not None:
                where = " from the end of history" if self.targets_share_position else " from a target's own position"
            words.append(f"window {self.max_attn_len}{where}")
        if self.min_full_attn_seq_len != 0:
            words.append(f"the last {self.min_full_attn_seq_len} of history without window")
        return "; ".join(words)


@dataclass(frozen=True)
class Opaque:
    """The mask stays a tensor operand; why, and what would not."""

    reason: str
    change: str = (
        "build it from positions (arange, tril) and counts a sequence (lengths, offsets, targets) alone; "
        "of other data it stays a tensor"
    )


def silu_of_fill_is_zero(value: float, dtype: torch.dtype) -> bool:
    """Whether scores filled with `value` before silu give exactly zero, and zero gradient, in `dtype`.

    True for -1e4, -1e9, finfo.min; False for -inf (NaN) and -30 (-2.8e-12).
    The exact silu and its derivative must vanish in float32 (float64 for float64): half precisions compute in it too.
    """
    fill = torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype).double()
    if not fill.isfinite():
        return False
    fill.requires_grad_()
    with torch.enable_grad():
        result = F.silu(fill)
        (slope,) = torch.autograd.grad(result, fill)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return bool(result.detach().to(computed) == 0) and bool(slope.to(computed) == 0)
