"""`hstu_compile::gated_paged_attention`: attention over a paged history and the gate that follows it. Inference only.

    norm_gate_dropout(paged_hstu_attention(q, k, v, pool), u)        without dropout

Where keys are split over programs, the gate's kernel adds up what these have summed: a launch less, and the attention's
result is never written. Bit for bit the same numbers.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_inference_only
from hstu_compile.ops.norm_gate_dropout import PARAMETERS as GATE_PARAMETERS
from hstu_compile.ops.norm_gate_dropout import (
    SCHEMA_WITHOUT_DROPOUT,
    TRITON,
    WITHOUT_DROPOUT,
    check_gate,
    empty_output,
    gate_features,
    runs_on,
)
from hstu_compile.ops.paged_hstu_attention import PARAMETERS, SCHEMA, attention_features, checked_kernel, run_kernel

torch.library.define(
    "hstu_compile::gated_paged_attention",
    f"({SCHEMA}, Tensor u, Tensor? weight, Tensor? bias, {SCHEMA_WITHOUT_DROPOUT}) -> Tensor",
)

_GATE = 6 + len(PARAMETERS)  # among the arguments, where u is


def gated_paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    u: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    attention: dict[str, Any],
    gate: dict[str, Any],
) -> Tensor:
    """norm_gate_dropout(paged_hstu_attention(q, k, v, pool), u). Inference only.

    Args:
        q, k, v, pool, page_table, cached_lengths: as in `paged_hstu_attention`.
        u, weight, bias: as in `norm_gate_dropout`; rows of no sequence are gated as if the attention were 0 there.
        attention: all of `paged_hstu_attention.PARAMETERS`.
        gate: all of `norm_gate_dropout.WITHOUT_DROPOUT`.

    Returns:
        [T, n * H * D] as of `norm_gate_dropout`, contiguous, the dtype of q. Deterministic.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
        RuntimeError: autograd is on and an input requires a gradient.
    """
    given = [attention[name] for name in PARAMETERS]
    given += [u, weight, bias, *(gate[name] for name in WITHOUT_DROPOUT)]
    return torch.ops.hstu_compile.gated_paged_attention(q, k, v, pool, page_table, cached_lengths, *given)


def _gate_named(args: tuple) -> dict[str, Any]:
    """By name, as in `norm_gate_dropout.PARAMETERS`."""
    return dict(zip(GATE_PARAMETERS, (*args[_GATE + 3 :], 0.0, args[0].dtype), strict=True))


@torch.library.register_fake("hstu_compile::gated_paged_attention")
def _fake(*args):
    a = torch.ops.hstu_compile.paged_hstu_attention(*args[:_GATE])
    (u, weight, bias), named = args[_GATE : _GATE + 3], _gate_named(args)
    check_gate(a, u, weight, bias, None, named)
    return empty_output(a, named)


def _checked_kernel(args: tuple) -> ModuleType | None:
    q, (u, weight, bias), named = args[0], args[_GATE : _GATE + 3], _gate_named(args)
    kernel = checked_kernel(args[:_GATE])
    check_gate(q, u, weight, bias, None, named)  # the attention's result is as q
    return kernel if runs_on(named, q, u, weight, bias) == TRITON else None


_kinds = Kinds(_checked_kernel)


@torch.library.impl("hstu_compile::gated_paged_attention", ("CPU", "CUDA"))
def _gated(*args):
    attention, (u, weight, bias), others = args[:_GATE], args[_GATE : _GATE + 3], args[_GATE + 3 :]
    features = attention_features(attention), gate_features(args[0], u, (weight, bias), others)
    kind, named = _kinds.kind(features, args), _gate_named(args)
    if kind.kernel is None:
        a = torch.ops.hstu_compile.paged_hstu_attention(*attention)
        return torch.ops.hstu_compile.norm_gate_dropout_forward(a, u, weight, bias, None, *named.values())
    out = empty_output(args[0], named)
    gate = {"u": u, "weight": weight, "bias": bias, "seed": None, "out": out, **named}
    return run_kernel(kind, attention, gate=gate)


register_inference_only("gated_paged_attention")
