"""Attention over a paged history and its gate in one op: the numbers of the two ops, bit for bit, on any device.

In the Triton interpreter: paged_triton_cases.py.
"""

import sys
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from gated_paged_cases import GATES, attention_arguments, make_gate, poisoned, together_and_apart
from paged_cases import MASKS, NEW, Case, H, cached_around, make_case
from test_paged_attention import DEVICE, DTYPES, KERNELS, of_processors
from torch import Tensor

from hstu_compile.ops import gated_paged_attention, kernel_table, norm_gate_dropout, paged_hstu_attention
from hstu_compile.ops.norm_gate_dropout import WITHOUT_DROPOUT
from hstu_compile.ops.paged_hstu_attention import PARAMETERS

OP = torch.ops.hstu_compile.gated_paged_attention.default


def gated(case: Case, affine: list[Tensor | None], named: dict[str, Any]) -> Tensor:
    return gated_paged_attention(*case.operands, *affine, attention=attention_arguments(case), gate=named)


def two_ops(case: Case, affine: list[Tensor | None], named: dict[str, Any]) -> Tensor:
    a = paged_hstu_attention(*case.operands, **attention_arguments(case))
    return norm_gate_dropout(a, *affine, **named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", GATES)
def test_it_is_the_two_ops(variant: str, dtype: torch.dtype) -> None:
    case = make_case(16, dtype, "targets", device=DEVICE)
    gate = make_gate(variant, case)
    out = gated(case, *gate)
    assert out.dtype == dtype and out.is_contiguous() and torch.equal(out, two_ops(case, *gate))


@pytest.mark.parametrize(
    "page_size, mask, layout", [*((16, mask, "packed") for mask in MASKS), (128, "targets", "interleaved")]
)
def test_layouts(page_size: int, mask: str, layout: str) -> None:
    """And u with heads of its own, in a packed buffer or not."""
    case = make_case(page_size, DTYPES[-1], mask, device=DEVICE, layout=layout)
    (u, *affine), named = make_gate("group norm", case)
    for given in (u, u.view(-1, H, 32), u.contiguous(), u.t().contiguous().t()):
        assert torch.equal(gated(case, [given, *affine], named), two_ops(case, [given, *affine], named))


@pytest.mark.parametrize("total, batch", [(0, 0), (5, 0), (0, 3), (4, 3)])
def test_nothing_to_attend_to(total: int, batch: int) -> None:
    """Rows of no sequence: attention is 0 there, and is gated as such."""
    x, u = torch.full((total, 2, 32), float("nan"), device=DEVICE), torch.randn(total, 64, device=DEVICE)
    counts = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    pool = torch.full((2, 2, 16, 2, 32), float("nan"), device=DEVICE)
    table = torch.full((batch, 4), -1, dtype=torch.int32, device=DEVICE)
    offsets = torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE)
    arguments = {"max_seq_len": 9, "alpha": 1.0, "scaling_seq_len": 1.0}
    case = Case([x] * 3, pool, table, counts, offsets, arguments, [], offsets, offsets, total)
    (_, *affine), named = make_gate("layer norm", case)
    zeros = norm_gate_dropout(torch.zeros(total, 64, device=DEVICE), u, *affine, **named)
    assert torch.equal(gated(case, [u, *affine], named), zeros)


@pytest.mark.parametrize("variant", ["no affine", "everything is joined", "group norm"])
def test_opcheck(variant: str) -> None:
    case = make_case(16, torch.float32, "everything", device=DEVICE)
    affine, named = make_gate(variant, case)
    attention = attention_arguments(case)
    given = [attention[name] for name in PARAMETERS] + affine + [named[name] for name in WITHOUT_DROPOUT]
    torch.library.opcheck(OP, (*case.operands, *given))


def test_autograd_is_an_error() -> None:
    case = make_case(16, device=DEVICE)
    (u, *affine), named = make_gate("layer norm", case)
    with pytest.raises(RuntimeError, match="gated_paged_attention has no gradient"):
        gated(case, [u.requires_grad_(), *affine], named)
    with torch.no_grad():
        gated(case, [u, *affine], named)


