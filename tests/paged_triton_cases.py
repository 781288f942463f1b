"""The portable kernels on a paged cache in the Triton interpreter; `test_paged_attention.py` runs these tests.

On a GPU the ops' own tests run the kernels.
"""

import contextlib
from unittest import mock

import pytest
import torch
import triton_interpreter  # noqa: F401
from gated_paged_cases import GATES, together_and_apart
from paged_cases import MASKS, NEW, append_case, assert_attention, cached_around, make_case

from hstu_compile.ops.kernels import append_kv, paged_attention_triton, paged_parts
from hstu_compile.ops.kernels.attention_triton_tiles import Tile
from hstu_compile.ops.kernels.launch import Workspace

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
