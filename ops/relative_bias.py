"""A bias by how far apart row and column are, in positions and in time: two small tensors, never [B, H, N, N].

    bias[b, h, i, j] = position_bias[h, N - 1 + i - j] + time_bias[h, bucket(row_times[b, i] - col_times[b, j])]
    bucket(d) = how many time_boundaries are <= d, of |d| if time_symmetric

The difference and its absolute value are computed in the dtype of the times and wrap around as they do in PyTorch: the
absolute value of the least integer is itself. NaN is in bucket 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RelativeBias(NamedTuple):
    """position_bias and the rest may each be None; from time_bias on, all or none."""

    position_bias: Tensor | None  # [H|1, 2N - 1]
    time_bias: Tensor | None  # [H|1, K + 1]
    row_times: Tensor | None  # [B|1, N]
    col_times: Tensor | None
    time_boundaries: Tensor | None  # [K], never decreasing
    time_symmetric: bool

    @property
    def is_given(self) -> bool:
        return self.position_bias is not None or self.time_bias is not None


PARAMETERS = RelativeBias._fields
SCHEMA = (
    "Tensor? position_bias, Tensor? time_bias, Tensor? row_times, Tensor? col_times, Tensor? time_boundaries, "
    "bool time_symmetric"
)


def buckets(bias: RelativeBias) -> Tensor:
    """Of all rows and columns: [B|1, N, N] int64."""
    assert bias.row_times is not None and bias.col_times is not None and bias.time_boundaries is not None
    apart = bias.row_times[:, :, None] - bias.col_times[:, None, :]
    if bias.time_symmetric:
        apart = apart.abs()
    found = torch.bucketize(apart.contiguous(), bias.time_boundaries.contiguous(), right=True)
    return torch.where(apart.isnan(), 0, found)


def distances(N: int, device: torch.device) -> Tensor:
    """N - 1 + i - j: [N, N] int64."""
    position = torch.arange(N, device=device)
    return N - 1 + position[:, None] - position


def relative_bias_reference(bias: RelativeBias, N: int, dtype: torch.dtype) -> Tensor:
    """[B|1, H|1, N, N], differentiable in position_bias and time_bias."""
    total: Tensor | None = None
    if bias.position_bias is not None:
        total = bias.position_bias.to(dtype)[:, distances(N, bias.position_bias.device)][None]
    if bias.time_bias is not None:
        by_time = bias.time_bias.to(dtype)[:, buckets(bias)].transpose(0, 1)
        total = by_time if total is None else total + by_time
    assert total is not None
    return total


def position_bias_grad_reference(ds: Tensor, position_bias: Tensor) -> Tensor:
    """From ds [B, H, N, N], the gradient of every score, 0 where it is masked."""
    heads, N = position_bias.shape[0], ds.shape[-1]
    ds = ds.sum(0) if heads == ds.shape[1] else ds.sum((0, 1))[None]
    grad = ds.new_zeros(position_bias.shape).index_add_(1, distances(N, ds.device).flatten(), ds.flatten(1))
    return grad.to(position_bias.dtype)


def time_bias_grad_reference(ds: Tensor, bias: RelativeBias) -> Tensor:
    """The same for time_bias."""
    assert bias.time_bias is not None
    if bias.time_bias.shape[0] != ds.shape[1]:
        ds = ds.sum(1, keepdim=True)
    bucket = buckets(bias).expand(ds.shape[0], *ds.shape[2:])
    grad = ds.new_zeros(bias.time_bias.shape).index_add_(1, bucket.flatten(), ds.transpose(0, 1).flatten(1))
    return grad.to(bias.time_bias.dtype)
