"""Tickets and ranks of the Hopper attention: every output tile is drawn once; by ticket, the long ones come first."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ROWS, HEADS = 128, 6


@functools.cache
def tiles_kernel():
    from hstu_compile.ops.kernels.attention_sm90_schedule import Tickets, tile_of_rank, tile_of_ticket
    from hstu_compile.ops.kernels.attention_sm90_tiles import Batch
    from hstu_compile.ops.kernels.gluon_compat import gl, gluon

    @gluon.jit(do_not_specialize=list(range(2, 10)))
    def kernel(
        out, each, N, num_heads, num_sequences, group, tiles_per_seq, slots_per_seq, num_tickets, heads,
        ROWS: gl.constexpr, KEYS: gl.constexpr, BY_RANK: gl.constexpr,
    ):  # fmt: skip
        batch = Batch(each, N, N, num_heads, 0, 1, 0, 0, 1)
        tickets = Tickets(out, num_sequences, group, tiles_per_seq, slots_per_seq, num_tickets, heads)
        if BY_RANK:
            tile = tile_of_rank(gl.program_id(0), tickets, batch, ROWS)
        else:
            tile = tile_of_ticket(gl.program_id(0), tickets, batch, ROWS, KEYS)
        gl.store(out + gl.program_id(0), tile)

    return kernel


Tile = tuple[int, int, int]


def drawn(
    lengths: list[int], group: int, heads: int, *, jagged: bool, keys: bool, by_rank: bool = False
) -> list[Tile | None]:
    """(sequence, head, tile) of all tickets in order, of so many heads each; None where one has none."""
    from hstu_compile.ops.kernels.attention_sm90_tiles import PerSequence
    from hstu_compile.ops.kernels.launch import Extent
    from hstu_compile.ops.kernels.slots import slots_of

    N = max(lengths)
    offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).cuda()
    slots = slots_of(jagged, ROWS, Extent(sum(lengths) if jagged else len(lengths), len(lengths), N))
    tiles_per_seq = slots.tiles_per_seq
    each = PerSequence(offsets if jagged else None, None, None, None, None)
    out = torch.full((slots.number * HEADS // heads,), -7, dtype=torch.int32, device="cuda")
    tiles_kernel()[(len(out),)](
        out, each, N, HEADS, len(lengths), group, tiles_per_seq, slots.slots_per_seq, len(out), heads,
        ROWS=ROWS, KEYS=keys, BY_RANK=by_rank, num_warps=1,
    )  # fmt: skip
    tiles = [tile if tile == -1 else tile + head * tiles_per_seq for tile in out.tolist() for head in range(heads)]
    return [
        None if t == -1 else (t // tiles_per_seq // HEADS, t // tiles_per_seq % HEADS, t % tiles_per_seq) for t in tiles
    ]


on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
some_lengths = pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [128, 129, 0, 0, 1000, 127, 1],
        [0] * 40 + [3000] + [17] * 100,
        [32] * 1500,  # more groups than one round of probes finds
        torch.randint(0, 700, (333,), generator=torch.Generator().manual_seed(0)).tolist(),
    ],
    ids=["one", "edges", "giant", "many", "random"],
)


@pytest.mark.cuda
@on_hopper
@pytest.mark.parametrize("keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("group", [1, 5, 32])
@some_lengths
def test_every_tile_once(lengths: list[int], group: int, keys: bool) -> None:
    for jagged, heads in itertools.product((True, False), (1, 2)):
        got = [tile for tile in drawn(lengths, group, heads, jagged=jagged, keys=keys) if tile is not None]
        tiles = [math.ceil((n if jagged else max(lengths)) / ROWS) for n in lengths]
        assert sorted(got) == [(z, h, t) for z, n in enumerate(tiles) for h in range(HEADS) for t in range(n)]
        works = [(z // group, tiles[z] - t if keys else t + 1) for z, _, t in got]  # (group, tiles to stream)
        assert works == sorted(works, key=lambda w: (w[0], -w[1])), "a shorter tile before a longer one"


@pytest.mark.cuda
@on_hopper
@some_lengths
def test_ranks_have_no_gaps(lengths: list[int]) -> None:
    got = drawn(lengths, 1, 1, jagged=True, keys=False, by_rank=True)
    tiles = [(z, h, t) for z, n in enumerate(lengths) for t in range(math.ceil(n / ROWS)) for h in range(HEADS)]
    assert got == tiles + [None] * (len(got) - len(tiles))
