"""The relative bias in the portable Triton attention, against float64. `test_relative_bias_triton.py` runs these tests:
on a GPU if there is one, else in a process of their own in the Triton interpreter.
"""

import pytest
import torch
from attention_triton_cases import (  # noqa: F401 (fixtures)
    ARGUMENTS,
    DEVICE,
    GPU,
    LENGTHS,
    MASKS,
    SMALL_GRAIN,
    B,
    H,
    N,
    inputs,
    poisoned,
    poisoned_results,
    tensor,
)
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from relative_bias_problem import TIMES, relative_bias
from tiled_masks import tiled

from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference, hstu_attention_reference
from hstu_compile.ops.kernels import attention_triton
from hstu_compile.ops.kernels.attention_triton_tiles import Tile, Tiles
from hstu_compile.ops.relative_bias import RelativeBias

TABLES = ("attn_bias", "position_bias", "time_bias")
BY_TIME = ("time_bias", "row_times", "col_times", "time_boundaries")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    if not GPU:
        tall, wide = Tile(32, 16, 4, 1), Tile(16, 32, 4, 1)
        made = Tiles(tall, wide, tall, wide, Tile(16, 16, 4, 1))
        monkeypatch.setattr(attention_triton, "tiles_for", lambda *_, **__: made)


def bias(dtype: torch.dtype = torch.int64, **given) -> dict:
    return relative_bias(B, H, N, dtype, device=DEVICE, **given)


def check(q, k, v, dout, arguments: dict, relative: dict) -> None:
    """Output and every gradient within the budget, the same bits twice."""
    arguments = {n: tensor(x) if isinstance(x, list) else x for n, x in arguments.items()}
    plain = {**arguments, **relative, "scaling_seq_len": 3.0}
    asked = [name for name in TABLES if plain[name] is not None]
    needs = {f"needs_{name.removeprefix('attn_')}_grad": name in asked for name in TABLES}
    wide = {n: plain[n].double() for n in (*asked, "attn_mask") if plain[n] is not None}
    args64 = [t.double() for t in (q, k, v)]
    want = [hstu_attention_reference(*args64, **{**plain, **wide})]
    want += hstu_attention_backward_reference(dout.double(), *args64, **{**plain, **wide}, **needs)
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *(plain[name] for name in asked))]
    eager = eager_attention(*leaves[:3], **{**plain, **dict(zip(asked, leaves[3:], strict=True))})
    used = ~dout.isnan().any(-1, keepdim=True)
    eager = [eager, *torch.autograd.grad(eager, leaves, torch.where(used, dout, 0))]
    kernel = {**arguments, "attn_mask": tiled(arguments["attn_mask"], SMALL_GRAIN), "scale": 1 / 3.0}
    kernel["relative_bias"] = RelativeBias(**relative)

    def run():
        grads = attention_triton.backward(dout, q, k, v, **kernel, **needs)
        return [attention_triton.forward(q, k, v, **kernel), *grads]

    names = ["out", "dq", "dk", "dv", *asked]
    got = run()
    again = run() if GPU else got
    for results in (got, again, want):
        results[4:] = [grad for grad in results[4:] if grad is not None]
        assert len(results) == len(names)
    for name, ours, theirs, reference, repeated in zip(names, got, eager, want, again, strict=True):
        if name not in TABLES and arguments["seq_offsets"] is not None:  # rows of no sequence are not the kernels'
            ours, theirs, reference, repeated = (t[: sum(LENGTHS)] for t in (ours, theirs, reference, repeated))
        assert_within_budget(ours, theirs, reference, FORWARD if name == "out" else BACKWARD, name)
        assert torch.equal(ours, repeated), f"{name} differs from run to run"


@pytest.mark.parametrize(
    "dtype, symmetric, shared", [(torch.int64, False, False), (torch.float32, True, True), (torch.int32, True, False)]
)
def test_jagged(dtype: torch.dtype, symmetric: bool, shared: bool) -> None:
    torch.manual_seed(0)
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    check(*tensors, arguments, bias(dtype, symmetric=symmetric, shared=shared))


@pytest.mark.parametrize("mask", ["everything", "full, everything", "window"])
def test_masks(mask: str) -> None:
    torch.manual_seed(1)
    *tensors, arguments = inputs("rows first", 16, 32, torch.float16)
    check(*tensors, {**arguments, **MASKS[mask]}, bias(shared=mask == "window", one_sequence=True))


