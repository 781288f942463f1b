"""The portable Triton attention against float64. `test_attention_triton.py` runs these tests: on a GPU if there is one,
else in a process of their own in the Triton interpreter (which reads TRITON_INTERPRET when triton is imported).
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from hypothesis import example, given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
import triton
import triton.language as tl
from tiled_masks import occupied_tiles, tiled

from hstu_compile.ops.attention_mask import attention_mask
from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference, hstu_attention_reference
from hstu_compile.ops.kernels import attention_triton, mask_occupancy
from hstu_compile.ops.kernels.attention_triton_tiles import Tile, Tiles
from hstu_compile.ops.kernels.launch import Extent
from hstu_compile.ops.kernels.mask_tiles import (
    Family,
    Mask,
    all_cells_live,
    key_spans,
    live_cells,
    query_spans,
)
from hstu_compile.ops.kernels.zero_tail import zero_launch
from hstu_compile.ops.mask_tile_states import GRAIN, mask_tile_states_reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if GPU else [])  # the interpreter has no bf16 products
UNIT = 128 if GPU else 16  # a tile, or a few
SMALL_GRAIN = GRAIN if GPU else 16
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
    "no history": {
        "num_targets": TARGETS,
        "target_group_size": 5,
        "num_contextuals": [3, UNIT - 4, 2, UNIT + 5, UNIT, UNIT // 2 + 1, 5 * UNIT][: len(LENGTHS)],
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
        monkeypatch.setattr(attention_triton, "tiles_for", lambda *_, **__: Tiles(tall, wide, tall, wide))


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
    kernel = {**arguments, "attn_mask": tiled(mask, SMALL_GRAIN), "scale": 1 / scaling_seq_len}
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
    # Eager code multiplies its mask: NaN in a dead cell of the bias is ours to survive, not its own.
    eager_bias = leaves[3].nan_to_num(0.0) if needs_bias_grad else None
    out = eager_attention(*leaves[:3], **{**plain, "attn_bias": eager_bias})
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


@pytest.mark.parametrize("layout, mask", [("rows first", "causal"), ("heads first", "everything")])
def test_dense(layout: str, mask: str) -> None:
    *tensors, arguments = inputs(layout, 16, 32, torch.float32)
    check(*tensors, {**arguments, **MASKS[mask]})


def test_dk_and_dv_each_by_itself(monkeypatch) -> None:
    tiles_for = attention_triton.tiles_for
    monkeypatch.setattr(attention_triton, "tiles_for", lambda *a, **k: tiles_for(*a, **k)._replace(dk_dv=None))
    *tensors, arguments = inputs("jagged", 16, 32, torch.float32)
    mask = torch.randint(0, 3, (1, H, N, N), device=DEVICE)
    bias = torch.randn(B, 1, N, N, device=DEVICE)
    check(*tensors, {**arguments, **MASKS["everything"], "attn_mask": mask, "attn_bias": bias})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(32, 16), (24, 40), (1, 5)] + ([(64, 128), (256, 256), (96, 192)] if GPU else []))
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    *tensors, arguments = inputs("jagged", *dims, dtype)
    check(*tensors, arguments)


@pytest.mark.parametrize("batches, heads", [(1, 1), (B, 1), (B, H)])
def test_bias(batches: int, heads: int) -> None:
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    bias = torch.randn(batches, heads, N, N, device=DEVICE)
    bias[:, :, 0, 1:] = float("nan")  # dead cells
    bias[:, :, :, max(LENGTHS) :] = float("nan")
    check(*tensors, {**arguments, **MASKS["targets"], "attn_bias": bias})


def test_float64_bias() -> None:
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    check(*tensors, {**arguments, "attn_bias": torch.randn(1, H, N, N, device=DEVICE).double()})


def test_dbias_in_chunks_of_the_head_dimension(monkeypatch) -> None:
    monkeypatch.setattr(attention_triton, "CHUNK", 16)
    *tensors, arguments = inputs("jagged", 40, 24, torch.float32)
    check(*tensors, {**arguments, "attn_bias": torch.randn(1, H, N, N, device=DEVICE)})


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


@pytest.mark.parametrize("layout", ["jagged", "rows first"])
def test_mask_tensor_of_rows(layout: str) -> None:
    """All columns are one cell in memory, and tiles are empty or full."""
    *tensors, arguments = inputs(layout, 16, 16, torch.float32)
    live = torch.arange(N, device=DEVICE).expand(B, N) // UNIT % 2 == torch.arange(B, device=DEVICE)[:, None] % 2
    mask = live.contiguous()[:, None, :, None].expand(B, 1, N, N)
    check(*tensors, {**arguments, **MASKS["everything"], "attn_mask": mask})


def test_mask_tensor_of_every_head_with_everything() -> None:
    *tensors, arguments = inputs("rows first", 16, 16, torch.float32)
    mask = torch.randn(1, H, N, N, device=DEVICE) * (torch.rand(1, H, N, N, device=DEVICE) < 0.01)
    bias = torch.randn(B, H, N, N, device=DEVICE).mT
    check(*tensors, {**arguments, **MASKS["everything"], "attn_mask": mask, "attn_bias": bias})


MASKS_OF_TILES = (2, 3) if GPU else (1, 2)  # batch and heads


def mask_of_tiles(N: int, grain: int) -> torch.Tensor:
    """Tiles of zeros, of ones, of ones but for one cell, and some larger ones of the same."""
    tiles = torch.randint(0, 3, (*MASKS_OF_TILES, triton.cdiv(N, grain), triton.cdiv(N, grain)), device=DEVICE)
    tiles[:, 0, :4, 1:5] = 0
    tiles[0, :, 2:6, 4:] = 1
    tiles[:, 0, :8, -1] = 0  # at the edge a larger tile has as many columns, and rows
    tiles[0, :, -1, -1] = 1
    mask = tiles.bool().repeat_interleave(grain, 2).repeat_interleave(grain, 3).float()
    mask[:, :, ::grain, ::grain] *= tiles  # that one is 2
    return mask[:, :, :N, :N]


@pytest.mark.parametrize("N", [1, 31, 64, 259])
def test_tile_states(N: int) -> None:
    mask = mask_of_tiles(N, GRAIN)
    weird = torch.where(mask == 2, float("nan"), mask)
    for cells in (mask, mask.bool(), mask.long(), weird, mask.mT, mask[:1].expand(5, -1, N, N), mask.half()):
        assert torch.equal(mask_occupancy.tile_states(cells, GRAIN), mask_tile_states_reference(cells))
    spread = torch.full((*MASKS_OF_TILES, N + 5, N + 3), float("nan"), device=DEVICE)[:, :, 5:, 2 : N + 2].copy_(mask)
    assert torch.equal(mask_occupancy.tile_states(spread, GRAIN), mask_tile_states_reference(mask))


@pytest.mark.parametrize("rows, cols", [(16, 32), (32, 16), (64, 64), (128, 32), (8, 4)])
def test_lists_of_occupied_tiles(rows: int, cols: int, monkeypatch) -> None:
    """From the states of tiles of 16 x 16 cells: of those in a tile, or of the one that it is part of."""
    monkeypatch.setattr(mask_occupancy, "WIDTH", 4)
    grain = 16
    N = 4 * max(cols, grain) + 3  # a list takes its width in tiles several times
    mask = mask_of_tiles(N, grain)
    row_tiles, col_tiles = triton.cdiv(N, rows), triton.cdiv(N, cols)
    held, ones = (torch.empty(*MASKS_OF_TILES, row_tiles, col_tiles, dtype=torch.bool, device=DEVICE) for _ in range(2))
    for row, col in itertools.product(range(row_tiles), range(col_tiles)):
        first_row, first_col = row * rows // grain * grain, col * cols // grain * grain
        part = mask[:, :, first_row : first_row + max(rows, grain), first_col : first_col + max(cols, grain)]
        held[:, :, row, col], ones[:, :, row, col] = (part != 0).any(3).any(2), (part == 1).all(3).all(2)
    assert {0, 1, 2} == set((held.int() + ones).unique().tolist())
    for cells, by_keys in ((mask, False), (mask.mT.contiguous(), True)):
        visits, ranks = occupied_tiles(tiled(cells, grain), rows, cols, by_keys)
        assert torch.equal(ranks.long(), F.pad(held.cumsum(-1), (1, 0)))
        listed = torch.arange(col_tiles, device=DEVICE) < ranks[..., -1:]
        assert torch.equal(visits[listed].long(), (2 * torch.arange(col_tiles, device=DEVICE) + ones)[held])


def test_a_call_lists_tiles_of_one_shape_once(monkeypatch) -> None:
    """A backward that makes dq and dbias in tiles of one shape makes two lists: theirs and that of dk and dv."""
    made = []
    list_tiles = mask_occupancy.list_tiles

    def recorded(mask, rows, cols, workspace, *, by_keys):
        made.append((rows, cols, by_keys))
        return list_tiles(mask, rows, cols, workspace, by_keys=by_keys)

    monkeypatch.setattr(attention_triton, "list_tiles", recorded)
    tile, tall = Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)
    monkeypatch.setattr(attention_triton, "tiles_for", lambda *_, **__: Tiles(tile, tile, tall, tile))
    *tensors, arguments = inputs("jagged", 16, 16, torch.float32)
    ones, bias = torch.ones(1, 1, N, N, device=DEVICE), torch.randn(1, 1, N, N, device=DEVICE)
    cells = {"attn_mask": tiled(ones), "attn_bias": bias}
    call = {**arguments, **cells, "scale": 1.0}
    attention_triton.backward(tensors[3], *tensors[:3], **call, needs_bias_grad=True)
    assert made == [(16, 32, False), (16, 32, True)]


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
    call = {**arguments, "scale": 1.0}
    out = attention_triton.forward(q, q, q, **{**call, "attn_bias": bias})
    arguments |= {"scaling_seq_len": 1.0, "attn_bias": bias}
    eager = eager_attention(q, q, q, **arguments)
    want = hstu_attention_reference(*[q.double()] * 3, **{**arguments, "attn_bias": bias.double()})
    assert_within_budget(out, eager, want, FORWARD)
    dead = attention_triton.forward(q, q, q, **{**call, "attn_bias": torch.full_like(bias, -1e9)})
    assert torch.equal(dead, torch.zeros_like(dead))


SIZE = 32  # cells of a side in the tests of mask_tiles


@triton.jit
def store_spans(out, tiles, spans, SIZE: tl.constexpr):
    tl.store(out + 0 * SIZE + tiles, spans.start0)
    tl.store(out + 1 * SIZE + tiles, spans.count0)
    tl.store(out + 2 * SIZE + tiles, spans.start1)
    tl.store(out + 3 * SIZE + tiles, spans.count1)
    tl.store(out + 4 * SIZE + tiles, spans.start2)
    tl.store(out + 5 * SIZE + tiles, spans.count2)


@triton.jit
def what_tiles_say(
    by_rows, by_cols, whole, cells, length, history_end, contextual, group_size, max_attn_len, min_full, family,
    ROWS: tl.constexpr, COLS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Every answer of mask_tiles for one sequence; what a kernel asks of one tile is asked of all at once."""
    m = Mask(length, history_end, contextual, group_size, max_attn_len, min_full)
    tiles = tl.arange(0, SIZE)
    store_spans(by_rows, tiles, key_spans(tiles * ROWS, ROWS, COLS, m, family), SIZE)
    store_spans(by_cols, tiles, query_spans(tiles * COLS, ROWS, COLS, m, family), SIZE)
    square = tiles[:, None] * SIZE + tiles[None, :]
    tl.store(whole + square, all_cells_live(tiles[:, None] * ROWS, tiles[None, :] * COLS, ROWS, COLS, m, family))
    tl.store(cells + square, live_cells(tiles[:, None], tiles[None, :], m, family))


