"""The ops on a paged cache on whatever device is there: against float64, opcheck, what they say to bad input."""

import pytest
import torch
from paged_cases import MASKS, append_case, assert_attention, make_case

from hstu_compile.ops import append_kv, hstu_attention, paged_hstu_attention
from hstu_compile.ops.paged_hstu_attention import PARAMETERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_SIZES = [16, 32, 64, 128, 256]


def attention(case, **changed):
    return paged_hstu_attention(*case.operands, **{"seq_offsets": case.seq_offsets, **case.arguments, **changed})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_attention(page_size, mask, dtype):
    """Around the borders of pages; no number of an unused page, of a page's unused tokens or of an unused row."""
    case = make_case(page_size, dtype, mask, device=DEVICE, layout="interleaved" if mask == "targets" else "packed")
    assert_attention(attention(case), case)


@pytest.mark.parametrize("dim", [16, 64, 128, 256])
@pytest.mark.parametrize("mask", ["causal", "everything"])
def test_head_dims(mask, dim):
    case = make_case(32, torch.bfloat16, mask, dim=dim, device=DEVICE)
    assert_attention(attention(case), case)


@pytest.mark.parametrize("mask", ["causal", "targets"])
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_append_stores_history_and_nothing_else(page_size, mask):
    """Candidates, unused rows and every other element of the pool stay as they are, NaN included."""
    case = make_case(page_size, torch.bfloat16, mask, device=DEVICE)
    arguments, after = append_case(case, mask)
    append_kv(**arguments)
    assert torch.equal(arguments["pool"].view(torch.int16), after.view(torch.int16))


def test_append_of_what_has_no_page():
    """Beyond the table, or a page that the pool does not have: written nowhere."""
    case = make_case(16, device=DEVICE)
    before = case.pool.clone().nan_to_num(7.0)
    for table in (
        case.page_table[:, :0],
        torch.full_like(case.page_table, -1),
        torch.full_like(case.page_table, before.shape[0]),
    ):
        pool = before.clone()
        _, k, v = case.new
        append_kv(pool, k, v, seq_offsets=case.seq_offsets, page_table=table, cached_lengths=case.cached_lengths)
        assert torch.equal(pool, before)


def test_attention_does_not_see_what_append_writes():
    case = make_case(32, torch.bfloat16, "targets", device=DEVICE)
    arguments, _ = append_case(case, "targets")
    case = case._replace(pool=arguments["pool"], page_table=arguments["page_table"])
    before = attention(case)
    append_kv(**arguments)
    assert torch.equal(attention(case), before)


def test_steps_equal_the_whole_sequence():
    """Token by token through the cache, and at once."""
    case = make_case(16, new=[40, 23], cached=[0, 0], device=DEVICE, unused=0)
    pool = torch.full((6, 2, 16, *case.new[0].shape[1:]), float("nan"), device=DEVICE)
    table = torch.tensor([[5, 0, 3], [1, 4, -1]], device=DEVICE, dtype=torch.int32)
    cached, outs = torch.zeros(2, dtype=torch.int32, device=DEVICE), {0: [], 1: []}
    for sizes in ([15, 7], [1, 9], [1, 0], [23, 7]):
        rows = [case.seq_offsets[z] + cached[z] + torch.arange(n, device=DEVICE) for z, n in enumerate(sizes)]
        q, k, v = (t[torch.cat(rows)] for t in case.new)
        offsets = torch.tensor([0, sizes[0], sum(sizes)], device=DEVICE)
        paging = {"seq_offsets": offsets, "page_table": table, "cached_lengths": cached}
        append_kv(pool, k, v, **paging)
        out = paged_hstu_attention(q, k, v, pool, **paging, **case.arguments)
        for z, part in enumerate(out.split(sizes)):
            outs[z].append(part)
        cached = cached + torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
    assert_attention(torch.cat(outs[0] + outs[1]), case)


def test_without_history_it_is_hstu_attention():
    new = [5, 0, 70, 131]
    case = make_case(64, new=new, cached=[0] * 4, device=DEVICE, unused=2)
    case = case._replace(pool=case.pool[:0], page_table=case.page_table[:, :0])
    unpaged = hstu_attention(*case.new, seq_offsets=case.seq_offsets, **case.arguments)
    assert_attention(attention(case), case)
    assert_attention(unpaged, case)


@pytest.mark.parametrize("total, batch, page_size", [(0, 0, 16), (5, 0, 16), (0, 3, 32), (4, 3, 32)])
def test_nothing_to_do(total, batch, page_size):
    x = torch.full((total, 2, 32), float("nan"), device=DEVICE)
    pool = torch.full((2, 2, page_size, 2, 32), float("nan"), device=DEVICE)
    counts = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    paging = {
        "seq_offsets": torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE),
        "page_table": torch.full((batch, 4), -1, dtype=torch.int32, device=DEVICE),
        "cached_lengths": counts + 5,  # of pages that are never read: there is no query
    }
    append_kv(pool, x, x, **paging)
    assert pool.isnan().all()
    paging["cached_lengths"] = counts
    out = paged_hstu_attention(x, x, x, pool, **paging, max_seq_len=9, alpha=1.0, scaling_seq_len=1.0)
    assert torch.equal(out, torch.zeros_like(x))


