"""Which output tile of attention comes next: every sequence's own tiles and no others, longest first.

Tiles are dealt out by ticket. A ticket names a head (the fastest index: heads of one sequence share the L2) and a slot.
Sequence z owns the slots from `first_slot(z)` on; in the jagged layout these starts need no prefix sum, since

    ceil(length / ROWS) <= floor(end / ROWS) - floor(start / ROWS) + 1

so at most one slot a sequence stays empty, however long the longest is. Within groups of sequences (as many as have
keys and values that fit the L2 together) the longest tiles come first, so that the last ones are short.
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.attention_sm90_tiles import length_at
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier


class Tickets(NamedTuple):
    counter: Any  # of tickets drawn, int32, 0 when the kernel starts
    num_sequences: Any
    group: Any  # sequences whose tiles are ordered together, at most 32: one a lane
    tiles_per_seq: Any  # of the longest
    number: Any  # of tickets


class Queue(NamedTuple):
    """Hands the numbers of output tiles from the producer to the consumers, two in flight."""

    items: Any
    full: Any
    empty: Any


@gluon.jit
def first_slot(z, batch, tickets, ROWS: gl.constexpr):
    if batch.each.seq_offsets is not None:
        return (gl.load(batch.each.seq_offsets + z) // ROWS).to(gl.int32) + z
    else:
        return z * tickets.tiles_per_seq


@gluon.jit
def tile_of_ticket(ticket, tickets, batch, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Number (sequence * heads + head) * tiles_per_seq + tile of an output tile; -1 where the ticket has none.

    The last rows of queries meet the most keys, the first rows of KEYS the most queries.
    """
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    head = ticket % batch.num_heads
    slot = ticket // batch.num_heads
    low = 0
    high = (tickets.num_sequences + tickets.group - 1) // tickets.group
    while high - low > 1:  # the group that owns the slot, 32 probes at a time
        step = (high - low + 31) // 32
        probe = low + lanes * step
        starts = first_slot(gl.minimum(probe, high - 1) * tickets.group, batch, tickets, ROWS)
        low += (gl.sum(((probe < high) & (starts <= slot)).to(gl.int32), axis=0) - 1) * step
        high = gl.minimum(low + step, high)
    first = low * tickets.group
    z = first + lanes
    here = (lanes < tickets.group) & (z < tickets.num_sequences)
    tiles = tickets.tiles_per_seq
    if batch.each.seq_offsets is not None:
        tiles = (length_at(gl.where(here, z, first), batch) + ROWS - 1) // ROWS
    tiles = gl.where(here, tiles, 0)
    rank = slot - first_slot(first, batch, tickets, ROWS)
    # A tile of lane i that is longer than t others of its sequence is item 32 t + i: the largest item that more than
    # `rank` tiles reach.
    low = 0
    high = 32 * tickets.tiles_per_seq
    while high - low > 1:
        item = (low + high) // 2
        reach = gl.sum(gl.maximum(tiles - (item - lanes + 31) // 32, 0), axis=0)
        low = gl.where(reach > rank, item, low)
        high = gl.where(reach > rank, high, item)
    lane = low % 32
    tile = low // 32
    if KEYS:
        tile = gl.sum(gl.where(lanes == lane, tiles, 0), axis=0) - 1 - tile
    tile += ((first + lane) * batch.num_heads + head) * tickets.tiles_per_seq
    return gl.where(gl.sum(tiles, axis=0) > rank, tile, -1)


@gluon.jit
def draw(tickets, batch, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """The next output tile that nobody has drawn; -1 when there is none left."""
    tile = -1
    ticket = 0
    while (tile < 0) & (ticket < tickets.number):
        ticket = gl.atomic_add(tickets.counter, 1)
        if ticket < tickets.number:
            tile = tile_of_ticket(ticket, tickets, batch, ROWS, KEYS)
    return tile


@gluon.jit
def queue_of(barriers):
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Queue(items, barriers[0], barriers[1])


@gluon.jit
def hand_over(tile, number, queue):
    """The producer's number-th tile; -1: no more."""
    slot = number % 2
    mbarrier.wait(queue.empty.index(slot), ((number // 2) & 1) ^ 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    queue.items.index(slot).store(gl.full((1,), tile, gl.int32, layout))
    mbarrier.arrive(queue.full.index(slot), count=1)


@gluon.jit
def take_over(number, queue):
    slot = number % 2
    mbarrier.wait(queue.full.index(slot), (number // 2) & 1)
    tile = gl.max(queue.items.index(slot).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)
    mbarrier.arrive(queue.empty.index(slot), count=1)
    return tile