def visited(spans: torch.Tensor, others: int) -> torch.Tensor:
    """spans [6, tiles] -> [tiles, others]: how often each tile of the other side is visited."""
    other = torch.arange(others, device=DEVICE)
    return sum(
        ((other >= start[:, None]) & (other < (start + count)[:, None])).int() for start, count in spans.view(3, 2, -1)
    )


def tiles_and_mask(rows: int, cols: int, length: int, contextual: int = 0, **mask):
    """Visits by rows and by columns, which tiles are whole, the cells, and the formula, the last in tiles too."""
    defaults = {"num_targets": 0, "target_group_size": 1, "max_attn_len": 0, "min_full_attn_seq_len": 0}
    mask = {"causal": True, "targets_share_position": False, **defaults, **mask}
    index = torch.arange(SIZE, device=DEVICE)
    live = attention_mask(index[:, None], index[None, :], tensor(length), contextual=contextual, **mask)
    shared = mask["targets_share_position"] and mask["num_targets"] > 0
    flags = (mask["causal"], contextual > 0, mask["num_targets"] > 0, mask["max_attn_len"] > 0, shared)
    by_rows, by_cols = (torch.zeros(6, SIZE, dtype=torch.int32, device=DEVICE) for _ in range(2))
    whole, cells = (torch.zeros(SIZE, SIZE, dtype=torch.int32, device=DEVICE) for _ in range(2))
    what_tiles_say[(1,)](
        by_rows, by_cols, whole, cells, length, length - mask["num_targets"], contextual, mask["target_group_size"],
        mask["max_attn_len"], mask["min_full_attn_seq_len"], Family(*(tl.constexpr(flag) for flag in flags)),
        ROWS=rows, COLS=cols, SIZE=SIZE,
    )  # fmt: skip
    row_tiles, col_tiles = SIZE // rows, SIZE // cols
    visits = visited(by_rows[:, :row_tiles], col_tiles), visited(by_cols[:, :col_tiles], row_tiles).T
    return *visits, whole[:row_tiles, :col_tiles].bool(), cells.bool(), live


