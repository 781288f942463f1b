"""Which program has which tile (ops/kernels/slots.py): every tile once, a head's in order, whatever the lengths.

`test_sm90_compiles.py` runs this in the Triton interpreter, in a process of its own: see mask_interval_cases.py.
"""

import os

import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401
import triton
import triton.language as tl

from hstu_compile.ops.kernels.launch import Extent
from hstu_compile.ops.kernels.slots import slots_of, tile_of_program

ROWS, HEADS = 4, 3


@triton.jit
def kernel(out, seq_offsets, num_sequences, num_heads, slots_per_seq, ROWS: tl.constexpr):
    lanes = tl.arange(0, 32)
    z, head, tile, slots = tile_of_program(num_heads, num_sequences, seq_offsets, slots_per_seq, lanes, ROWS)
    tl.store(out + tl.program_id(0) * 4 + 0, z)
    tl.store(out + tl.program_id(0) * 4 + 1, head)
    tl.store(out + tl.program_id(0) * 4 + 2, tile)
    tl.store(out + tl.program_id(0) * 4 + 3, slots)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(0, 20), st.booleans())
@example([1] * 70, 0, True)  # more sequences than one round of probes tells apart
@example([0] * 40 + [30] + [0] * 40, 9, True)
@settings(max_examples=12)
def test_every_tile_once(lengths: list[int], unused: int, jagged: bool) -> None:
    longest, rows = max(lengths), sum(lengths) + unused
    extent = Extent(rows if jagged else len(lengths), len(lengths), longest)
    slots = slots_of(jagged, ROWS, extent)
    tiles = [-(-(n if jagged else longest) // ROWS) for n in lengths]
    assert slots.number <= (rows // ROWS + len(lengths) if jagged else sum(tiles))
    out = torch.full((slots.number * HEADS, 4), -7)
    if len(out):
        offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)) if jagged else None
        kernel[(len(out),)](out, offsets, len(lengths), HEADS, slots.slots_per_seq, ROWS)
    owned = [(z, head, tile) for z, head, tile, _ in out.tolist() if tile < tiles[z]]
    assert owned == [(z, head, tile) for z, n in enumerate(tiles) for head in range(HEADS) for tile in range(n)]
    for z, head, tile, of in out.tolist():
        assert 0 <= z < len(lengths) and 0 <= head < HEADS and tiles[z] <= of and 0 <= tile <= of
