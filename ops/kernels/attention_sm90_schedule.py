"""Which output tile of attention comes next: every sequence's own tiles and no others, longest first.

Tiles are dealt out by ticket. A ticket names a slot (see slots.py) and a head (the fastest index: heads of one sequence
share the L2), or several heads where there are very many tiles. Within groups of sequences (as many as have keys and
values that fit the L2 together) the longest tiles come first, so that the last ones are short.
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.attention_sm90_tiles import barriers, length_at
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier
from hstu_compile.ops.kernels.slots import first_slot, owner_of


class Tickets(NamedTuple):
    counter: Any  # of tickets drawn, int32, 0 when the kernel starts; None: tiles are dealt by rank, not by ticket
    num_sequences: Any
    group: Any  # sequences whose tiles are ordered together, at most 32: one a lane
    tiles_per_seq: Any  # of the longest
    slots_per_seq: Any
    number: Any  # of tickets
    heads: Any  # a ticket


class Queue(NamedTuple):
    """Hands the numbers of output tiles from the scheduler to all that work on them, one at a time."""

    item: Any
    full: Any
    empty: Any


@gluon.jit
def tile_of_ticket(ticket, tickets, batch, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Number (sequence * heads + head) * tiles_per_seq + tile of the first output tile; -1 where the ticket has none.

    The last rows of queries meet the most keys, the first rows of KEYS the most queries.
    """
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    tickets_a_slot = batch.num_heads // tickets.heads
    head = ticket % tickets_a_slot * tickets.heads
    slot = ticket // tickets_a_slot
    groups = (tickets.num_sequences + tickets.group - 1) // tickets.group
    offsets = batch.each.seq_offsets
    first = owner_of(slot, groups, tickets.group, offsets, tickets.slots_per_seq, lanes, ROWS) * tickets.group
    z = first + lanes
    here = (lanes < tickets.group) & (z < tickets.num_sequences)
    tiles = tickets.tiles_per_seq
    if batch.each.seq_offsets is not None:
        tiles = (length_at(gl.where(here, z, first), batch) + ROWS - 1) // ROWS
    tiles = gl.where(here, tiles, 0)
    rank = slot - first_slot(first, offsets, tickets.slots_per_seq, ROWS)
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
    """The first output tile of the next ticket that has one; -1 when there is none left."""
    tile = -1
    ticket = 0
    while (tile < 0) & (ticket < tickets.number):
        ticket = gl.atomic_add(tickets.counter, 1)
        if ticket < tickets.number:
            tile = tile_of_ticket(ticket, tickets, batch, ROWS, KEYS)
    return tile


@gluon.jit
def scheduler(batch, queue, tickets, ROWS: gl.constexpr, KEYS: gl.constexpr):
    """Draws output tiles ahead of those who work on them; a warp of its own, since a draw takes some 2 us."""
    if tickets.counter is None:
        deal_ranks(batch, queue, tickets, ROWS)
    else:
        draw_tickets(batch, queue, tickets, ROWS, KEYS)


@gluon.jit
def plus(x, y):
    return x + y


@gluon.jit
def tile_of_rank(rank, tickets, batch, ROWS: gl.constexpr):
    """Number (sequence * heads + head) * tiles_per_seq + tile of the rank-th output tile there is; -1 behind the last.

    A tile's heads come one after the other; no rank before the last tile's is empty.
    """
    lanes = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    head = rank % batch.num_heads
    rank = rank // batch.num_heads
    first = 0
    tile = -1
    while (tile < 0) & (first < tickets.num_sequences):
        z = first + lanes
        here = z < tickets.num_sequences
        tiles = gl.where(here, (length_at(gl.where(here, z, first), batch) + ROWS - 1) // ROWS, 0)
        ends = gl.associative_scan(tiles, 0, plus)
        before = ends <= rank
        owner = first + gl.sum(before.to(gl.int32), axis=0)
        within = rank - gl.max(gl.where(before, ends, 0), axis=0)
        count = gl.max(ends, axis=0)
        tile = gl.where(rank < count, (owner * batch.num_heads + head) * tickets.tiles_per_seq + within, -1)
        rank -= count
        first += 32
    return tile


@gluon.jit
def deal_ranks(batch, queue, tickets, ROWS: gl.constexpr):
    """To each program one tile, and what is left over in the same order."""
    number = 0  # of tiles handed over
    rank = gl.program_id(0)
    tile = 0
    while tile != -1:
        tile = tile_of_rank(rank, tickets, batch, ROWS)
        wait_for_room(number, queue)
        hand_over(tile, number, queue)
        number += 1
        rank += gl.num_programs(0)


@gluon.jit
def draw_tickets(batch, queue, tickets, ROWS: gl.constexpr, KEYS: gl.constexpr):
    number = 0  # of tiles handed over
    heads = 0  # of the ticket in hand that are left
    tile = 0
    while tile != -1:
        wait_for_room(number, queue)
        if heads > 0:
            tile += tickets.tiles_per_seq
        else:
            tile = draw(tickets, batch, ROWS, KEYS)
            heads = tickets.heads
        heads -= 1
        hand_over(tile, number, queue)
        number += 1


@gluon.jit
def tile_queue(WORKERS: gl.constexpr):
    """For the scheduler and so many partitions that take every tile."""
    item = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(1, 1, WORKERS)
    return Queue(item, full, empty)


@gluon.jit
def wait_for_room(number, queue):
    """Until all have taken the tile before the number-th."""
    mbarrier.wait(queue.empty.index(0), (number & 1) ^ 1)


@gluon.jit
def hand_over(tile, number, queue):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    queue.item.store(gl.full((1,), tile, gl.int32, layout))
    mbarrier.arrive(queue.full.index(0), count=1)


@gluon.jit
def take_over(number, queue):
    """The number-th output tile of this program; -1: there are no more."""
    mbarrier.wait(queue.full.index(0), number & 1)
    tile = gl.max(queue.item.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)
    mbarrier.arrive(queue.empty.index(0), count=1)
    return tile
