"""The order of the programs that add to a tile of dq (ops/kernels/mask_visits.py) against the walks they take.

`test_sm90_compiles.py` runs this in the Triton interpreter, in a process of its own: see mask_interval_cases.py.
"""

import os
from collections import defaultdict

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_interval_cases import SIZE, sequences

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
import triton
import triton.language as tl

from hstu_compile.ops.kernels.mask_tiles import Family, Mask, nth_tile, num_tiles, query_spans
from hstu_compile.ops.kernels.mask_visits import BELOW, is_plain, plain_visits, visits


@triton.jit
def walk(
    tiles, before, after, key_tile, length, history_end, contextual, group_size, max_attn_len, min_full,
    FAMILY: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The query tiles that a program of this key tile visits in order, who adds to them before and after it."""
    m = Mask(length, history_end, contextual, group_size, max_attn_len, min_full)
    spans = query_spans(key_tile * COLS, ROWS, COLS, m, FAMILY)
    for t in range(0, num_tiles(spans)):
        tile = nth_tile(t, spans)
        tl.store(tiles + t, tile)
        if is_plain(FAMILY):
            above, below = plain_visits(tile, key_tile, length, ROWS, COLS, FAMILY)
        else:
            count = tl.sum(visits(tl.arange(0, SIZE), tile, key_tile, m, ROWS, COLS, FAMILY), 0)
            above = count % BELOW
            below = count // BELOW
        tl.store(before + t, above)
        tl.store(after + t, below)


@given(sequences(), st.sampled_from([(4, 8), (8, 8)]))
@settings(max_examples=60)
def test_programs_take_turns(sequence: dict, sizes: tuple[int, int]) -> None:
    rows, cols = sizes
    length = sequence["length"]
    family = Family(
        CAUSAL=sequence["causal"],
        CONTEXT=sequence["contextual"] > 0,
        TARGETS=sequence["num_targets"] > 0,
        WINDOW=sequence["max_attn_len"] > 0,
        SHARED=sequence["targets_share_position"],
    )
    done: dict[int, int] = defaultdict(int)  # what the counters say
    left: dict[int, int] = {}
    for key_tile in reversed(range(-(-length // cols))):  # as the programs start
        tiles, before, after = (torch.full((SIZE,), -1, dtype=torch.int32) for _ in range(3))
        walk[(1,)](
            tiles, before, after, key_tile, length, length - sequence["num_targets"], sequence["contextual"],
            sequence["target_group_size"], sequence["max_attn_len"], sequence["min_full_attn_seq_len"],
            family, rows, cols, SIZE,
        )  # fmt: skip
        for tile, above, below in zip(tiles.tolist(), before.tolist(), after.tolist(), strict=True):
            if tile >= 0:
                assert done[tile] == above, "this program would wait for ever, or not for all before it"
                done[tile] += 1
                left[tile] = below
    for tile in range(-(-length // rows)):
        assert left[tile] == 0, "nobody, or somebody too early, writes dq"
    assert all(tile * rows < length for tile in done)