def test_any_number_of_tokens_compiles_once() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    cases = [
        make_case(16, DTYPES[-1], device=DEVICE, new=new, cached=cached)
        for new, cached in (([3, 20, 41] * 3, [16, 5, 70] * 3), ([30, 1], [17, 40]), ([2, 2, 9, 70], [1, 2, 3, 33]))
    ]
    attention = attention_arguments(cases[0]) | {"max_seq_len": 300}
    _, named = make_gate("rms norm of heads, concat", cases[0])

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(q, k, v, u, weight, bias, pool, page_table, cached_lengths, seq_offsets):
        given = (q * 1, k, v, pool, page_table, cached_lengths, u, weight, bias)
        return gated_paged_attention(*given, attention=attention | {"seq_offsets": seq_offsets}, gate=named)

    frames = []
    for case in cases:
        affine, _ = make_gate("rms norm of heads, concat", case)
        table = F.pad(case.page_table, (0, 11 - case.page_table.shape[1]), value=-1)
        paging = case.pool, table, case.cached_lengths, case.seq_offsets
        assert torch.equal(step(*case.new, *affine, *paging), two_ops(case, affine, named))
        frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"u": lambda t: t[:, :7]}, "the shape of u is"),
        ({"u": lambda t: t[1:]}, "u has .* rows, a .*"),
        ({"weight": lambda t: t[:7]}, "the shape of weight is"),
        ({"num_groups": lambda n: 3}, "num_groups is 3, expected a divisor of the row's width 64"),
        ({"activation": lambda name: "relu"}, "activation is relu, expected one of none, silu, sigmoid"),
        ({"pool": lambda t: t[:, :, :12].contiguous()}, "the page size of pool is 12, expected one of"),
        ({"cached_lengths": lambda t: t[1:]}, "the shape of cached_lengths"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    case = make_case(16, DTYPES[-1], device=DEVICE)
    affine, gate = make_gate("layer norm", case)
    names = ("q", "k", "v", "pool", "page_table", "cached_lengths", "u", "weight", "bias")
    given = dict(zip(names, (*case.operands, *affine), strict=True)) | gate
    for name, changed in change.items():
        given[name] = changed(given[name])
    gate = {name: given.pop(name) for name in gate}
    with pytest.raises((ValueError, RuntimeError), match=message):
        gated_paged_attention(**given, attention=attention_arguments(case), gate=gate)


@pytest.mark.skipif(DEVICE == "cuda", reason="values are read on a CPU only")
def test_bad_values() -> None:
    case = make_case(16)
    gate = make_gate("layer norm", case)
    case.cached_lengths[0] = -1
    with pytest.raises(ValueError, match="cached_lengths is .*, expected no negative length"):
        gated(case, *gate)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("processors", [1, 2000])
@pytest.mark.parametrize("page_size, dim", [(16, 256), (32, 64), (64, 128), (256, 32)])
@pytest.mark.parametrize("variant", GATES)
def test_kernels_together_and_apart(variant: str, page_size: int, dim: int, processors: int, kernel: str) -> None:
    """In parts and whole, from memory full of NaN."""
    with of_processors(kernel, processors):
        kernels = kernel_table.Choice(kernel).module()
        for dtype in (torch.bfloat16, torch.float16):
            case = make_case(page_size, dtype, "targets", dim=dim, device="cuda")
            together, apart = together_and_apart(kernels, case, variant)
            assert not together.isnan().any() and torch.equal(together, apart)


@pytest.mark.cuda
@pytest.mark.parametrize("processors", [1, 2000])
@pytest.mark.parametrize("variant", ["layer norm", "group norm"])
def test_portable_kernel_in_fp32(variant: str, processors: int) -> None:
    with of_processors(kernel_table.PAGED_PORTABLE, processors):
        kernels = kernel_table.Choice(kernel_table.PAGED_PORTABLE).module()
        case = make_case(16, torch.float32, "targets", dim=64, device="cuda")
        together, apart = together_and_apart(kernels, case, variant)
        assert not together.isnan().any() and torch.equal(together, apart)


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("processors", [1, 2000])
def test_calls_that_come_again(processors: int, kernel: str) -> None:
    """Launches are remembered: other numbers of rows, sequences and parts, and nothing of an earlier call."""
    module = sys.modules["hstu_compile.ops.gated_paged_attention"]  # the package has a function of that name
    forgotten = mock.patch.dict(module._kinds.known, clear=True)
    with kernel_table.force(kernel), of_processors(kernel, processors), forgotten, poisoned():
        for times in (1, 1, 2, 1, 3, 1):
            new, cached = NEW * times, cached_around(32) * times
            case = make_case(32, torch.bfloat16, dim=64, device="cuda", new=new, cached=cached)
            gate = make_gate("rms norm of heads, concat", case)
            assert torch.equal(gated(case, *gate), two_ops(case, *gate))


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("processors", [1, 2000])
def test_cuda_graph(processors: int, kernel: str) -> None:
    """Of other sequences than it was recorded with, and more rows of no sequence."""
    case, other = (make_case(32, torch.bfloat16, dim=64, device="cuda", unused=n) for n in (40, 40))
    fewer = make_case(32, torch.bfloat16, dim=64, device="cuda", new=[30, 0, 64] + [0] * 8, unused=sum(NEW) + 40 - 94)
    gate = make_gate("layer norm", case)
    width = max(one.page_table.shape[1] for one in (case, other, fewer))
    pool = torch.full_like(torch.cat([case.pool, other.pool, fewer.pool]), float("nan"))
    case.arguments["max_seq_len"] = 400
    static = case._replace(
        new=[t.clone() for t in case.new],
        pool=pool,
        page_table=torch.zeros(len(NEW), width, dtype=torch.int32, device="cuda"),
        cached_lengths=case.cached_lengths.clone(),
        seq_offsets=case.seq_offsets.clone(),
    )
    with kernel_table.force(kernel), of_processors(kernel, processors):

        def load(one: Case) -> None:
            for mine, given in zip(static.new, one.new, strict=True):
                mine.copy_(given)
            static.pool[: len(one.pool)] = one.pool
            static.page_table[:, : one.page_table.shape[1]] = one.page_table
            static.cached_lengths.copy_(one.cached_lengths)
            static.seq_offsets.copy_(one.seq_offsets)

        load(case)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                gated(static, *gate)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = gated(static, *gate)
        for one in (case, other, fewer):
            load(one)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, two_ops(static, *gate))
