"""The ops on a paged cache on whatever device is there: against float64, opcheck, what they say to bad input."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from paged_cases import MASKS, NEW, H, append_case, assert_attention, make_case

from hstu_compile.ops import append_kv, hstu_attention, kernel_table, paged_hstu_attention
from hstu_compile.ops.paged_hstu_attention import PARAMETERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_SIZES = [16, 32, 64, 128, 256]
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]


def attention(case, **changed):
    return paged_hstu_attention(*case.operands, **{"seq_offsets": case.seq_offsets, **case.arguments, **changed})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size", PAGE_SIZES if DEVICE == "cuda" else [16, 128])
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
@pytest.mark.parametrize("valid", [None, 0, 17, 1000])
def test_append_stores_history_and_nothing_else(page_size, mask, valid):
    """Candidates, unused rows, full pages and every other element of the pool stay as they are, NaN included."""
    case = make_case(page_size, torch.bfloat16, mask, device=DEVICE)
    arguments, after = append_case(case, valid)
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
    arguments, _ = append_case(case)
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
    named, _ = append_case(case)
    named["pool"] = named["pool"].nan_to_num(0.0)
    append = torch.ops.hstu_compile.append_kv.default
    torch.library.opcheck(append, tuple(named.get(argument.name) for argument in append._schema.arguments))


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
    arguments, _ = append_case(case)
    with pytest.raises(RuntimeError, match="append_kv has no gradient"):
        append_kv(**arguments | {"k": k, "v": v})


def test_compiles_with_one_mutated_argument():
    case = make_case(16, torch.bfloat16, "targets", device=DEVICE)
    arguments, after = append_case(case)
    case = case._replace(pool=arguments.pop("pool"), page_table=arguments["page_table"])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(pool):
        append_kv(pool, **arguments)
        return attention(case._replace(pool=pool))

    assert_attention(step(case.pool), case)
    assert torch.equal(case.pool.view(torch.int16), after.view(torch.int16))


def test_any_number_of_tokens_and_sequences_compiles_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(q, k, v, pool, page_table, cached_lengths, seq_offsets, num_targets, max_seq_len):
        paging = {"page_table": page_table, "cached_lengths": cached_lengths, "seq_offsets": seq_offsets}
        append_kv(pool, k, v, **paging, num_targets=num_targets)
        mask = {"num_targets": num_targets, "max_seq_len": max_seq_len, "alpha": 32**-0.5, "scaling_seq_len": 40.0}
        return paged_hstu_attention(q * 1, k, v, pool, **paging, **mask)

    for new, cached in (([3, 20, 41] * 3, [16, 5, 0] * 3), ([30, 1], [17, 40]), ([2, 2, 9, 70], [1, 2, 3, 33])):
        case = make_case(16, device=DEVICE, new=new, cached=cached)
        case.arguments["num_targets"] = torch.tensor(new, device=DEVICE) // 2
        arguments, after = append_case(case)
        pool = arguments["pool"]
        table = F.pad(arguments["page_table"], (0, 11 - arguments["page_table"].shape[1]), value=-1)
        sizes = case.seq_offsets, case.arguments["num_targets"], case.arguments["max_seq_len"]
        assert_attention(step(*case.new, pool, table, case.cached_lengths, *sizes), case)
        assert torch.equal(pool.nan_to_num(7.0), after.nan_to_num(7.0))
    assert counter.frame_count == 1


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


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests above run the kernels")
def test_in_the_interpreter():
    """In a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    cases = Path(__file__).with_name("paged_triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


MAJOR = torch.cuda.get_device_capability()[0] if DEVICE == "cuda" else 9
KERNELS = [kernel_table.PAGED_PORTABLE, *(name for major, name in kernel_table.PAGED.items() if major == MAJOR)]


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("processors", [1, 2000])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("page_size, dim", [(16, 256), (32, 64), (64, 128), (128, 32), (256, 256)])
def test_every_kernel_whole_and_in_parts(page_size, dim, mask, processors, kernel, monkeypatch):
    """From memory full of NaN, the same bits twice."""
    empty = torch.empty

    def poisoned(*args, **keywords):
        x = empty(*args, **keywords)
        return x.fill_(float("nan") if x.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)
    with kernel_table.force(kernel), of_processors(kernel, processors):
        case = make_case(page_size, torch.bfloat16, mask, dim=dim, device="cuda")
        out = attention(case)
        assert torch.equal(attention(case), out)
    assert_attention(out, case)


@contextlib.contextmanager
def of_processors(kernel, number):
    """Within it a call is split as on a GPU with so many multiprocessors, however short the keys.

    And nothing is known of calls elsewhere.
    """
    kinds = sys.modules["hstu_compile.ops.paged_hstu_attention"]._kinds  # the package has a function of that name
    processors = mock.patch(f"hstu_compile.ops.kernels.{kernel}.processors", lambda device: number)
    least = mock.patch("hstu_compile.ops.kernels.paged_parts.LEAST", 1)
    with processors, least, mock.patch.dict(kinds.known, clear=True):
        yield


@pytest.mark.cuda
@pytest.mark.parametrize("paged, unpaged", list(zip(KERNELS, [kernel_table.PORTABLE, "attention_sm90"], strict=False)))
@pytest.mark.parametrize("mask", MASKS)
def test_cached_equals_uncached_bit_for_bit(mask, paged, unpaged):
    """Where key tiles are the same (the history ends with one) and keys are not split."""
    cached = [128 * (i % 4) for i in range(11)]
    case = make_case(32, torch.bfloat16, mask, dim=64, device="cuda", cached=cached, unused=0)
    with kernel_table.force(unpaged):
        whole = hstu_attention(*case.whole, seq_offsets=case.whole_offsets, **case.arguments)
    with kernel_table.force(paged), of_processors(paged, 1):
        assert torch.equal(attention(case), whole[case.rows])


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
def test_cuda_graph_with_padded_slots(kernel):
    """Captured once, replayed for other batches; slots without a sequence write nowhere and read nothing."""
    shared = {"dtype": torch.bfloat16, "dim": 64, "device": "cuda"}
    cases = [make_case(32, mask="targets", unused=40, **shared) for _ in range(2)]
    total, slots = len(cases[0].new[0]), len(NEW) + 5
    cases.append(make_case(32, new=[30, 0, 64], cached=[32, 100, 0], unused=total - 94, **shared))
    cases[-1].arguments["num_targets"] = torch.tensor([1, 0, 33], device="cuda")
    integers = {"dtype": torch.int32, "device": "cuda"}
    static = {
        "q": torch.zeros(total, 4, H, 64, dtype=torch.bfloat16, device="cuda")[:, 0],
        "k": torch.zeros(total, H, 64, dtype=torch.bfloat16, device="cuda"),
        "v": torch.zeros(total, H, 64, dtype=torch.bfloat16, device="cuda"),
        "pool": torch.zeros(64, 2, 32, H, 64, dtype=torch.bfloat16, device="cuda"),
        "page_table": torch.full((slots, 40), -1, **integers),
        "cached_lengths": torch.zeros(slots, **integers),
        "seq_offsets": torch.zeros(slots + 1, **integers),
        "num_targets": torch.zeros(slots, **integers),
    }
    fixed = {"max_seq_len": 400, "alpha": 64**-0.5, "scaling_seq_len": 40.0}

    def step():
        append_kv(**{name: t for name, t in static.items() if name != "q"})
        return paged_hstu_attention(**static, **fixed)

    with kernel_table.force(kernel):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for case in cases:
            case.arguments.update(fixed)
            arguments, after = append_case(case)
            batch, pages = arguments["page_table"].shape
            for name, t in zip(("q", "k", "v"), case.new, strict=True):
                static[name].copy_(t)
            static["pool"].fill_(float("nan"))[: len(after)] = arguments["pool"]
            static["page_table"].fill_(2**30)[:batch, :pages] = arguments["page_table"]
            static["cached_lengths"].fill_(12345)[:batch] = case.cached_lengths
            static["seq_offsets"].fill_(int(case.seq_offsets[-1]))[: batch + 1] = case.seq_offsets
            static["num_targets"].fill_(7)[:batch] = case.arguments["num_targets"]
            graph.replay()
            assert_attention(out, case)
            expected = torch.full_like(static["pool"], float("nan"))
            expected[: len(after)] = after
            assert torch.equal(static["pool"].view(torch.int16), expected.view(torch.int16))


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", KERNELS)
def test_pool_of_more_than_two_to_the_31_elements(kernel):
    case = make_case(256, torch.bfloat16, "targets", dim=128, device="cuda")
    page = case.pool[0].numel()
    far = 2**31 // page + 5
    pool = F.pad(case.pool, (0,) * 8 + (far, 0), value=float("nan"))
    with kernel_table.force(kernel):
        assert_attention(attention(case._replace(pool=pool, page_table=case.page_table + far)), case)
    arguments, after = append_case(case)
    pool = F.pad(arguments["pool"], (0,) * 8 + (far, 0), value=float("nan"))
    append_kv(**arguments | {"pool": pool, "page_table": arguments["page_table"] + far})
    assert torch.equal(pool[far:].view(torch.int16), after.view(torch.int16))


@pytest.mark.cuda
def test_calls_of_one_kind_are_launched_again():
    """The third call goes straight to the driver: other addresses, T and B."""
    from hstu_compile.ops.kernels.launch import Relaunch

    with mock.patch.object(Relaunch, "__call__", autospec=True, side_effect=Relaunch.__call__) as again:
        for i in range(5):
            new = [3 + i, 40, 7 * i][: 2 + i % 2]
            case = make_case(
                64, torch.bfloat16, dim=64, device="cuda", new=new, cached=[64, 65, 3][: len(new)], unused=i
            )
            case = case._replace(page_table=F.pad(case.page_table, (0, 8 - case.page_table.shape[1])))
            case = case._replace(pool=F.pad(case.pool, (0,) * 9 + (16 - len(case.pool),)))
            assert_attention(attention(case), case)
            calls = again.call_count
    assert calls > 0
