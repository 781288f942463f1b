"""What explain tells an author to change is enough, and does to the numbers what it says."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hstu_compile
from hstu_compile.passes.report import Report
from tests.error_budget import FORWARD, assert_within_budget
from tests.models import hard_to_fuse as models

LENGTHS = torch.tensor([12, 7, 9])
LIVE = torch.arange(12) < LENGTHS[:, None]


def report_of(layer: nn.Module) -> Report:
    (report,) = hstu_compile.explain(layer, torch.randn(3, 12, 16), LENGTHS).reports
    return report


def assert_same_numbers(written: models.Layer, instead: type[models.Layer]) -> None:
    """Of the tokens that are not padded."""
    changed = instead()
    changed.load_state_dict(written.state_dict())
    written.eval(), changed.eval()
    x, exact = torch.randn(3, 12, 16), copy.deepcopy(written).double()
    triple = (changed(x, LENGTHS), written(x, LENGTHS), exact(x.double(), LENGTHS))
    assert_within_budget(*(out[LIVE] for out in triple), FORWARD)


def with_weights(weights: Callable[[Tensor, Tensor], Tensor], name: str = "weights") -> models.Layer:
    layer = models.Layer()
    setattr(layer, name, weights)
    return layer


class WithSDPA(models.Layer):
    """As explain tells the author of models.Softmax."""

    def attend(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, *vqk = self.split(x)
        v, q, k = (t.transpose(1, 2) for t in vqk)
        attn_mask = torch.where(self.mask(x, lengths), 0.0, -1e9).to(q.dtype)
        return u, F.scaled_dot_product_attention(q, k, v, attn_mask, scale=1.0).transpose(1, 2).flatten(2), x


def test_softmax_as_scaled_dot_product_attention() -> None:
    (miss,) = report_of(models.Softmax()).missed("attention")
    call = "F.scaled_dot_product_attention(q, k, v, attn_mask, scale=1.0), with q, k, v [B, H, N, D]"
    assert f"{call} and attn_mask 0 where kept, -1e+09 elsewhere" in (miss.change or "")
    assert "(same numbers in rows that keep a key)" in (miss.change or "")
    assert_same_numbers(models.Softmax(), WithSDPA)


SOFTMAX: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str | None]] = {
    "whole": (lambda s, mask: (s / 4).softmax(-1), "(q, k, v, scale=0.25), with q, k, v [B, H, N, D] (same numbers)"),
    "scaled after the mask": (
        lambda s, mask: (s.masked_fill(~mask, -1e8) * 0.5).softmax(-1),
        "scale=0.5), with q, k, v [B, H, N, D] and attn_mask 0 where kept, -5e+07 elsewhere",
    ),
    "minus infinity": (lambda s, mask: s.masked_fill(~mask, -torch.inf).softmax(-1), "0 where kept, -inf elsewhere"),
    "a bias": (
        lambda s, mask: (s * 0.5 + torch.ones(12, 12)).masked_fill(~mask, -1e9).softmax(-1),
        "scale=0.5), with q, k, v [B, H, N, D] and attn_mask what is added to the scores where kept, -1e+09 elsewhere",
    ),
    "dropout": (lambda s, mask: F.dropout(s.softmax(-1), 0.1), "scale=1.0, dropout_p=0.1), "),
    "over the queries": (lambda s, mask: s.softmax(-2), None),
    "masked with too little": (lambda s, mask: s.masked_fill(~mask, -5.0).softmax(-1), None),
    "masked afterwards": (lambda s, mask: s.softmax(-1) * mask, None),
    "scaled bias": (lambda s, mask: ((s + torch.ones(12, 12)) * 0.5).softmax(-1), None),
}


@pytest.mark.parametrize("kind", SOFTMAX)
def test_arguments_of_scaled_dot_product_attention(kind: str) -> None:
    weights, told = SOFTMAX[kind]
    (miss,) = report_of(with_weights(weights)).missed("attention")
    change = miss.change or ""
    assert "weights = F.silu(scores) / c * mask" in change
    assert ("scaled_dot_product_attention" in change) is (told is not None) and (told or "") in change, change


@pytest.mark.parametrize("shape", [(12, 1), (12,), (2, 1, 1)], ids=["query", "key", "head"])
def test_divisors_that_fit(shape: tuple[int, ...]) -> None:
    divisor = torch.rand(shape) + 1
    report = report_of(with_weights(lambda scores, mask: F.silu(scores) * mask / divisor))
    assert report.fused("attention") and not report.missed("attention")


class Copied(models.Layer):
    """models.WrittenInPlace with a copy, as explain tells."""

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.silu(self.uvqk(self.norm(x)))
        y, rest = y.unflatten(-1, (4, -1)), x.shape[:2]
        u, v, q, k = (y[..., i, :] for i in range(4))
        q = q.mul(0.5)
        return u, *(t.view(*rest, self.heads, -1) for t in (v, q, k))


def test_a_copy_instead_of_a_write_in_place() -> None:
    assert not report_of(Copied()).missed()
    assert_same_numbers(models.WrittenInPlace(), Copied)


class ScaledValues(models.Layer):
    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        u, v, q, k = super().split(x)
        return u, v * 0.5, q, k


class ScaledWeights(models.Layer):
    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        return super().weights(scores, mask) * 0.5


def test_a_constant_factor_of_v() -> None:
    (miss,) = report_of(ScaledValues()).missed()
    assert miss.pass_name == "packed_gradient" and "to the attention weights, after silu" in (miss.change or "")
    assert not report_of(ScaledWeights()).missed()
    assert_same_numbers(ScaledValues(), ScaledWeights)


def test_masked_queries_change_no_rows_but_padded_ones() -> None:
    assert not report_of(models.Layer()).missed()
    assert_same_numbers(models.PaddedKeysAlone(), models.Layer)
