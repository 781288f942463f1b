"""The portable Triton attention against float64. `test_attention_triton.py` runs these tests: on a GPU if there is one,
else in a process of their own in the Triton interpreter (which reads TRITON_INTERPRET when triton is imported).
"""

import os

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
import triton
import triton.language as tl

from hstu_compile.ops.attention_mask import attention_mask
from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference, hstu_attention_reference
from hstu_compile.ops.kernels import attention_triton
from hstu_compile.ops.kernels.attention_triton_tiles import Tile, Tiles
from hstu_compile.ops.kernels.mask_tiles import (
    Family,
    Mask,
    all_cells_live,
    key_spans,
    live_cells,
    nth_tile,
    num_tiles,
    query_spans,
)

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])  # the interpreter has no bf16 products
UNIT = 128 if GPU else 16  # a tile, or a few
LENGTHS = [1, UNIT + 1, 0, 2 * UNIT + 1] + ([UNIT - 1, UNIT, 5 * UNIT + 3] if GPU else [])
TARGETS = [1, 7, 0, UNIT - 2, 3, UNIT // 2, 9][: len(LENGTHS)]
CONTEXTUALS = [0, 4, 0, 6, 1, 2, 1][: len(LENGTHS)]
B, N, H = len(LENGTHS), max(LENGTHS) + 2, 2
ARGUMENTS = {
    "seq_offsets": None,
    "seq_lengths": None,
    "num_targets": None,
    "num_contextuals": None,
    "attn_mask": None,
    "attn_bias": None,
    "causal": True,
    "contextual_seq_len": 0,
    "target_group_size": 1,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "targets_share_position": False,
}
MASKS = {
    "causal": {},
    "full": {"causal": False},
    "targets": {"num_targets": TARGETS},
    "target groups": {"num_targets": TARGETS, "target_group_size": 3},
    "contextual": {"num_contextuals": CONTEXTUALS, "num_targets": TARGETS},
    "window": {"max_attn_len": UNIT // 2 + 1},
    "everything": {
        "num_targets": TARGETS,
        "target_group_size": 4,
        "num_contextuals": CONTEXTUALS,
        "max_attn_len": 9,
        "min_full_attn_seq_len": 5,
        "targets_share_position": True,
    },
    "full, everything": {
        "causal": False,
        "num_targets": TARGETS,
        "target_group_size": 2,
        "num_contextuals": CONTEXTUALS,
        "max_attn_len": 7,
        "min_full_attn_seq_len": 3,
    },
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of few cells where every one costs milliseconds."""
    if not GPU:
        wide, tall = Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)
        monkeypatch.setattr(attention_triton, "tiles_for", lambda *_: Tiles(tall, wide, tall, wide))


def tensor(values):
    return torch.tensor(values, device=DEVICE)


def poisoned(shape: tuple[int, ...], order: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Random numbers whose dimensions lie in memory in this order, between NaN that no kernel may read."""
    sizes = [shape[d] for d in order]
    sizes[-1] += 16
    storage = torch.full(sizes, float("nan"), device=DEVICE, dtype=dtype)
    inside = storage[..., 8 : 8 + shape[order[-1]]]
    inside.copy_(torch.randn(inside.shape, device=DEVICE))
    return inside.permute([order.index(d) for d in range(len(shape))])


def inputs(layout: str, attn_dim: int, hidden_dim: int, dtype: torch.dtype):
    """q, k, v, dout and the arguments that say where the sequences lie; rows of no sequence are NaN."""
    jagged = layout == "jagged"
    lead = (sum(LENGTHS) + 3,) if jagged else (B, N)
    order = {"jagged": [0, 1, 2], "rows first": [0, 1, 2, 3], "heads first": [0, 2, 1, 3]}[layout]
    tensors = [poisoned((*lead, H, dim), order, dtype) for dim in (attn_dim, attn_dim, hidden_dim, hidden_dim)]
    lengths = tensor(LENGTHS)
    if jagged:
        unused = torch.arange(lead[0], device=DEVICE) >= sum(LENGTHS)
        where = {"seq_offsets": F.pad(lengths.cumsum(0), (1, 0))}
    else:
        unused = torch.arange(N, device=DEVICE) >= lengths[:, None]
        where = {"seq_lengths": lengths.int()}
    for t in tensors:
        t[unused] = float("nan")
    return *tensors, {**ARGUMENTS, **where, "max_seq_len": N, "alpha": attn_dim**-0.5}


def check(q, k, v, dout, arguments: dict) -> None:
    """Output and every gradient within the budget; unused rows of a dense result 0; the same bits twice."""
    arguments = {n: tensor(x) if isinstance(x, list) else x for n, x in arguments.items()}
    mask, bias = arguments["attn_mask"], arguments["attn_bias"]
    scaling_seq_len = 3.0
    kernel = {**arguments, "scale": 1 / scaling_seq_len}
    plain = {**arguments, "scaling_seq_len": scaling_seq_len}
    double = {
        **plain,
        "attn_mask": None if mask is None else mask.double(),
        "attn_bias": None if bias is None else bias.double(),
    }
    needs_bias_grad = bias is not None
    args64 = [t.double() for t in (q, k, v)]
    want = [
        hstu_attention_reference(*args64, **double),
        *hstu_attention_backward_reference(dout.double(), *args64, **double, needs_bias_grad=needs_bias_grad),
    ]
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *([bias] if needs_bias_grad else []))]
    out = eager_attention(*leaves[:3], **{**plain, "attn_bias": leaves[3] if needs_bias_grad else None})
    used = ~dout.isnan().any(-1, keepdim=True)
    eager = [out, *torch.autograd.grad(out, leaves, torch.where(used, dout, 0))]

    def run():
        out = attention_triton.forward(q, k, v, **kernel)
        return out, *attention_triton.backward(dout, q, k, v, **kernel, needs_bias_grad=needs_bias_grad)

    got = run()
    again = run() if GPU else got
    names = ["out", "dq", "dk", "dv", *(["dbias"] if needs_bias_grad else [])]
    assert needs_bias_grad or got[4] is None
    for name, ours, theirs, reference, repeated in zip(names, got, eager, want, again, strict=False):
        assert ours.is_contiguous()
        if name != "dbias" and arguments["seq_offsets"] is not None:  # rows of no sequence are not the kernels'
            total = sum(LENGTHS)
            ours, theirs, reference, repeated = (t[:total] for t in (ours, theirs, reference, repeated))
        assert_within_budget(ours, theirs, reference, FORWARD if name == "out" else BACKWARD, name)
        assert torch.equal(ours, repeated), f"{name} differs from run to run"


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch):
    """Memory for results holds NaN until a kernel writes it."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: _poison(new_empty(self, *a, **k)))
    monkeypatch.setattr(attention_triton.torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))


def _poison(t: torch.Tensor) -> torch.Tensor:
    return t.fill_(float("nan")) if t.is_floating_point() else t


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    *tensors, arguments = inputs("jagged", 16, 16, DTYPES[-1])
    check(*tensors, {**arguments, **MASKS[mask]})


@pytest.mark.parametrize("layout", ["rows first", "heads first"])
@pytest.mark.parametrize("mask", ["causal", "everything"])
def test_dense(layout: str, mask: str) -> None:
    *tensors, arguments = inputs(layout, 16, 32, torch.float32)
    check(*tensors, {**arguments, **MASKS[mask]})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(32, 16), (24, 40), (1, 5)] + ([(64, 128), (256, 256), (96, 192)] if GPU else []))
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    *tensors, arguments = inputs("jagged", *dims, dtype)
    check(*tensors, arguments)


@pytest.mark.parametrize("batches", [1, B])
@pytest.mark.parametrize("heads", [1, H])
def test_bias(batches: int, heads: int) -> None:
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    bias = torch.randn(batches, heads, N, N, device=DEVICE)
    bias[:, :, 0, 1:] = float("nan")  # dead cells
    bias[:, :, :, max(LENGTHS) :] = float("nan")
    check(*tensors, {**arguments, **MASKS["targets"], "attn_bias": bias})


def test_expanded_16_bit_bias() -> None:
    *tensors, arguments = inputs("rows first", 16, 16, torch.float16)
    bias = torch.randn(B, 1, N, N, device=DEVICE).half().expand(B, H, N, N)
    check(*tensors, {**arguments, "attn_bias": bias})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_mask_tensor(dtype: torch.dtype) -> None:
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    mask = torch.ones(N, N, device=DEVICE).tril()
    mask[: UNIT + 3, : UNIT // 2] = 0  # tiles of zeros before tiles of ones
    mask = mask.to(dtype).expand(B, 1, N, N)
    check(*tensors, {**arguments, "causal": False, "attn_mask": mask})


def test_mask_tensor_of_every_head_with_everything() -> None:
    *tensors, arguments = inputs("rows first", 16, 16, torch.float32)
    mask = torch.randn(1, H, N, N, device=DEVICE) * (torch.rand(1, H, N, N, device=DEVICE) < 0.01)
    bias = torch.randn(B, H, N, N, device=DEVICE).mT
    check(*tensors, {**arguments, **MASKS["everything"], "attn_mask": mask, "attn_bias": bias})


def test_nothing_to_do() -> None:
    for sizes in ([0], [0, 0, 0]):
        offsets = tensor(sizes)
        q = torch.empty(0, H, 16, device=DEVICE)
        arguments = {**ARGUMENTS, "seq_offsets": offsets, "max_seq_len": 4, "alpha": 1.0, "scale": 1.0}
        assert attention_triton.forward(q, q, q, **arguments).shape == q.shape
        grads = attention_triton.backward(q, q, q, q, **arguments, needs_bias_grad=False)
        assert [g.shape for g in grads[:3]] == [q.shape] * 3
        bias = torch.randn(1, 1, 4, 4, device=DEVICE)
        arguments["attn_bias"] = bias
        dbias = attention_triton.backward(q, q, q, q, **arguments, needs_bias_grad=True)[3]
        assert torch.equal(dbias, torch.zeros_like(bias))


def test_silu_far_from_zero() -> None:
    """Scores that a mask pushed to the end of the range give exactly 0, and large ones no NaN."""
    q = torch.full((4, 1, 16), 100.0, device=DEVICE)
    bias = torch.tensor([-1e9, torch.finfo(torch.float32).min, -200000.0, 1e4], device=DEVICE).expand(1, 1, 4, 4)
    arguments = {**ARGUMENTS, "seq_offsets": tensor([0, 4]), "max_seq_len": 4, "alpha": 1.0, "causal": False}
    out = attention_triton.forward(q, q, q, **{**arguments, "scale": 1.0, "attn_bias": bias})
    want = hstu_attention_reference(
        q.double(), q.double(), q.double(), **{**arguments, "attn_bias": bias.double()}, scaling_seq_len=1.0
    )
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=0)


@triton.jit
def record_tiles(
    visits, whole, cells, m_length, m_history_end, m_contextual, m_group, m_window, m_min_full, family, tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, BY_KEYS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    m = Mask(m_length, m_history_end, m_contextual, m_group, m_window, m_min_full)
    tile = tl.program_id(0)
    if BY_KEYS:
        spans = query_spans(tile * COLS, ROWS, COLS, m, family)
    else:
        spans = key_spans(tile * ROWS, ROWS, COLS, m, family)
    for i in range(num_tiles(spans)):
        other = nth_tile(i, spans)
        cell = tile * tiles + other
        live = all_cells_live(tile * ROWS, other * COLS, ROWS, COLS, m, family)
        if BY_KEYS:
            live = all_cells_live(other * ROWS, tile * COLS, ROWS, COLS, m, family)
        tl.store(visits + cell, tl.load(visits + cell) + 1)
        tl.store(whole + cell, live.to(tl.int32))
    if tile == 0:
        index = tl.arange(0, SIZE)
        live_matrix = live_cells(index[:, None], index[None, :], m, family)
        tl.store(cells + index[:, None] * SIZE + index[None, :], live_matrix.to(tl.int32))


@st.composite
def masks(draw):
    length = draw(st.integers(0, 30))
    contextual = draw(st.sampled_from([0, 0, 1, 2, 5])) if length >= 5 else 0
    targets = draw(st.one_of(st.just(0), st.integers(0, length - contextual)))
    window = draw(st.sampled_from([0, 1, 3, 8]))
    return {
        "length": length,
        "contextual": contextual,
        "num_targets": targets,
        "target_group_size": draw(st.sampled_from([1, 1, 2, 5, 9])),
        "max_attn_len": window,
        "min_full_attn_seq_len": draw(st.sampled_from([0, 1, 6])) if window else 0,
        "causal": draw(st.booleans()),
        "targets_share_position": draw(st.booleans()),
    }


@settings(max_examples=1000 if GPU else 80)
@given(mask=masks(), rows=st.sampled_from([4, 8]), cols=st.sampled_from([4, 8]))
def test_tiles_cover_the_mask(mask: dict, rows: int, cols: int) -> None:
    """Live tiles are visited once, dead ones at most once; whole tiles are whole; the cells are those of the formula."""
    mask = dict(mask)
    length, contextual = mask.pop("length"), mask.pop("contextual")
    index = torch.arange(32, device=DEVICE)
    live = attention_mask(index[:, None], index[None, :], tensor(length), contextual=contextual, **mask)
    family = Family(
        *(
            tl.constexpr(flag)
            for flag in (
                mask["causal"],
                contextual > 0,
                mask["num_targets"] > 0,
                mask["max_attn_len"] > 0,
                mask["targets_share_position"] and mask["num_targets"] > 0,
            )
        )
    )
    row_tiles, col_tiles = 32 // rows, 32 // cols
    blocks = live.view(row_tiles, rows, col_tiles, cols)
    exists = ((index[:, None] < length) & (index[None, :] < length)).view(row_tiles, rows, col_tiles, cols)
    for by_keys in (False, True):
        shape = (col_tiles, row_tiles) if by_keys else (row_tiles, col_tiles)
        visits, whole = (torch.zeros(shape, dtype=torch.int32, device=DEVICE) for _ in range(2))
        cells = torch.zeros(32, 32, dtype=torch.int32, device=DEVICE)
        record_tiles[(shape[0],)](
            visits, whole, cells, length, length - mask["num_targets"], contextual, mask["target_group_size"],
            mask["max_attn_len"], mask["min_full_attn_seq_len"], family, shape[1],
            ROWS=rows, COLS=cols, BY_KEYS=by_keys, SIZE=32,
        )  # fmt: skip
        visits, whole = (t.T if by_keys else t for t in (visits, whole))
        assert torch.equal(cells.bool(), live)
        assert visits.max() <= 1
        assert (visits[blocks.any(3).any(1)] == 1).all()
        assert (blocks | ~exists).all(3).all(1)[whole.bool()].all()


def test_simple_masks_visit_no_dead_tile() -> None:
    """What is skipped: the count of tiles is that of the live ones."""
    for mask in (
        {"causal": True},
        {"causal": True, "max_attn_len": 5},
        {"causal": False, "max_attn_len": 5},
        {"causal": True, "num_targets": 12},
    ):
        full = {"num_targets": 0, "max_attn_len": 0, **mask}
        family = Family(
            *(tl.constexpr(f) for f in (full["causal"], False, full["num_targets"] > 0, full["max_attn_len"] > 0, False))
        )
        index = torch.arange(32, device=DEVICE)
        live = attention_mask(
            index[:, None], index[None, :], tensor(32), contextual=0, target_group_size=1, min_full_attn_seq_len=0,
            targets_share_position=False, **full,
        ).view(8, 4, 8, 4).any(3).any(1)  # fmt: skip
        for by_keys in (False, True):
            visits, whole = (torch.zeros(8, 8, dtype=torch.int32, device=DEVICE) for _ in range(2))
            cells = torch.zeros(32, 32, dtype=torch.int32, device=DEVICE)
            record_tiles[(8,)](
                visits, whole, cells, 32, 32 - full["num_targets"], 0, 1, full["max_attn_len"], 0, family, 8,
                ROWS=4, COLS=4, BY_KEYS=by_keys, SIZE=32,
            )  # fmt: skip
            assert torch.equal(visits.bool(), live.T if by_keys else live)
