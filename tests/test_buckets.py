"""Jagged batches padded to a few sizes: the same rows, the same gradients, one compilation."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import hstu_compile
from hstu_compile import TokenBuckets
from tests.error_budget import BACKWARD, FORWARD, assert_within_budget
from tests.fbgemm_stand_ins import in_plain_pytorch
from tests.models import MODELS
from tests.without_codegen import Compiled, inductor_without_codegen

PAD = TokenBuckets([96, 64, 128], batch_size=12)


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    yield from inductor_without_codegen(monkeypatch)


@given(st.lists(st.integers(0, 9), max_size=12), st.sampled_from([torch.int32, torch.int64]))
def test_sequences_stay_what_they_are(lengths: list[int], dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    total = int(offsets[-1])
    for x in (torch.randn(total, 2, 3), torch.arange(total), torch.ones(total, 1, dtype=torch.bool)):
        padded = PAD.pad_tokens(x)
        assert padded.shape == (PAD.size(total), *x.shape[1:]) and padded.dtype == x.dtype
        assert torch.equal(padded[:total], x) and not padded[total:].any()
    padded = PAD.pad_offsets(offsets)
    assert padded.dtype == dtype
    given_lengths = torch.tensor(lengths, dtype=dtype)
    assert torch.equal(PAD.pad_sequences(given_lengths), padded.diff())
    assert padded.diff().tolist() == lengths + [0] * (12 - len(lengths))


def test_sizes() -> None:
    assert [PAD.size(n) for n in (0, 1, 64, 65, 96, 97, 128)] == [64, 64, 64, 96, 96, 128, 128]
    assert TokenBuckets.geometric(4096, 65536).sizes == (4096, 8192, 16384, 32768, 65536)
    assert TokenBuckets.geometric(1000, 3000, count=3).sizes == (1024, 1792, 3072)
    assert TokenBuckets.geometric(1, 100, count=7).sizes == (128,)
    for least, most, count in ((3 << 7, 1023 << 7, 8), (7 << 7, 99999 << 7, 13)):
        sizes = TokenBuckets.geometric(least, most, count).sizes
        assert len(sizes) == count and (sizes[0], sizes[-1]) == (least, most)
    assert TokenBuckets([8]).pad_offsets(torch.tensor([0, 3, 5])).tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: PAD.pad_tokens(torch.zeros(129, 2)), "num_tokens is 129, expected at most 128"),
        (lambda: PAD.pad_sequences(torch.zeros(13)), "number of sequences is 13, expected at most batch_size, 12"),
        (lambda: PAD.pad_offsets(torch.zeros(14)), "number of sequences is 13, expected at most batch_size, 12"),
        (lambda: TokenBuckets([]), r"sizes is \[\], expected at least one"),
        (lambda: TokenBuckets([4, 0]), r"sizes is \[4, 0\], expected .* positive"),
        (lambda: TokenBuckets([4], batch_size=0), "batch_size is 0, expected a positive"),
        (lambda: TokenBuckets.geometric(0, 4), "min_tokens is 0, expected a positive"),
        (lambda: TokenBuckets.geometric(5, 4), "max_tokens is 4, expected at least min_tokens, 5"),
        (lambda: TokenBuckets.geometric(4, 5, count=1), "count is 1, expected at least 2"),
    ],
)
def test_errors(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def gradients(out: Tensor, model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [*inputs, *model.parameters()]))


@pytest.mark.parametrize("name", ["meta_stu", "nvidia_native"])
def test_training(name: str, inductor: Compiled) -> None:
    """The rows and their gradients bit by bit; gradients of parameters, sums over the rows in another order, in budget.

    And one compilation more than where all sizes are one.
    """
    case = MODELS[name]
    model, exact_model = case.model(), case.model().double()
    exact_model.load_state_dict(model.state_dict())
    run = torch.compile(model, backend=hstu_compile.backend, options={"strict": True, "expect": 1})
    batches = [case.arguments(batch, seed=batch) for batch in (5, 9, 12)]

    results, used = [], set()
    for x, offsets, *others in batches:
        x.requires_grad_()
        padded = PAD.pad_tokens(x)
        sequences = [PAD.pad_sequences(t) if isinstance(t, Tensor) else t for t in others]
        out = run(padded, PAD.pad_offsets(offsets), *sequences)[: x.shape[0]]
        dpadded, *grads = gradients(out, model, padded, x)
        assert (dpadded[x.shape[0] :] == 0).all()
        results.append([out, *grads])
        used.add(padded.shape[0])
    assert used == set(PAD.sizes) and len(inductor.graphs) == 2

    for (x, offsets, *others), (out, dx, *dparameters) in zip(batches, results, strict=True):
        plain = run(x, offsets, *others)
        assert torch.equal(out, plain)
        assert torch.equal(dx, gradients(plain, model, x)[0])
        exact_x = x.detach().double().requires_grad_()
        with in_plain_pytorch():
            eager, exact = model(x, offsets, *others), exact_model(exact_x, offsets, *others)
            all_eager, all_exact = gradients(eager, model, x), gradients(exact, exact_model, exact_x)
        assert_within_budget(out, eager, exact, FORWARD)
        for (parameter, _), *values in zip(
            model.named_parameters(), dparameters, all_eager[1:], all_exact[1:], strict=True
        ):
            assert_within_budget(*values, BACKWARD, parameter)


def test_exact_sums_are_equal() -> None:
    """Of whole numbers every sum is exact in any order: what pad rows add to the gradient of a parameter is 0."""
    x = torch.randint(-8, 9, (37, 16)).float()
    weights = torch.randint(-8, 9, (37, 4)).float()
    linear = nn.Linear(16, 4)
    plain = torch.autograd.grad((linear(x) * weights).sum(), list(linear.parameters()))
    padded = torch.autograd.grad((linear(PAD.pad_tokens(x))[:37] * weights).sum(), list(linear.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, padded, strict=True))


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_norm_of_pad_rows(eps: float) -> None:
    norm, x = nn.LayerNorm(8, eps=eps), torch.randn(37, 8, requires_grad=True)
    grads = gradients(F.silu(norm(norm(PAD.pad_tokens(x))))[:37], norm, x)
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_inside_torch_compile() -> None:
    def padded(x: Tensor, offsets: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return PAD.pad_tokens(x) * 2, PAD.pad_offsets(offsets), PAD.pad_sequences(lengths)

    compiled = torch.compile(padded, backend="aot_eager", fullgraph=True, dynamic=True)
    for total in (60, 61, 70, 128):
        args = torch.randn(total, 3, requires_grad=True), torch.tensor([0, 4, total]), torch.tensor([4, total - 4])
        for ours, eager in zip(compiled(*args), padded(*args), strict=True):
            assert torch.equal(ours, eager)
    with pytest.raises(Exception, match="num_tokens is 129, expected at most 128"):
        compiled(torch.randn(129, 3), torch.tensor([0, 129]), torch.tensor([129]))
