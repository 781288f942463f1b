"""The portable kernels on a paged cache in the Triton interpreter; `test_paged_attention.py` runs these tests.

On a GPU the ops' own tests run the kernels.
"""

import contextlib
from unittest import mock

import pytest
import torch
import triton_interpreter  # noqa: F401
from error_budget import FORWARD, assert_within_budget
from gated_paged_cases import GATES, together_and_apart
from paged_cases import (
    MASKS,
    NEW,
    append_case,
    assert_attention,
    bits,
    cached_around,
    make_case,
    silu_append_case,
    slice_of,
)

from hstu_compile.ops.kernels import append_kv, page_copies, paged_attention_triton, paged_parts, silu_append_kv
from hstu_compile.ops.kernels.attention_triton_tiles import Tile
from hstu_compile.ops.kernels.launch import Workspace
from hstu_compile.ops.paged_reference import append_kv_reference

NOTHING = {
    "num_targets": None,
    "num_contextuals": None,
    "causal": True,
    "contextual_seq_len": 0,
    "target_group_size": 1,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "targets_share_position": False,
}


SMALL = Tile(32, 32, 4, 1)


@contextlib.contextmanager
def gpu(processors=1, tile=SMALL):
    with (
        mock.patch.object(paged_attention_triton, "tile_for", lambda q: tile),
        mock.patch.object(paged_attention_triton, "processors", lambda device: processors),
        mock.patch.object(paged_parts, "LEAST", 1),
    ):
        yield


def attention(case, *gpu_and_tile):
    call = {"seq_offsets": case.seq_offsets, **NOTHING, **case.arguments}
    call["scale"] = 1.0 / call.pop("scaling_seq_len")
    with gpu(*gpu_and_tile):
        return paged_attention_triton.forward(*case.operands, **call)


@pytest.mark.parametrize("page_size, mask", [*((32, mask) for mask in MASKS), (16, "targets"), (128, "causal")])
def test_attention(page_size, mask):
    """Keys whole, and split over programs."""
    new, cached = [0, 5, 1, 17, 40], [7, 33, 0, 64, 31]
    case = make_case(page_size, mask="causal", dim=16, new=new, cached=cached)
    own = {n: torch.tensor(x[:5]) if isinstance(x, list) else x for n, x in MASKS[mask].items()}
    case = case._replace(arguments=case.arguments | own)
    for processors in (1, 40):
        assert_attention(attention(case, processors), case)


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_half(page_size):
    cached = [0, page_size - 1, page_size + 1]
    case = make_case(page_size, torch.float16, dim=24, new=[3, 40, 0], cached=cached, layout="interleaved")
    assert_attention(attention(case, 30, Tile(64, 64, 4, 1)), case)


def test_parts_are_added_in_a_fixed_order():
    case = make_case(16, dim=16, new=[3, 40], cached=[100, 31])
    assert torch.equal(attention(case, 50), attention(case, 50))


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 16), (torch.float16, 24)], ids=str)
@pytest.mark.parametrize("variant", GATES)
def test_gated(variant, dtype, dim):
    """By the gate's kernel, which adds the parts, and by two ops: the same bits, in rows of no sequence too."""
    case = make_case(16, dtype, dim=dim, new=[0, 5, 17], cached=[7, 33, 31])
    for processors in (1, 40):
        with gpu(processors):
            together, apart = together_and_apart(paged_attention_triton, case, variant)
        assert not together.isnan().any() and torch.equal(together, apart)


def test_gated_parts_are_not_summed_elsewhere():
    """And whole results are not summed at all."""
    case, names = make_case(16, dim=16, new=[3, 40], cached=[100, 31]), []

    def run(memory, key, tensors, extent, launches):
        names.append([launch.kernel.__name__ for launch in launches(Workspace(tensors[0].device, extent))])

    for processors in (1, 50):
        with gpu(processors), mock.patch.object(paged_parts, "run", run):
            together_and_apart(paged_attention_triton, case, "layer norm")
    assert names == [
        ["zero_tail_kernel", "paged_attention_kernel", "forward_kernel"],
        ["zero_tail_kernel", "paged_attention_kernel"],
        ["paged_attention_kernel", "forward_kernel"],
        ["paged_attention_kernel", "sum_parts_kernel"],
    ]


