"""The attention kernels on a randomised grid: 18 kinds of call, what kernels are compiled for, times 18 random cases.

Every case: each kernel that supports it within the error budget, from memory full of NaN, with NaN in every row that
must not be read, and the same bits twice. The cases themselves are tested on the CPU, with the reference for a kernel.
"""

import os
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from torch import Tensor

from bench.attention_problem import Inputs, Reference, inputs, kernels, run_once
from bench.launches import in_parallel
from hstu_compile.ops.kernels import attention_sm90

CASES = 18  # of each kind
NAN = float("nan")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Kind(NamedTuple):
    attn_dim: int
    hidden_dim: int
    dtype: torch.dtype
    layout: str  # jagged, dense, or full: dense without lengths
    mask: str  # its clauses


EVERYTHING = "targets contextuals window shared"
KINDS = [
    Kind(64, 64, BF16, "jagged", ""),
    Kind(128, 128, BF16, "jagged", "targets"),
    Kind(256, 256, BF16, "jagged", "targets window"),
    Kind(32, 32, FP16, "jagged", "both ways"),
    Kind(96, 96, BF16, "jagged", "window"),
    Kind(192, 192, FP16, "jagged", "targets"),
    Kind(64, 128, BF16, "jagged", "targets contextuals"),
    Kind(256, 64, FP16, "jagged", EVERYTHING),
    Kind(128, 32, BF16, "jagged", "both ways targets window"),
    Kind(96, 192, FP16, "jagged", "targets contextual"),
    Kind(128, 128, BF16, "jagged", EVERYTHING),
    Kind(64, 64, FP16, "dense", EVERYTHING),
    Kind(128, 128, FP16, "full", ""),
    Kind(256, 256, FP16, "dense", "contextuals"),
    Kind(32, 256, BF16, "dense", "targets window shared"),
    Kind(192, 96, BF16, "dense", f"both ways {EVERYTHING}"),
    Kind(64, 64, FP32, "jagged", EVERYTHING),
    Kind(96, 128, FP32, "dense", "targets"),
]


class Case(NamedTuple):
    given: Inputs
    written: slice  # rows of the results that are the kernels' to write


def case_of(kind: Kind, number: int, device: torch.device, tile: int) -> Case:
    """The number-th random case; `tile` is about the side of a kernel's tiles."""
    rng = random.Random(f"{kind} {number}")
    torch.manual_seed(number)
    contextual = rng.randint(1, 9) if "contextual" in kind.mask.split() else 0
    lengths = random_lengths(rng, number, tile, contextual)
    longest = max(1, *lengths) + rng.choice([0, 0, 1, 5])
    if kind.layout == "full":
        lengths = [longest] * len(lengths)
    jagged, counts = kind.layout == "jagged", torch.int64 if kind.layout == "jagged" else torch.int32
    lead = [sum(lengths) + rng.choice([0, 3, tile])] if jagged else [len(lengths), longest]
    q, k, v, dout = random_tensors(rng, kind, lead, rng.randint(1, 4), device)
    where = torch.tensor(lengths, device=device)
    position = torch.arange(lead[-1], device=device)
    unused = position >= sum(lengths) if jagged else position >= where[:, None]
    for x in (q, k, v, dout):
        x[unused] = NAN
    call = {
        **inputs([1], 1, 1, device, kind.dtype).call,
        "seq_offsets": F.pad(where.cumsum(0), (1, 0)) if jagged else None,
        "seq_lengths": where.int() if kind.layout == "dense" else None,
        "max_seq_len": longest,
        "alpha": kind.attn_dim**-0.5 * rng.uniform(0.5, 2),
        "scale": 1 / rng.randint(1, longest),
        **random_mask(
            rng, kind.mask, lengths, contextual, tile, lambda x: torch.tensor(x, device=device, dtype=counts)
        ),
    }
    return Case(Inputs(q, k, v, dout, call), slice(sum(lengths) if jagged else None))


def random_lengths(rng: random.Random, number: int, tile: int, contextual: int) -> list[int]:
    """Empty ones, single tokens, whole tiles and one token more or less; each 0 or at least `contextual`.

    Unless all are empty, one has a tile: the budget is a statistic, and of few cells eager's error may be 0 by luck.
    """
    if number == 0:
        return [0, 0, 0]
    lengths = [rng.randint(tile, 3 * tile)]
    for _ in range(rng.randint(0, 5)):
        whole = tile * rng.randint(1, 3)
        length = rng.choice([0, 1, whole - 1, whole, whole + 1, rng.randint(1, 3 * tile), rng.randint(1, tile)])
        lengths.append(max(length, contextual) if length else 0)
    rng.shuffle(lengths)
    return lengths


