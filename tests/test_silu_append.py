"""silu in place and append_kv as one op: their bits, whatever the slices; and the pass that merges the two calls."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from paged_cases import bits, make_case, silu_append_case, slice_of
from torch import Tensor

import hstu_compile
from hstu_compile.ops import append_kv, silu_, silu_append_kv
from hstu_compile.passes import silu_append, silu_in_place
from hstu_compile.serving import engine as engine_module
from tests.models.native_ranking import NativeRanking
from tests.serving_traffic import MAX_SEQ_LEN, Traffic
from tests.tracing import traced

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ops = torch.ops.hstu_compile


def two_ops(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """x and the pool after silu_ and append_kv; the arguments stay as they are."""
    x, pool = arguments["x"].clone(), arguments["pool"].clone()
    silu_(x)
    names = "seq_offsets", "page_table", "cached_lengths", "num_targets", "valid_lengths"
    paging = {name: arguments[name] for name in names if name in arguments}
    append_kv(pool, slice_of(arguments, "k", x), slice_of(arguments, "v", x), **paging)
    return x, pool


def check(arguments: dict[str, Any]) -> None:
    x, pool = two_ops(arguments)
    silu_append_kv(**arguments)
    assert torch.equal(bits(arguments["x"]), bits(x))
    assert torch.equal(bits(arguments["pool"]), bits(pool))


@pytest.mark.parametrize("layout", ["packed", "interleaved"])
@pytest.mark.parametrize("mask, valid", [("causal", None), ("targets", None), ("targets", 17), ("causal", 1000)])
@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_bits_of_the_two_ops(page_size: int, mask: str, valid: int | None, layout: str) -> None:
    """Ragged, with candidates and full pages, rows of no sequence, and NaN in them, in u and wherever no token is."""
    check(silu_append_case(make_case(page_size, torch.bfloat16, mask, device=DEVICE, layout=layout), valid))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [24, 256])
def test_dtypes_and_head_dims(dim: int, dtype: torch.dtype) -> None:
    check(silu_append_case(make_case(32, dtype, "targets", dim=dim, device=DEVICE)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=DEVICE).view(dtype).view(64, 1024)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    check(
        {
            "x": numbers.clone(),
            "pool": torch.full((2, 2, 32, 4, 64), float("nan"), dtype=dtype, device=DEVICE),
            **{"k_at": 256, "k_head_stride": 64, "v_at": 700, "v_head_stride": 81},
            "seq_offsets": torch.tensor([0, 60], device=DEVICE),
            "page_table": torch.tensor([[1, 0]], dtype=torch.int32, device=DEVICE),
            "cached_lengths": zero,
        }
    )


def test_rows_and_pages_that_lie_apart() -> None:
    """x is a part of longer rows; one page is in no pool."""
    arguments = silu_append_case(make_case(16, torch.bfloat16, "targets", device=DEVICE))
    wide = F.pad(arguments["x"], (5, 11), value=float("nan"))
    arguments["x"] = wide[:, 5:-11]
    arguments["page_table"][3] = len(arguments["pool"])
    check(arguments)
    assert wide[:, :5].isnan().all() and wide[:, -11:].isnan().all()


@pytest.mark.parametrize("total, batch, pages", [(0, 0, 2), (5, 0, 2), (0, 3, 2), (4, 3, 2), (4, 3, 0)])
def test_nothing_to_store(total: int, batch: int, pages: int) -> None:
    counts = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    arguments = {
        "x": torch.randn(total, 128, device=DEVICE),
        "pool": torch.full((pages, 2, 16, 2, 16), float("nan"), device=DEVICE),
        **{"k_at": 96, "k_head_stride": 16, "v_at": 32, "v_head_stride": 16},
        "seq_offsets": torch.zeros(batch + 1, dtype=torch.int32, device=DEVICE),
        "page_table": torch.full((batch, 4), -1, dtype=torch.int32, device=DEVICE),
        "cached_lengths": counts,
    }
    check(arguments)
    assert arguments["pool"].isnan().all()


@pytest.mark.parametrize("mask", ["causal", "targets"])
def test_opcheck(mask: str) -> None:
    arguments = silu_append_case(make_case(16, torch.float32, mask, device=DEVICE), 3 if mask == "targets" else None)
    arguments |= {name: arguments[name].nan_to_num(0.0) for name in ("x", "pool")}
    op = ops.silu_append_kv.default
    torch.library.opcheck(op, tuple(arguments.get(argument.name) for argument in op._schema.arguments))
    arguments["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="silu_append_kv has no gradient"):
        silu_append_kv(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": lambda t: t[0]}, "the shape of x"),
        ({"x": lambda t: t.T.contiguous().T}, "the strides of x"),
        ({"x": lambda t: t.half()}, "the dtype of x is torch.float16, expected that of pool, torch.float32"),
        ({"pool": lambda t: t[0]}, "the shape of pool"),
        ({"pool": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)}, "the strides of pool"),
        (
            {"k_at": lambda n: n + 1},
            r"\(k_at, k_head_stride\) is \(193, 32\), expected 2 heads of 32 among",
        ),
        ({"k_at": lambda n: -1}, r"\(k_at, k_head_stride\) is \(-1, 32\)"),
        ({"v_head_stride": lambda n: 31}, r"\(v_at, v_head_stride\) is \(64, 31\)"),
        ({"v_head_stride": lambda n: 129}, r"\(v_at, v_head_stride\) is \(64, 129\)"),
        ({"page_table": lambda t: t.long()}, "the dtype of page_table"),
        ({"cached_lengths": lambda t: t[1:]}, "the shape of cached_lengths"),
        ({"seq_offsets": lambda t: t.float()}, "the dtype of seq_offsets"),
        ({"num_targets": lambda t: t[1:]}, "the shape of num_targets"),
    ],
)
def test_bad_arguments(change: dict[str, Callable], message: str) -> None:
    arguments = silu_append_case(make_case(16, mask="targets", device=DEVICE))
    for name, changed in change.items():
        arguments[name] = changed(arguments[name])
    with pytest.raises(ValueError, match=message):
        silu_append_kv(**arguments)


@pytest.mark.cuda
def test_calls_of_one_kind_are_launched_again() -> None:
    """The third call goes straight to the driver: other addresses, T and B."""
    from hstu_compile.ops.kernels.launch import Relaunch

    with mock.patch.object(Relaunch, "__call__", autospec=True, side_effect=Relaunch.__call__) as again:
        for i in range(5):
            new, cached = [3 + i, 40, 7 * i][: 2 + i % 2], [64, 65, 3][: 2 + i % 2]
            case = make_case(64, torch.bfloat16, dim=64, device="cuda", new=new, cached=cached, unused=i)
            arguments = silu_append_case(case)
            arguments["page_table"] = F.pad(arguments["page_table"], (0, 8 - arguments["page_table"].shape[1]))
            pool = arguments["pool"]
            arguments["pool"] = F.pad(pool, (0,) * 9 + (16 - len(pool),), value=float("nan"))
            x, pool = two_ops(arguments)
            before = again.call_count
            silu_append_kv(**arguments)
            assert torch.equal(bits(arguments["x"]), bits(x)) and torch.equal(bits(arguments["pool"]), bits(pool))
            calls = again.call_count - before
    assert calls == 1


# The pass. W has parts of four columns: u, v, q, k of two heads of two.

W, W2 = torch.randn(16, 6), torch.randn(16, 6)
Pages = tuple[Tensor, ...]  # the pool, and what append_kv takes behind k and v
Function = Callable[[Tensor, Tensor, Pages], Any]


def append(pages: Pages, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    pool, *paging = pages
    ops.wait_layer(pool, 0)
    ops.append_kv(pool, k.reshape(-1, 2, 2), v.reshape(-1, 2, 2), *paging, None, None)
    return k, v


def chunked(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.silu(F.linear(x, w)).chunk(4, -1)
    return u, q, *append(pages, k, v)


def sliced(x: Tensor, w: Tensor, pages: Pages) -> Any:
    y = F.silu(x @ w.T)
    return append(pages, y[:, 5:9], y[:, 11:15])


def interleaved(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.silu(F.linear(x, w)).view(-1, 2, 8).split(2, -1)
    pool, *paging = pages
    ops.append_kv(pool, k, v, *paging, None, None)
    return u, q


def twice(x: Tensor, w: Tensor, pages: Pages) -> Any:
    return chunked(x, w, pages), chunked(x, w, pages)


def read_before(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.silu(F.linear(x, w)).chunk(4, -1)
    return u + 1, *append(pages, k, v)


def written_before(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.silu(F.linear(x, w)).chunk(4, -1)
    k.mul_(2.0)
    return u, *append(pages, k, v)


def changed(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.silu(F.linear(x, w)).chunk(4, -1)
    return u, *append(pages, k * 2.0, v)


def of_two(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, k = F.silu(F.linear(x, w)).split([12, 4], -1)
    v, q = F.silu(F.linear(x, w + 1.0)).split([4, 12], -1)
    return u, q, *append(pages, k, v)


def of_some(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.linear(x, w).chunk(4, -1)
    return F.silu(u), q, *append(pages, k, v)


def one_head_for_all(x: Tensor, w: Tensor, pages: Pages) -> Any:
    y = F.silu(F.linear(x, w))
    pool, *paging = pages
    ops.append_kv(pool, y[:, None, :2].expand(-1, 2, 2), y[:, 4:8].reshape(-1, 2, 2), *paging, None, None)
    return y


def padded(x: Tensor, w: Tensor, pages: Pages) -> Any:
    u, v, q, k = F.silu(F.linear(x[None], w)).chunk(4, -1)
    return u, q, *append(pages, k, v)


MERGED: list[tuple[Function, int]] = [(chunked, 1), (sliced, 1), (interleaved, 1), (twice, 2)]
LEFT = [read_before, written_before, changed, of_two, of_some, one_head_for_all, padded]


@pytest.mark.parametrize("function, count", [*MERGED, *((function, 0) for function in LEFT)])
def test_merged_or_left_alone(function: Function, count: int) -> None:
    def pages(batch: int) -> Pages:
        table = torch.tensor([[1, 0], [2, 4], [3, 5]], dtype=torch.int32)[:batch]
        cached = torch.tensor([3, 0, 14], dtype=torch.int32)[:batch]
        return torch.full((6, 2, 16, 2, 2), float("nan")), torch.tensor([0, 4, 5, 9])[: batch + 1], table, cached

    def call(w: Tensor, pool: Tensor, x: Tensor, offsets: Tensor, table: Tensor, cached: Tensor) -> Any:
        return function(x, w, (pool, offsets, table, cached))

    pool, *paging = pages(2)
    gm = traced(call, [torch.randn(7, 6), *paging], fixed=[W, pool])
    silu_in_place.run(gm.graph)
    before = [node.target for node in gm.graph.nodes]
    assert silu_append.run(gm.graph) == count
    assert silu_append.run(gm.graph) == 0
    gm.graph.lint()
    gm.recompile()
    after = [node.target for node in gm.graph.nodes]
    for op in (ops.silu_.default, ops.append_kv.default):
        assert before.count(op) - after.count(op) == count
    assert after.count(ops.silu_append_kv.default) == count
    assert count or after == before
    x = torch.randn(11, 6)
    ours, expected = pages(3), pages(3)
    results = gm(W, ours[0], x, *ours[1:]), function(x, W, expected)
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, results), strict=True):
        assert torch.equal(bits(one), bits(other))
    assert torch.equal(bits(ours[0]), bits(expected[0])) and not ours[0].isnan().all()


def test_compiled() -> None:
    """The projection and the pool are written where they are; the projection is there before the wait."""
    x = torch.randn(9, 6)
    paging = torch.tensor([0, 9]), torch.tensor([[1]], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    @torch.compile(fullgraph=True)
    def step(x: Tensor, pool: Tensor) -> list[Tensor]:
        y = F.linear(x, W)
        ops.wait_layer(pool, 0, y)
        ops.silu_append_kv(y, pool, 12, 2, 4, 2, *paging, None, None)
        return list(y.chunk(4, -1))

    with torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        pool = torch.full((2, 2, 16, 2, 2), float("nan"))
        parts, (code,) = torch._inductor.utils.run_and_get_code(step, x, pool)
    y = F.silu(F.linear(x, W))
    torch.testing.assert_close(parts, list(y.chunk(4, -1)))
    torch.testing.assert_close(pool[1, :, :9].flatten(2).unbind(), (y[:, 12:], y[:, 4:8]))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    calls = ("extern_kernels.mm", "hstu_compile.wait_layer.default(", "hstu_compile.silu_append_kv.default(")
    assert [name for line in code.splitlines() for name in calls if name in line] == list(calls)


def test_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch a layer instead of two, behind what waits for the layer's pages; the same answers, bit for bit."""
    monkeypatch.setattr(engine_module, "compiled", lambda step: step.graph.forward)
    model = NativeRanking(MAX_SEQ_LEN).eval()
    traffic = Traffic(model)
    requests = [
        (users, traffic.request(users, histories, targets))
        for users, histories, targets in ((["a", "b"], [9, 3], [0, 3]), (["b", "a"], [20, 9], [2, 1]))
    ]
    found = []
    for merged in (True, False):
        with monkeypatch.context() as patch:
            if not merged:
                patch.setattr(silu_append, "run", lambda graph: 0)
            engine = hstu_compile.serve(model, max_batch=3, max_seq_len=MAX_SEQ_LEN, page_size=16)
            answers = [engine(users, *args) for users, args in requests]
        for answer, (_, args) in zip(answers, requests, strict=True):
            traffic.check(answer, args)
        assert engine._step is not None
        known = (ops.silu_.default, ops.wait_layer.default, ops.append_kv.default, ops.silu_append_kv.default)
        nodes = [node for node in engine._step.graph.graph.nodes if node.target in known]
        assert [node.target for node in nodes] == list(known[1::2] if merged else known[:3]) * 2
        if merged:  # the projection does not wait for pages
            assert [wait.args[2] for wait in nodes[::2]] == [both.args[0] for both in nodes[1::2]]
        found.append([answer.output for answer in answers])
        engine.close()
    assert all(map(torch.equal, *found))
