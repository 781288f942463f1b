"""Which output tile of attention comes next: every sequence's own tiles and no others, longest first.

Tiles are dealt out by ticket. A ticket names a head (the fastest index: heads of one sequence share the L2) and a slot.
Sequence z owns the slots from `first_slot(z)` on; in the jagged layout these starts need no prefix sum, since

    ceil(length / ROWS) <= floor(end / ROWS) - floor(start / ROWS) + 1

so at most one slot a sequence stays empty, however long the longest is. Within groups of sequences (as many as have keys
and values that fit the L2 together) the tiles are ordered by the keys they see, so that the last ones are short.
"""

from hstu_compile.ops.kernels.attention_sm90_tiles import length_at
from hstu_compile.ops.kernels.gluon_compat import gl, gluon

MAX_GROUP = gl.constexpr(32)  # sequences, one a lane


@gluon.jit
def first_slot(z, batch, tiles_per_seq, ROWS: gl.constexpr):
    if batch.each.seq_offsets is not None:
        return (gl.load(batch.each.seq_offsets + z) // ROWS).to(gl.int32) + z
    else:
        return z * tiles_per_seq


@gluon.jit
def tile_of_ticket(ticket, batch, num_sequences, group, tiles_per_seq, ROWS: gl.constexpr):
    """The number (sequence * heads + head) * tiles_per_seq + tile of an output tile; -1 where the ticket has none."""
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    head = ticket % batch.num_heads
    slot = ticket // batch.num_heads
    low = 0
    high = (num_sequences + group - 1) // group
    while high - low > 1:  # the group that owns the slot, 32 probes at a time
        step = (high - low + 31) // 32
        probe = low + lanes * step
        starts = first_slot(gl.minimum(probe, high - 1) * group, batch, tiles_per_seq, ROWS)
        low += (gl.sum(((probe < high) & (starts <= slot)).to(gl.int32), axis=0) - 1) * step
        high = gl.minimum(low + step, high)
    first = low * group
    z = first + lanes
    here = (lanes < group) & (z < num_sequences)
    tiles = tiles_per_seq
    if batch.each.seq_offsets is not None:
        tiles = (length_at(gl.where(here, z, first), batch) + ROWS - 1) // ROWS
    tiles = gl.where(here, tiles, 0)
    rank = slot - first_slot(first, batch, tiles_per_seq, ROWS)
    # Tile t of lane i has key 32 t + i: the largest key that more than `rank` tiles reach.
    low = 0
    high = 32 * tiles_per_seq
    while high - low > 1:
        key = (low + high) // 2
        reach = gl.sum(gl.maximum(tiles - (key - lanes + 31) // 32, 0), axis=0)
        low = gl.where(reach > rank, key, low)
        high = gl.where(reach > rank, high, key)
    tile = ((first + low % 32) * batch.num_heads + head) * tiles_per_seq + low // 32
    return gl.where(gl.sum(tiles, axis=0) > rank, tile, -1)
