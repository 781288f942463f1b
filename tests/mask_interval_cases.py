"""The mask as intervals (ops/kernels/mask_intervals.py) against the formula of ops/attention_mask.py, cell by cell.

`test_sm90_compiles.py` runs this in the Triton interpreter, in a process of its own: triton reads TRITON_INTERPRET when
it is imported.
"""

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
import triton
import triton.language as tl

from hstu_compile.ops.attention_mask import attention_mask
from hstu_compile.ops.kernels.mask_intervals import live_in, whole_columns
from hstu_compile.ops.kernels.mask_tiles import Family, Mask

SIZE, TILE = 64, 8


@triton.jit
def intervals(
    cells, low, high, length, history_end, contextual, group_size, max_attn_len, min_full,
    FAMILY: tl.constexpr, KEYS_FIRST: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    m = Mask(length, history_end, contextual, group_size, max_attn_len, min_full)
    at = tl.arange(0, SIZE)
    live = live_in(at[:, None], at[None, :], m, FAMILY, KEYS_FIRST)
    tl.store(cells + at[:, None] * SIZE + at[None, :], live.to(tl.int32))
    tile = tl.arange(0, SIZE // TILE)
    from_col, to_col = whole_columns(tile * TILE, TILE, m, FAMILY, KEYS_FIRST)
    tl.store(low + tile, from_col)
    tl.store(high + tile, to_col)


@st.composite
def sequences(draw) -> dict:
    length = draw(st.integers(0, SIZE))
    contextual = draw(st.one_of(st.integers(0, 9), st.integers(0, SIZE)))  # also more than there are tokens
    return {
        "length": length,
        "contextual": contextual,
        "num_targets": draw(st.integers(0, length)),
        "target_group_size": draw(st.sampled_from([1, 2, 5, 40])),
        "max_attn_len": draw(st.sampled_from([0, 1, 3, 7, 20, 80])),
        "min_full_attn_seq_len": draw(st.sampled_from([0, 1, 6, 30, 80])),
        "causal": draw(st.booleans()),
        "targets_share_position": draw(st.booleans()),
    }


@given(sequences(), st.booleans())
@settings(max_examples=200)
def test_intervals_are_the_formula(sequence: dict, keys_first: bool) -> None:
    length = sequence.pop("length")
    position = torch.arange(SIZE)
    want = attention_mask(position[:, None], position[None, :], torch.tensor(length), **sequence)
    family = Family(
        CAUSAL=sequence["causal"],
        CONTEXT=sequence["contextual"] > 0,
        TARGETS=sequence["num_targets"] > 0,
        WINDOW=sequence["max_attn_len"] > 0,
        SHARED=sequence["targets_share_position"],
    )
    cells = torch.zeros(SIZE, SIZE, dtype=torch.int32)
    low, high = (torch.zeros(SIZE // TILE, dtype=torch.int32) for _ in range(2))
    intervals[(1,)](
        cells, low, high, length, length - sequence["num_targets"], sequence["contextual"],
        sequence["target_group_size"], sequence["max_attn_len"], sequence["min_full_attn_seq_len"],
        family, keys_first, SIZE, TILE,
    )  # fmt: skip
    want = want.T if keys_first else want
    assert torch.equal(cells.bool(), want)
    for tile in range(-(-length // TILE)):
        rows = want[tile * TILE : min((tile + 1) * TILE, length)]
        assert rows[:, low[tile] : min(high[tile], length)].all(), "a tile that needs masking would not be masked"