@st.composite
def masks(draw):
    length = draw(st.integers(0, SIZE))
    return {
        "length": length,
        "contextual": draw(st.sampled_from([0, 0, 1, 2, 5, 20])),
        "num_targets": draw(st.one_of(st.just(0), st.integers(0, length))),
        "target_group_size": draw(st.sampled_from([1, 1, 2, 5, 9])),
        "max_attn_len": draw(st.sampled_from([0, 1, 3, 8])),
        "min_full_attn_seq_len": draw(st.sampled_from([0, 1, 6])),
        "causal": draw(st.booleans()),
        "targets_share_position": draw(st.booleans()),
    }


@settings(max_examples=200 if GPU else 60)
@example(mask={"length": 21, "causal": False, "max_attn_len": 1, "min_full_attn_seq_len": 6}, rows=4, cols=4)
@given(mask=masks(), rows=st.sampled_from([4, 8]), cols=st.sampled_from([4, 8]))
def test_tiles_cover_the_mask(mask: dict, rows: int, cols: int) -> None:
    """Live tiles are visited once, dead ones at most once; whole tiles are whole; the cells are the formula's."""
    by_rows, by_cols, whole, cells, live = tiles_and_mask(rows, cols, **mask)
    assert torch.equal(cells, live)
    used = torch.arange(SIZE, device=DEVICE) < mask["length"]
    in_tiles = SIZE // rows, rows, SIZE // cols, cols
    any_live = live.view(in_tiles).any(3).any(1)
    all_live = (live | ~(used[:, None] & used)).view(in_tiles).all(3).all(1)
    for visits in (by_rows, by_cols):
        assert visits.max() <= 1
        assert (visits[any_live] == 1).all()
        assert all_live[whole & (visits == 1)].all()


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"max_attn_len": 5},
        {"causal": False, "max_attn_len": 5},
        {"num_targets": 12},
        {"num_targets": 12, "target_group_size": 6},
        {"num_targets": 12, "max_attn_len": 5, "targets_share_position": True},
    ],
)
def test_no_dead_tile_is_visited(mask: dict) -> None:
    by_rows, by_cols, _, _, live = tiles_and_mask(4, 4, 32, **mask)
    any_live = live.view(8, 4, 8, 4).any(3).any(1)
    assert torch.equal(by_rows.bool(), any_live)
    assert torch.equal(by_cols.bool(), any_live)