def random_mask(
    rng: random.Random, clauses: str, lengths: list[int], contextual: int, tile: int, tensor: Callable[[list], Tensor]
) -> dict[str, Any]:
    mask: dict[str, Any] = {"causal": "both ways" not in clauses, "contextual_seq_len": contextual}
    left = [max(0, length - contextual) for length in lengths]
    if "targets" in clauses:
        targets = [rng.choice([0, rng.randint(0, n), rng.randint(0, n // 4)]) for n in left]
        left = [n - t for n, t in zip(left, targets, strict=True)]
        mask |= {"num_targets": tensor(targets), "target_group_size": rng.choice([1, 1, 3, rng.randint(2, tile)])}
    if "contextuals" in clauses:
        mask["num_contextuals"] = tensor([rng.choice([0, min(n, rng.randint(1, 9)), rng.randint(0, n)]) for n in left])
    if "window" in clauses:
        mask |= {
            "max_attn_len": rng.randint(1, 2 * tile),
            "min_full_attn_seq_len": rng.choice([0, rng.randint(1, tile)]),
        }
    return {**mask, "targets_share_position": "shared" in clauses}


def random_tensors(rng: random.Random, kind: Kind, lead: list[int], heads: int, device: torch.device) -> list[Tensor]:
    """q, k, v, dout, with NaN wherever else their memory reaches."""
    dims = [kind.attn_dim, kind.attn_dim, kind.hidden_dim, kind.hidden_dim]
    arrangement = rng.choice(["packed", "packed", "interleaved", "heads first", "contiguous"])

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, NAN, device=device, dtype=kind.dtype)

    if arrangement == "heads first" and len(lead) == 2:
        tensors = [empty(lead[0], heads, lead[1], dim).transpose(1, 2) for dim in dims]
    elif arrangement == "interleaved":
        tensors = [empty(*lead, heads, 3 * dim)[..., dim : 2 * dim] for dim in dims]
    else:
        tensors = [empty(*lead, heads, dim) for dim in dims]
    if arrangement == "packed":  # u, v, q, k
        sizes = [heads * dim for dim in (kind.hidden_dim, kind.hidden_dim, kind.attn_dim, kind.attn_dim)]
        _, v, q, k = empty(*lead, sum(sizes)).split(sizes, -1)
        tensors[:3] = [x.unflatten(-1, (heads, dim)) for x, dim in zip((q, k, v), dims[:3], strict=True)]
    for x in tensors:
        x.copy_(torch.randn(x.shape, device=device))
    return tensors


def check(case: Case, implementations: Mapping[str, Any]) -> None:
    q, k, v, dout, call = case.given
    want = run_once(Reference, Inputs(*(x.double() for x in case.given[:4]), call))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    plain = {name: value for name, value in call.items() if name != "scale"}
    out = eager_attention(*leaves, scaling_seq_len=1 / call["scale"], **plain)
    eager = [out, *torch.autograd.grad(out, leaves, dout.nan_to_num(0.0))]
    for name, kernel in implementations.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            poison_new_memory(monkeypatch)
            results, repeated = run_once(kernel, case.given), run_once(kernel, case.given)
        for result, *values in zip(("out", "dq", "dk", "dv"), results, repeated, eager, want, strict=True):
            ours, again, theirs, exact = (x[case.written] for x in values)
            m = FORWARD if result == "out" else BACKWARD
            assert_within_budget(ours, theirs, exact, m, f"{result} of {name}")
            assert torch.equal(ours, again), f"{result} of {name} differs from run to run"


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results holds NaN until a kernel writes it."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(NAN) if x.is_floating_point() else x

    return allocate_poisoned


def kernels_for(kind: Kind) -> dict[str, Any]:
    call = {"dtype": kind.dtype, "attn_dim": kind.attn_dim, "hidden_dim": kind.hidden_dim}
    call |= {"has_mask": False, "has_bias": False}
    capability = torch.cuda.get_device_capability()
    return {name: kernel for name, kernel in kernels().items() if kernel.unsupported(capability, **call) is None}


def compile_kind(index: int, name: str) -> None:
    run_once(kernels_for(KINDS[index])[name], case_of(KINDS[index], 1, torch.device("cuda"), tile=128).given)


@pytest.fixture(scope="module")
def compiled_kernels(request: pytest.FixtureRequest) -> None:
    """On every core, unless these tests themselves are spread over the cores."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        indices = [p["kind_index"] for p in parameters if "kind_index" in p]
        in_parallel(compile_kind, [(index, name) for index in indices for name in kernels_for(KINDS[index])])


@pytest.mark.cuda
@pytest.mark.parametrize("kind_index", range(len(KINDS)))
def test_grid(kind_index: int, compiled_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[kind_index]
    implementations = kernels_for(kind)
    assert implementations
    for number in range(CASES):
        monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", number % 2 * sys.maxsize)  # however short sequences are
        try:
            check(case_of(kind, number, torch.device("cuda"), tile=128), implementations)
        except AssertionError as error:
            raise AssertionError(f"{kind}, case {number}") from error


def small_case(index: int, number: int) -> Case:
    return case_of(KINDS[index], number, torch.device("cpu"), tile=16)


def test_the_grid_is_large_enough() -> None:
    assert len(set(KINDS)) * CASES >= 300


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_cases_with_the_reference_for_a_kernel(index: int) -> None:
    check(small_case(index, index % 5), {"reference": Reference})


class Wrong(Reference):
    """The reference, with its output spoiled; `calls` counts."""

    def __init__(self, spoil: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self.spoil, self.calls = spoil, 0

    def forward(self, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        self.calls += 1
        return self.spoil(Reference.forward(q, *args, **kwargs), q, self.calls)


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda out, q, calls: torch.empty(out.shape, dtype=out.dtype), "exceeds"),
        (lambda out, q, calls: out + 0 * q.sum().to(out.dtype), "exceeds"),
        (lambda out, q, calls: out * 1.05, "exceeds"),
        (lambda out, q, calls: torch.nextafter(out, out + calls - 1), "from run to run"),
    ],
    ids=["unwritten", "reads unused rows", "inexact", "not repeatable"],
)
def test_wrong_kernels_are_found(spoil: Callable, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        check(small_case(KINDS.index(Kind(96, 128, FP32, "dense", "targets")), 4), {"wrong": Wrong(spoil)})
