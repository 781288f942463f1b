"""Norms written out: which x, eps and kind are read from them, the same numbers, and what only looks like one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hstu_compile.passes.norm import as_norm
from tests.tracing import traced

EPS = 1e-3
W = 8


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def of_two_statistics(x: Tensor) -> Tensor:
    return centred(x) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def of_var_mean(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return torch.rsqrt(var + EPS) * (x - mean)


def of_mean_squares(x: Tensor) -> Tensor:
    c = centred(x)
    return c * (c.pow(2).mean(-1, keepdim=True) + EPS) ** -0.5


def centred_twice(x: Tensor) -> Tensor:
    return centred(x) / ((centred(x) * centred(x)).mean(dim=1, keepdim=True) + EPS).sqrt()


def of_the_variance_of_the_centred(x: Tensor) -> Tensor:
    c = centred(x)
    return c * torch.reciprocal(torch.sqrt(x.var(-1, correction=0, keepdim=True) + EPS))


def in_double(x: Tensor) -> Tensor:
    wide = x.double()
    return (centred(wide) * torch.rsqrt(wide.var(1, unbiased=False, keepdim=True) + EPS)).to(x.dtype)


def rms_by_a_power(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS) ** 0.5


LAYER_NORMS = [
    of_two_statistics,
    of_var_mean,
    of_mean_squares,
    centred_twice,
    of_the_variance_of_the_centred,
    in_double,
]


@pytest.mark.parametrize("written", [*LAYER_NORMS, rms_by_a_power], ids=lambda f: f.__name__)
def test_read(written: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, W)
    gm = traced(written, [x])
    (out,) = gm.graph.find_nodes(op="output")
    node = out.args[0]
    while str(node.target).startswith("aten._to_copy") or node.target is torch.ops.aten.to.dtype:
        node = node.args[0]
    norm = as_norm(node)
    assert norm is not None and (norm.run, norm.eps) == (W, EPS) and not norm.has_affine
    assert norm.rms == (written is rms_by_a_power)
    source = norm.x
    while source.op != "placeholder":
        source = source.args[0]
    assert all(user in norm.interior or user is norm.x for user in source.users), "a call of the norm is left out"
    same = F.rms_norm(x, (W,), eps=EPS) if norm.rms else F.layer_norm(x, (W,), eps=EPS)
    torch.testing.assert_close(written(x), same)


def with_bessel(x: Tensor) -> Tensor:
    return centred(x) / torch.sqrt(x.var(-1, keepdim=True) + EPS)


def eps_outside(x: Tensor) -> Tensor:
    return centred(x) / (torch.sqrt(x.var(-1, unbiased=False, keepdim=True)) + EPS)


def over_rows(x: Tensor) -> Tensor:
    return (x - x.mean(0, keepdim=True)) / torch.sqrt(x.var(0, unbiased=False, keepdim=True) + EPS)


def mean_over_rows(x: Tensor) -> Tensor:
    return (x - x.mean(0, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def not_centred(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def variance_of_another(x: Tensor) -> Tensor:
    return centred(x) / torch.sqrt((2 * x).var(-1, unbiased=False, keepdim=True) + EPS)


def squares_of_what_is_not_centred(x: Tensor) -> Tensor:
    return centred(x) / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def twice_the_mean(x: Tensor) -> Tensor:
    return torch.sub(x, x.mean(-1, keepdim=True), alpha=2) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def cubes(x: Tensor) -> Tensor:
    return x / torch.sqrt(x.pow(3).mean(-1, keepdim=True) + EPS)


def root_upside_down(x: Tensor) -> Tensor:
    return centred(x) * torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def the_two_of_var_mean_exchanged(x: Tensor) -> Tensor:
    mean, var = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS)


@pytest.mark.parametrize(
    "written",
    [with_bessel, eps_outside, over_rows, mean_over_rows, not_centred, variance_of_another,
     squares_of_what_is_not_centred, twice_the_mean, cubes, root_upside_down, the_two_of_var_mean_exchanged],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_only_looks_like_one(written: Callable[[Tensor], Tensor]) -> None:
    gm = traced(written, [torch.randn(W, W)])
    assert all(as_norm(node) is None for node in gm.graph.nodes)
