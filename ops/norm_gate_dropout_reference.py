"""norm * gate, concatenation and dropout in plain PyTorch: the CPU implementation, and in float64 the oracle.

The dropout mask is a pure function of the seed and of an element's place (Philox4x32 with 7 rounds; Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same function as in the kernel: bit for bit the same mask.
"""

from typing import Any

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_KEYS = (0x9E3779B9, 0xBB67AE85)
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_LOW = 0xFFFFFFFF

NORM, GATED = 2, 3  # pieces of the output, in order: u, x, norm(x), norm(x) * act(u); they number the random streams


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where an operand is."""
    dtype = torch.float32
    for t in tensors:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit values held in int64."""
    high = ((b * (a >> 16)) + (b * (a & 0xFFFF) >> 16)) >> 16
    return high, (b * (a >> 16 << 16) + b * (a & 0xFFFF)) & _LOW


def random_bits(seed: Tensor, rows: int, piece: int, groups: int, width: int) -> Tensor:
    """[rows, groups, width] int64 in [0, 2^31): counters (column // 4, row, piece, group), word column % 4."""
    device = seed.device
    c0 = torch.arange((width + 3) // 4, device=device).view(1, 1, -1)
    c1 = torch.arange(rows, device=device).view(-1, 1, 1)
    c2 = torch.tensor(piece, device=device).view(1, 1, 1)
    c3 = torch.arange(groups, device=device).view(1, -1, 1)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(PHILOX_ROUNDS):
        (high0, low0), (high1, low1) = _multiply(_FACTORS[0], c0), _multiply(_FACTORS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEYS[0]) & _LOW, (k1 + _KEYS[1]) & _LOW
    words = torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)
    return words.flatten(-2)[..., :width] & 0x7FFFFFFF


def drop_below(dropout_ratio: float) -> int:
    """An element is dropped if its random 31 bits are below this."""
    return min(round(dropout_ratio * 2**31), 2**31 - 1)


def keep_scale(
    seed: Tensor | None, dropout_ratio: float, rows: int, piece: int, groups: int, width: int, dtype: torch.dtype
) -> Tensor | float:
    """What dropout multiplies a piece of the output by: 0 or 1 / (1 - ratio); [rows, groups, width]."""
    if seed is None:
        return 1.0
    keep = random_bits(seed, rows, piece, groups, width) >= drop_below(dropout_ratio)
    return keep.to(dtype) / (1 - dropout_ratio)


def _activated(u: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return u
    return torch.sigmoid(u) * (u if activation == "silu" else 1)


def _activation_grad(u: Tensor, activation: str) -> Tensor | float:
    if activation == "none":
        return 1.0
    s = torch.sigmoid(u)
    return s * (1 - s) if activation == "sigmoid" else s * (1 + u * (1 - s))


def _normalised(x: Tensor, norm_eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """xhat and 1 / deviation over the last dimension."""
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm_eps)
    return centred * rstd, rstd


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out = xhat if weight is None else xhat * weight.to(xhat.dtype)
    return out if bias is None else out + bias.to(xhat.dtype)


def norm_gate_dropout_reference(
    a: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    norm_eps: float,
    num_groups: int,
    rms: bool,
    activation: str,
    gate_first: bool,
    concat_u: bool,
    concat_activated: bool,
    concat_x: bool,
    concat_norm: bool,
    dropout_ratio: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Shapes and meaning as in `hstu_compile.ops.norm_gate_dropout`; differentiable by autograd."""
    dtype = compute_dtype(a, u)
    T, width = a.shape[0], a.shape[1:].numel()
    grouped = (T, num_groups, width // num_groups)
    x, g = (t.reshape(T, width).view(grouped).to(dtype) for t in (a, u))  # pieces can be viewed as rows again
    gate = _activated(g, activation)
    norm = _affine(_normalised(x * gate if gate_first else x, norm_eps, rms)[0], weight, bias)
    pieces = [
        (concat_u, gate if concat_activated else g),
        (concat_x, x),
        (concat_norm, norm),
        (True, norm if gate_first else norm * gate),
    ]
    kept = [
        (piece * keep_scale(seed, dropout_ratio, T, i, *grouped[1:], dtype)).view(T, width)
        for i, (wanted, piece) in enumerate(pieces)
        if wanted
    ]
    return torch.cat(kept, dim=1).to(out_dtype)


def norm_gate_dropout_backward_reference(
    dy: Tensor,
    a: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    *,
    norm_eps: float,
    num_groups: int,
    rms: bool,
    activation: str,
    gate_first: bool,
    concat_u: bool,
    concat_activated: bool,
    concat_x: bool,
    concat_norm: bool,
    dropout_ratio: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """da, du (contiguous, in the shapes of a and u), dweight, dbias."""
    dtype = compute_dtype(a, u)
    T, width = a.shape[0], a.shape[1:].numel()
    grouped = (T, num_groups, width // num_groups)
    x, g = a.reshape(grouped).to(dtype), u.reshape(grouped).to(dtype)
    wanted = [i for i, flag in enumerate((concat_u, concat_x, concat_norm, True)) if flag]
    dpieces: list[Tensor | float] = [0.0] * 4
    for i, piece in zip(wanted, dy.split(width, dim=1), strict=True):
        dpieces[i] = piece.reshape(grouped).to(dtype) * keep_scale(seed, dropout_ratio, T, i, *grouped[1:], dtype)

    gate = _activated(g, activation)
    xhat, rstd = _normalised(x * gate if gate_first else x, norm_eps, rms)
    dnorm: Any = dpieces[GATED] if gate_first else dpieces[GATED] * gate + dpieces[NORM]
    dxhat = dnorm if weight is None else dnorm * weight.to(dtype)
    mean = 0.0 if rms else dxhat.mean(-1, keepdim=True)
    dnormed = rstd * (dxhat - mean - xhat * (dxhat * xhat).mean(-1, keepdim=True))  # of what is normalised
    da = (dnormed * gate if gate_first else dnormed) + dpieces[1]
    dgate = dnormed * x if gate_first else dpieces[GATED] * _affine(xhat, weight, bias)
    dgate = dgate + dpieces[0] if concat_activated else dgate
    du = dgate * _activation_grad(g, activation) + (0.0 if concat_activated else dpieces[0])
    dweight = None if weight is None else (dnorm * xhat).sum(0).sum_to_size(weight.shape).to(weight.dtype)
    dbias = None if bias is None else dnorm.sum(0).sum_to_size(bias.shape).to(bias.dtype)
    return da.reshape(a.shape).to(a.dtype), du.reshape(u.shape).to(u.dtype), dweight, dbias
