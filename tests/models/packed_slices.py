"""u, v, q and k cut from one z, or from its silu, in every way: what can have one gradient, and what can't."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.ops import hstu_attention

B, N, H, D = 2, 8, 2, 4
W = H * D
HEADS = (B, N, H, D)


def attend(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    q, k, v = (t.reshape(-1, N, H, D) for t in (q, k, v))
    return hstu_attention(q, k, v, max_seq_len=N, alpha=0.5, scaling_seq_len=N, **more).flatten(2)


def gated(u: Tensor, a: Tensor) -> Tensor:
    return u * torch.tanh(a)


def split(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q, k, v))


def chunk_in_another_order(z: Tensor) -> Tensor:
    k, q, u, v = F.silu(z).chunk(4, dim=-1)
    return gated(u, attend(q, k, v))


def sliced(z: Tensor) -> Tensor:
    s = F.silu(z)
    q, k, v, u = (s[..., i * W : (i + 1) * W] for i in range(4))
    return gated(u, attend(q, k, v))


def unbound(z: Tensor) -> Tensor:
    q, k, v, u = F.silu(z).view(B, N, 4, H, D).unbind(2)
    return gated(u, attend(q, k, v).view(HEADS)).flatten(2)


def u_viewed_first(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    u = u.view(HEADS).transpose(1, 2)
    return gated(u, attend(q, k, v).view(HEADS).transpose(1, 2)).transpose(1, 2).flatten(2)


def wide_u(z: Tensor) -> Tensor:
    q, u, k, v = F.silu(torch.cat([z, z[..., :5]], dim=-1)).split([W, W + 5, W, W], dim=-1)
    return gated(u[..., :W], attend(q, k, v)) + u.sum()


def silu_on_u_only(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    return gated(F.silu(u), attend(q, k, v))


def silu_of_u_used_twice(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    u = F.silu(u)
    return gated(u, attend(q, k, v)) + u


def silu_of_each(z: Tensor) -> Tensor:
    u, v, q, k = map(F.silu, z.split(W, dim=-1))
    return gated(u, attend(q, k, v))


def silu_of_q_and_v(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    return gated(u, attend(F.silu(q), k, F.silu(v.view(HEADS))))


def silu_of_all_for_u_alone(z: Tensor) -> Tensor:
    v, q, k = z[..., W:].split(W, dim=-1)
    return gated(F.silu(z)[..., :W], attend(q, k, v))


def no_silu(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    return gated(u, attend(q, k, v))


def interleaved(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).view(B, N, H, 4 * D).split(D, dim=-1)
    return gated(u.flatten(2), attend(q, k, v))


def interleaved_after_silu(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z.view(B, N, H, 4 * D)).unflatten(-1, (4, D)).unbind(-2)
    return gated(u, attend(q, k, v).view(HEADS)).flatten(2)


def interleaved_silu_of_u_and_k(z: Tensor) -> Tensor:
    k, v, q, u = z.view(B, N, H, 4 * D).chunk(4, dim=-1)
    return gated(F.silu(u), attend(q, F.silu(k), v).view(HEADS)).flatten(2)


def q_k_and_v_interleaved_after_u(z: Tensor) -> Tensor:
    u, rest = z.split([W, 3 * W], dim=-1)
    q, k, v = rest.view(B, N, H, 3 * D).split(D, dim=-1)
    return gated(F.silu(u), attend(q, k, v))


def two_silus_of_q(z: Tensor) -> Tensor:
    """The gradient of the first silu is the packed one."""
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(F.silu(q), k, v))


def permuted(z: Tensor) -> Tensor:
    """Split from a copy of the silu, whose gradient is the packed one."""
    u, v, q, k = F.silu(z).view(B, N, H, 4, D).transpose(2, 3).reshape(B, N, 4 * W).split(W, dim=-1)
    return gated(u, attend(q, k, v))


def bias(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q, k, v, attn_bias=torch.ones(1, 1, N, N)))


# What is said of silu and split.
RIGHT = {
    split: "silu -> split u, v, q, k",
    chunk_in_another_order: "silu -> split k, q, u, v",
    sliced: "silu -> split q, k, v, u",
    unbound: "silu -> split q, k, v, u",
    u_viewed_first: "silu -> split u, v, q, k",
    wide_u: "silu -> split q, u, k, v",
    silu_on_u_only: "split u, v, q, k -> silu on u",
    silu_of_u_used_twice: "split u, v, q, k -> silu on u",
    silu_of_each: "split u, v, q, k -> silu on u, v, q, k",
    silu_of_q_and_v: "split u, v, q, k -> silu on v, q",
    silu_of_all_for_u_alone: "split u, v, q, k -> silu on u",
    no_silu: "split u, v, q, k",
    bias: "silu -> split u, v, q, k",
    interleaved: "silu -> split u, v, q, k",
    interleaved_after_silu: "silu -> split u, v, q, k",
    interleaved_silu_of_u_and_k: "split k, v, q, u -> silu on k, u",
    q_k_and_v_interleaved_after_u: "split u, q, k, v -> silu on u",
    two_silus_of_q: "split u, v, q, k -> silu on q",
    permuted: "split u, v, q, k",
}


def second_use_of_k(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q, k, v)) + k


def second_use_of_a_view_of_v(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    v = v.view(HEADS)
    return gated(u, attend(q, k, v)) + v.flatten(2)


def second_use_of_the_silu(z: Tensor) -> Tensor:
    s = F.silu(z)
    u, v, q, k = s.split(W, dim=-1)
    return gated(u, attend(q, k, v)) + s.sum()


def no_u(z: Tensor) -> Tensor:
    v, q, k = F.silu(z).split([2 * W, W, W], dim=-1)
    return attend(q, k, v[..., :W])


def unused_u(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    return attend(q, k, v)


def two_us(z: Tensor) -> Tensor:
    u, w, v, q, k = F.silu(torch.cat([z, z[..., :W]], dim=-1)).split(W, dim=-1)
    return gated(u, attend(q, k, v)) + w


def columns_that_nobody_uses(z: Tensor) -> Tensor:
    u, _, v, q, k = F.silu(torch.cat([z, z[..., :W]], dim=-1)).split(W, dim=-1)
    return gated(u, attend(q, k, v))


def overlapping(z: Tensor) -> Tensor:
    s = F.silu(z)
    u, v, q, k = s[..., :W], s[..., W : 2 * W], s[..., 2 * W : 3 * W], s[..., 2 * W : 3 * W]
    return gated(u, attend(q, k, v))


def the_same_slice_twice(z: Tensor) -> Tensor:
    u, v, q, _ = F.silu(z).split(W, dim=-1)
    return gated(u, attend(q, q, v))


def halves_of_a_head_apart(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).view(B, N, D // 2, 4, H, 2).permute(0, 1, 3, 4, 2, 5).unbind(2)
    return gated(u.reshape(B, N, W), hstu_attention(*(t.reshape(HEADS) for t in (q, k, v)), max_seq_len=N,
                                                    alpha=0.5, scaling_seq_len=N).flatten(2))  # fmt: skip


def columns_of_a_head_apart(z: Tensor) -> Tensor:
    s = F.silu(z)
    u, v, q, k = (s[..., i::4] for i in range(4))
    return gated(u, attend(q, k, v))


def u_and_its_silu(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    return gated(F.silu(u), attend(q, k, v)) + u


def k_and_its_silu(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    return gated(F.silu(u), attend(q, F.silu(k), v)) + k


def one_silu_of_u_and_v(z: Tensor) -> Tensor:
    uv, q, k = z.split([2 * W, W, W], dim=-1)
    u, v = F.silu(uv).split(W, dim=-1)
    return gated(u, attend(q, k, v))


def base_of_x_is_written(z: Tensor) -> Tensor:
    flat = (z * 1).view(B * N, 4 * W)
    u, v, q, k = flat.view(B, N, 4 * W).split(W, dim=-1)
    u = F.silu(u)
    flat.mul_(2)
    return gated(u, attend(q, k, v))


def split_without_grad(z: Tensor) -> Tensor:
    with torch.no_grad():
        u, v, q, k = z.split(W, dim=-1)
    return gated(u, attend(q, k, v))


def u_before_attention(z: Tensor) -> Tensor:
    u, v, q, k = F.silu(z).split(W, dim=-1)
    u = torch.sin(u)
    return gated(u, attend(q, k, v))


def x_is_written(z: Tensor) -> Tensor:
    z = z * 1
    s = F.silu(z)
    z.mul_(2)
    u, v, q, k = s.split(W, dim=-1)
    return gated(u, attend(q, k, v)) + z.sum()


def u_is_written(z: Tensor) -> Tensor:
    s = F.silu(z)
    u, v, q, k = (s[..., i * W : (i + 1) * W] for i in range(4))
    a = attend(q, k, v)
    u.mul_(2)
    return gated(u, a)


def grad_mode(z: Tensor) -> Tensor:
    with torch.no_grad():
        s = F.silu(z)
    u, v, q, k = s.split(W, dim=-1)
    return gated(u, attend(q, k, v))


def silu_of_u_behind_the_attention(z: Tensor) -> Tensor:
    u, v, q, k = z.split(W, dim=-1)
    a = attend(q, k, v)
    u = F.silu(u)
    return gated(u, a) + u


EXPLAINED = {
    silu_of_u_behind_the_attention: "u is made after the attention: silu",
    second_use_of_k: "k has a second use",
    second_use_of_a_view_of_v: "v has a second use",
    second_use_of_the_silu: "all of silu has another use: sum",
    no_u: "0 used slices besides q, k and v",
    unused_u: "0 used slices besides q, k and v",
    two_us: "2 used slices besides q, k and v",
    columns_that_nobody_uses: "not all columns",
    overlapping: "not all columns of x, each once",
    the_same_slice_twice: "second use|another role",
    columns_of_a_head_apart: "are not those of heads evenly apart",
    u_and_its_silu: "u is used before the attention: silu",
    k_and_its_silu: "k has a second use: add",
    one_silu_of_u_and_v: "v has a second use",
    base_of_x_is_written: "written in place by mul_",
    split_without_grad: "grad mode changes",
    u_before_attention: "u is used before the attention: sin",
    x_is_written: "all of mul has another use: mul_",
    u_is_written: "written in place by mul_",
    grad_mode: "grad mode changes",
}
