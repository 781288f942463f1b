"""Gates behind an attention over a paged history, and the two in one launch and one after the other."""

from typing import Any
from unittest import mock

import torch
from paged_cases import Case
from torch import Tensor

from hstu_compile.ops.norm_gate_dropout import WITHOUT_DROPOUT
from hstu_compile.ops.paged_hstu_attention import PARAMETERS

# What differs from a layer norm of a row, and the affine's shape for H heads of D columns (None: there is none).
GATES: dict[str, tuple[dict[str, Any], Any]] = {
    "layer norm": ({}, lambda H, D: (H * D,)),
    "no affine": ({"activation": "silu"}, None),
    "rms norm": ({"rms": True, "activation": "sigmoid"}, lambda H, D: (H * D,)),
    "group norm": ({"num_groups": "H"}, lambda H, D: (H, 1)),
    "rms norm of heads, concat": (
        {"num_groups": "H", "rms": True, "concat_x": True, "concat_u": True},
        lambda H, D: (D,),
    ),
    "everything is joined": (
        {"concat_u": True, "concat_activated": True, "concat_x": True, "concat_norm": True, "activation": "silu"},
        lambda H, D: (H * D,),
    ),
    "norm of the product": ({"gate_first": True, "activation": "silu", "concat_x": True}, lambda H, D: (H * D,)),
}


def attention_arguments(case: Case) -> dict[str, Any]:
    """All of `paged_hstu_attention.PARAMETERS`."""
    default = {"num_targets": None, "num_contextuals": None, "causal": True, "contextual_seq_len": 0}
    default |= {"target_group_size": 1, "max_attn_len": 0, "min_full_attn_seq_len": 0, "targets_share_position": False}
    given = {"seq_offsets": case.seq_offsets, **default, **case.arguments}
    return {name: given[name] for name in PARAMETERS}


def make_gate(variant: str, case: Case) -> tuple[list[Tensor | None], dict[str, Any]]:
    """u, a slice of a packed buffer, weight and bias; and all of `norm_gate_dropout.WITHOUT_DROPOUT`."""
    q = case.new[0]
    (T, H, D), (change, affine) = q.shape, GATES[variant]
    u = torch.randn(T, 4 * H * D, device=q.device, dtype=torch.float32).to(q.dtype)[:, : H * D]
    weight, bias = (None if affine is None else torch.randn(affine(H, D), device=q.device) for _ in range(2))
    named: dict[str, Any] = {name: False for name in WITHOUT_DROPOUT}
    named |= {"norm_eps": 1e-6, "num_groups": 1, "activation": "none"} | change
    named["num_groups"] = H if named["num_groups"] == "H" else named["num_groups"]
    return [u, weight, bias], named


def together_and_apart(kernels: Any, case: Case, variant: str) -> list[Tensor]:
    """What the kernels give in one call, and attention and gate after each other, all from memory full of NaN."""
    from hstu_compile.ops.kernels import norm_gate_dropout

    (u, weight, bias), named = make_gate(variant, case)
    q, call = case.new[0], attention_arguments(case)
    call["scale"] = 1.0 / call.pop("scaling_seq_len")
    named |= {"dropout_ratio": 0.0, "out_dtype": q.dtype}
    pieces = 1 + sum(named[f"concat_{name}"] for name in ("u", "x", "norm"))
    outs = [q.new_full((q.shape[0], pieces * q.shape[1:].numel()), float("nan")) for _ in range(2)]
    with poisoned():
        gate = {"u": u, "weight": weight, "bias": bias, "seed": None, "out": outs[0], **named}
        given = kernels.forward(*case.operands, gate=gate, **call)
        a = kernels.forward(*case.operands, **call)
        norm_gate_dropout.forward(a, u, weight, bias, None, outs[1], **named)
    assert given is outs[0]
    return outs


def poisoned() -> Any:
    empty = torch.empty

    def full(*args: Any, **keywords: Any) -> Tensor:
        x = empty(*args, **keywords)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    return mock.patch.object(torch, "empty", full)