@pytest.mark.parametrize("absent", [("position_bias",), BY_TIME])
def test_one_of_the_two(absent: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    *tensors, arguments = inputs("jagged", 24, 16, torch.float32)
    check(*tensors, arguments, bias(torch.float64) | dict.fromkeys(absent))


@pytest.mark.parametrize("heads", [1, H])
def test_beside_a_bias_and_a_mask_tensor(heads: int) -> None:
    """One table for each head, one for all: two gradients of one walk."""
    torch.manual_seed(3)
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    mask = torch.ones(N, N, device=DEVICE).tril().expand(1, heads, N, N).clone()
    mask[:, 0, : N // 2, : N // 3] = 0
    relative = bias()
    relative["position_bias"] = relative["position_bias"][:1]
    cells = {"attn_mask": mask, "attn_bias": torch.randn(1, 1, N, N, device=DEVICE)}
    check(*tensors, {**arguments, "causal": False, **cells}, relative)


@pytest.mark.parametrize("dtype", TIMES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_times_of_all_kinds(dtype: torch.dtype, symmetric: bool) -> None:
    """Differences that wrap around, infinities and NaN, not sorted; boundaries that are met, twice the same."""
    torch.manual_seed(4)
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    relative = bias(dtype, symmetric=symmetric)
    if dtype.is_floating_point:
        special = [0.1, float("inf"), -float("inf"), float("nan")]
        bounds = [-18, -5, 0, 0, 1, 17, 18, 19]
    else:
        least, greatest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        special = [least, least + 1, greatest, 0]
        bounds = [least, -18, -5, 0, 0, 1, 17, 18, 19, greatest]
    for name, first in (("row_times", 1), ("col_times", 3)):
        times = torch.randint(-9, 10, (B, N), device=DEVICE).to(dtype)
        for i, time in enumerate(special):
            times[:, first + 7 * i :: 29] = time
        relative[name] = times
    relative["time_boundaries"] = torch.tensor(bounds, device=DEVICE, dtype=dtype)
    relative["time_bias"] = torch.randn(H, len(bounds) + 1, device=DEVICE)
    check(*tensors, {**arguments, "causal": False}, relative)


def test_nothing_beyond_a_sequence_counts() -> None:
    torch.manual_seed(5)
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    relative = bias(torch.float32)
    clean = dict(relative)
    longest = max(LENGTHS)
    unused = torch.arange(N, device=DEVICE) >= tensor(LENGTHS)[:, None]
    for name in ("row_times", "col_times"):
        relative[name] = relative[name].masked_fill(unused, float("nan"))
    position = relative["position_bias"] = relative["position_bias"].clone()
    position[:, : N - longest] = position[:, N - 1 + longest :] = float("nan")
    kernel = {**arguments, "scale": 1.0}
    needs = {"needs_bias_grad": False, "needs_position_bias_grad": True, "needs_time_bias_grad": True}
    q, k, v, dout = tensors

    def run(given: dict) -> list:
        call = {**kernel, "relative_bias": RelativeBias(**given)}
        out = attention_triton.forward(q, k, v, **call)
        return [out, *attention_triton.backward(dout, q, k, v, **call, **needs)]

    for ours, wanted in zip(run(relative), run(clean), strict=True):
        assert (ours is None and wanted is None) or torch.equal(ours, wanted)


@pytest.mark.parametrize("count", [0, 1, 130])
def test_few_and_many_boundaries(count: int) -> None:
    torch.manual_seed(6)
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    check(*tensors, arguments, bias(num_boundaries=count, dtype=torch.float32))


def test_nothing_to_do() -> None:
    for sizes in ([0], [0, 0, 0]):
        q = torch.empty(0, H, 16, device=DEVICE)
        relative = relative_bias(len(sizes) - 1, H, 4, device=DEVICE)
        arguments = {**ARGUMENTS, "seq_offsets": tensor(sizes), "max_seq_len": 4, "alpha": 1.0, "scale": 1.0}
        arguments["relative_bias"] = RelativeBias(**relative)
        assert attention_triton.forward(q, q, q, **arguments).shape == q.shape
        needs = {"needs_bias_grad": False, "needs_position_bias_grad": True, "needs_time_bias_grad": True}
        grads = attention_triton.backward(q, q, q, q, **arguments, **needs)[4:]
        for grad, name in zip(grads, ("position_bias", "time_bias"), strict=True):
            assert torch.equal(grad, torch.zeros_like(relative[name]))