@pytest.mark.parametrize("mask", ["causal", "everything"])
def test_opcheck(mask):
    case = make_case(16, torch.float32, mask, device=DEVICE)
    named = {"seq_offsets": case.seq_offsets, **ARGUMENTS, **case.arguments}
    args = (*case.operands, *(named[name] for name in PARAMETERS))
    torch.library.opcheck(torch.ops.hstu_compile.paged_hstu_attention.default, args)
    named, _ = append_case(case, mask)
    named["pool"] = named["pool"].nan_to_num(0.0)
    args = (*named.values(), *([None] if "num_targets" not in named else []))
    torch.library.opcheck(torch.ops.hstu_compile.append_kv.default, args)


ARGUMENTS = {
    "num_targets": None,
    "num_contextuals": None,
    "causal": True,
    "contextual_seq_len": 0,
    "target_group_size": 1,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "targets_share_position": False,
}


def test_autograd_is_an_error():
    case = make_case(16, device=DEVICE)
    case.new[0].requires_grad_()
    with pytest.raises(RuntimeError, match="paged_hstu_attention has no gradient"):
        attention(case)
    with torch.no_grad():
        attention(case)
    k, v = (t.detach().requires_grad_() for t in case.new[1:])
    arguments, _ = append_case(case, "causal")
    with pytest.raises(RuntimeError, match="append_kv has no gradient"):
        append_kv(**arguments | {"k": k, "v": v})


def test_compiles_with_one_mutated_argument():
    case = make_case(16, torch.bfloat16, "targets", device=DEVICE)
    arguments, after = append_case(case, "targets")
    case = case._replace(pool=arguments.pop("pool"), page_table=arguments["page_table"])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(pool):
        append_kv(pool, **arguments)
        return attention(case._replace(pool=pool))

    assert_attention(step(case.pool), case)
    assert torch.equal(case.pool.view(torch.int16), after.view(torch.int16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"pool": lambda t: t[:, :, :12].contiguous()}, "the page size of pool is 12, expected one of"),
        ({"pool": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)}, "the strides of pool"),
        ({"pool": lambda t: t.half()}, "the dtype of k is torch.float32, expected that of pool"),
        ({"pool": lambda t: t[..., :16].contiguous()}, "the shape of k"),
        ({"pool": lambda t: t.repeat(1, 2, 1, 1, 1)}, "2 in dimension 1"),
        ({"page_table": lambda t: t.long()}, "the dtype of page_table is torch.int64"),
        ({"page_table": lambda t: t[1:]}, "the shape of page_table"),
        ({"cached_lengths": lambda t: t[1:]}, "the shape of cached_lengths"),
        ({"cached_lengths": lambda t: t.float()}, "the dtype of cached_lengths"),
        ({"seq_offsets": lambda t: t.float()}, "the dtype of seq_offsets"),
    ],
)
def test_bad_layouts(change, message):
    case = make_case(16, device=DEVICE)
    named = dict(zip(("q", "k", "v", "pool", "page_table", "cached_lengths"), case.operands, strict=True))
    named["seq_offsets"] = case.seq_offsets
    for name, changed in change.items():
        named[name] = changed(named[name])
    with pytest.raises(ValueError, match=message):
        paged_hstu_attention(**named, **case.arguments)
    if message != "the dtype of seq_offsets":
        del named["q"]
        with pytest.raises(ValueError, match=message):
            append_kv(**named)


@pytest.mark.skipif(DEVICE == "cuda", reason="values are read on a CPU only")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"cached_lengths": lambda t: t - 1}, "cached_lengths is .*, expected no negative length"),
        ({"cached_lengths": lambda t: t + 1000}, "cached_lengths is .*, expected at most"),
        ({"page_table": lambda t: t.clamp(max=0) - 1}, "page_table is .*, expected pages of history from 0 to"),
        ({"max_seq_len": lambda n: n - 3}, "max_seq_len is .*, expected at least the longest sequence"),
        ({"num_targets": lambda t: t + 1}, "num_targets is .*, expected at most the lengths"),
    ],
)
def test_bad_values(change, message):
    case = make_case(16, mask="targets", device=DEVICE)
    named = dict(zip(("q", "k", "v", "pool", "page_table", "cached_lengths"), case.operands, strict=True))
    named |= {"seq_offsets": case.seq_offsets, **case.arguments}
    for name, changed in change.items():
        named[name] = changed(named[name])
    with pytest.raises(ValueError, match=message):
        paged_hstu_attention(**named)