@pytest.mark.parametrize("mask", ["causal", "targets"])
@pytest.mark.parametrize("page_size, valid", [(16, None), (64, None), (16, 17)])
def test_append(page_size, mask, valid):
    own = {"new": NEW[:5], "cached": cached_around(page_size)[:5]} if mask == "causal" else {}
    case = make_case(page_size, torch.float16, mask, dim=24, **own)
    arguments, after = append_case(case, valid)
    append_kv.append(**{"num_targets": None, "valid_lengths": None, **arguments})
    assert torch.equal(arguments["pool"].view(torch.int16), after.view(torch.int16))


def test_append_of_what_has_no_page():
    case = make_case(16, dim=16)
    before = case.pool.clone().nan_to_num(7.0)
    _, k, v = case.new
    for table in (case.page_table[:, :0], torch.full_like(case.page_table, before.shape[0])):
        pool = before.clone()
        append_kv.append(pool, k, v, case.seq_offsets, table, case.cached_lengths, None, None)
        assert torch.equal(pool, before)


@pytest.mark.parametrize("layout", ["packed", "interleaved"])
@pytest.mark.parametrize("mask", ["causal", "targets"])
@pytest.mark.parametrize("page_size, valid, dtype", [(16, None, torch.float32), (32, 17, torch.float16)])
def test_silu_append(page_size, valid, dtype, mask, layout):
    case = make_case(page_size, dtype, mask, dim=24, layout=layout)
    arguments = {"num_targets": None, "valid_lengths": None, **silu_append_case(case, valid)}
    x, pool = arguments["x"].clone(), arguments["pool"].clone()
    silu_append_kv.silu_append(**arguments)
    given = x.isfinite()
    assert torch.equal(arguments["x"].isfinite(), given)
    exact = torch.nn.functional.silu(x[given].double())
    assert_within_budget(arguments["x"][given], torch.nn.functional.silu(x[given]), exact, FORWARD)
    k, v = (slice_of(arguments, name, arguments["x"]) for name in "kv")
    names = "seq_offsets", "page_table", "cached_lengths", "num_targets", "valid_lengths"
    append_kv_reference(pool, k, v, *(arguments[name] for name in names))
    assert torch.equal(bits(arguments["pool"]), bits(pool))


@pytest.mark.parametrize("batch, pages", [(0, 2), (3, 0), (40, 1)])
def test_silu_append_of_what_has_no_page(batch, pages):
    x = torch.randn(11, 40)
    pool = torch.full((pages, 2, 16, 1, 8), float("nan"))
    counts = torch.zeros(batch, dtype=torch.int32)
    offsets = torch.cat([torch.zeros(batch, dtype=torch.int64), torch.tensor([0 if batch == 0 else 9])])
    table = torch.full((batch, pages), 7, dtype=torch.int32)
    expected = torch.nn.functional.silu(x.double())
    eager = torch.nn.functional.silu(x)
    silu_append_kv.silu_append(x, pool, 30, 8, 3, 8, offsets, table, counts, None, None)
    assert_within_budget(x, eager, expected, FORWARD)
    assert pool.isnan().all()


@pytest.mark.parametrize("words", [512, 66])
def test_copy_pages(words: int) -> None:
    """More pieces than programs, and a last one that is not whole; what lies beside the pages stays as it is."""
    source, target = torch.arange(9 * words).view(9, words), torch.full((7, words), -1)
    expected = target.clone()
    expected[[6, 0, 3]] = source[[2, 8, 4]]
    distances = 8 * words * torch.tensor([[2, 8, 4], [6, 0, 3]])
    page_copies.copy_pages(distances, source, target, 8 * words)
    assert torch.equal(target, expected)