def test_rows_of_no_sequence_become_zero() -> None:
    results = tuple(torch.full((9, 2, dim), float("nan"), device=DEVICE).to(DTYPES[-1]) for dim in (5, 700))
    rows = torch.full((9, 2, 12), float("nan"), device=DEVICE)
    apart = rows[..., 3:8]  # heads with others between them
    zero_launch((*results, apart, torch.empty(9, 0, 3, device=DEVICE)), tensor([0, 3, 6]), Extent(9, 2))()
    for result in (*results, apart):
        assert result[:6].isnan().all() and (result[6:] == 0).all()
    assert rows[..., :3].isnan().all() and rows[..., 8:].isnan().all()


def test_counters_become_zero() -> None:
    """In the launch that zeros rows, and without rows."""
    result = torch.full((9, 2, 5), float("nan"), device=DEVICE)
    for seq_offsets, sequences, count in ((tensor([0, 3, 6]), 2, None), (None, 9, lambda extent: 3000)):
        counters = torch.full((2, 3001 if count else 4), 7, dtype=torch.int32, device=DEVICE)
        zero_launch((result,), seq_offsets, Extent(9, sequences, 5), tuple(counters), count)()
        assert result[:6].isnan().all() and (result[6:] == 0).all()
        assert counters.tolist() == [[0] * 3000 + [7] if count else [0] * 4] * 2
