"""What the Hopper attention kernels are given for each (query, key) pair: a bias and a mask tensor, each may be absent.

Their cells come straight from global memory, in the layout of the scores: two adjacent columns of a thread are one load
where they are adjacent in memory too and rows are aligned. Tiles in which the mask tensor is 0 everywhere are not
streamed (mask_occupancy.py), and where it is 1 everywhere it is not loaded.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hstu_compile.ops.kernels.attention_sm90_tiles import NOWHERE, anew, live_tile, pinned
from hstu_compile.ops.kernels.attention_tiles import Cells, occupied
from hstu_compile.ops.kernels.gluon_compat import gl, gluon


class Lists(NamedTuple):
    """The mask tensor's occupied tiles: `visits` and `ranks` of mask_occupancy.py, queries x keys or keys x queries."""

    visits: Any
    ranks: Any
    BY_SEQUENCE: tl.constexpr  # or the same for all
    BY_HEAD: tl.constexpr


class Line(NamedTuple):
    """The lists of one output tile."""

    visits: Any
    ranks: Any


class Pairs(NamedTuple):
    """What is absent has None for every field: with a None among the tuples themselves, Triton loses their constants in
    loops (read in 3.6). In no other tuple, for the same reason.
    """

    bias: Any  # Cells of attention_tiles.py
    mask: Any  # Cells
    lists: Any  # of the mask tensor


@gluon.jit
def lists_of(pairs, tile, tiles_per_seq, batch, COLS: gl.constexpr):
    """The lists of an output tile that streams tiles of COLS, if there is a mask tensor."""
    lists = pairs.lists
    if lists.visits is not None:
        line = tile % tiles_per_seq
        index = tile // tiles_per_seq
        if lists.BY_HEAD and lists.BY_SEQUENCE:
            line += index * tiles_per_seq
        elif lists.BY_HEAD:
            line += index % batch.num_heads * tiles_per_seq
        elif lists.BY_SEQUENCE:
            line += index // batch.num_heads * tiles_per_seq
        line = line.to(gl.int64)
        tiles = (pinned(batch.N) + COLS - 1) // COLS
        return Line(lists.visits + line * tiles, lists.ranks + line * (tiles + 1))


@gluon.jit
def occupied_spans(spans, lists):
    """Runs of tiles as runs of places in the list of occupied tiles. Unchanged without a mask tensor."""
    if lists is not None:
        return occupied(spans, lists.ranks, 0, 0)
    else:
        return spans


@triton.jit
def read_cells(cells, z, head, first, second0, second, length, N, KEYS_FIRST: tl.constexpr):
    """Cells of rows `first` (a column) and columns second0 + `second` (a row); KEYS_FIRST: of the matrix transposed.

    Anything in columns beyond the sequence, and in rows beyond N what the last one holds.
    """
    start = cells.ptr + tl.cast(z, tl.int64) * cells.batch_stride + tl.cast(head, tl.int64) * cells.head_stride
    row = tl.minimum(first, N - 1).to(tl.int64)
    inside = second0 + second < tl.cdiv(length, cells.GRAIN) * cells.GRAIN
    if KEYS_FIRST:
        where = start + row * cells.col_stride + (second0 + second).to(tl.int64) * cells.row_stride
    else:
        start += tl.cast(second0, tl.int64) * cells.col_stride
        where = start + row * cells.row_stride + second.to(tl.int64) * cells.col_stride
    if cells.GRAIN == 2:
        where = tl.multiple_of(where, [1, 2 * max(1, cells.ptr.dtype.element_ty.primitive_bitwidth // 8)])  # bytes
    return tl.load(where, mask=inside)


@gluon.jit
def load_cells(cells, like, row0, col0, z, sequence, N, KEYS_FIRST: gl.constexpr):
    """A tile like `like`, queries x keys (KEYS_FIRST: keys x queries), from (row0, col0) on: see `read_cells`."""
    layout: gl.constexpr = like.type.layout
    first = row0 + gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, layout))
    second = gl.arange(0, like.shape[1], layout=gl.SliceLayout(0, layout))
    return read_cells(cells, z, sequence.head, first[:, None], col0, second[None, :], sequence.length, N, KEYS_FIRST)


@gluon.jit
def load_bias(pairs, like, row0, col0, sequence, batch, KEYS_FIRST: gl.constexpr):
    """The tile's bias, if there is one."""
    if pairs.bias.ptr is not None:
        cells = load_cells(pairs.bias, like, row0, col0, sequence.z, sequence, batch.N, KEYS_FIRST)
        if cells.dtype.primitive_bitwidth == 16:
            # Two in a register: loaded one by one, ptxas leaves each in a register of its own.
            return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [cells], cells.dtype, is_pure=False, pack=2)
        else:
            return cells


@gluon.jit
def half_argument(s, half_alpha, bias):
    """Half of silu's argument, alpha * s + bias."""
    half = s * half_alpha
    if bias is not None:
        half += 0.5 * bias.to(gl.float32)
    return half


@gluon.jit
def load_weight(pairs, like, row0, col0, sequence, batch, KEYS_FIRST: gl.constexpr):
    """The tile's mask tensor, if there is one. Few tiles need it: nothing that only it needs waits in registers."""
    m = pairs.mask
    if m.ptr is not None:
        cells = Cells(m.ptr, anew(m.batch_stride), m.head_stride, anew(m.row_stride), m.col_stride, m.GRAIN)
        N = pinned(batch.N)
        return load_cells(cells, like, pinned(row0), col0, pinned(sequence.z), sequence, N, KEYS_FIRST)


@gluon.jit
def load_weight_if(BOOLS: gl.constexpr, pairs, like, row0, col0, sequence, batch, KEYS_FIRST: gl.constexpr):
    """The tile's mask tensor, if there is one, and it is of bools or (BOOLS is False) of numbers."""
    if pairs.mask.ptr is not None:
        if (pairs.mask.ptr.dtype.element_ty == gl.int1) == BOOLS:
            return load_weight(pairs, like, row0, col0, sequence, batch, KEYS_FIRST)


@gluon.jit
def masked(half, row0, col0, sequence, batch, pairs, FAMILY: gl.constexpr, KEYS_FIRST: gl.constexpr):
    """Half of silu's argument, NOWHERE in dead cells; with a mask tensor of bools, also where that is False."""
    live = live_tile(half, row0, col0, sequence.z, batch, FAMILY, KEYS_FIRST)
    bools = load_weight_if(True, pairs, half, row0, col0, sequence, batch, KEYS_FIRST)
    if bools is not None:
        live = live & bools
    return gl.where(live, half, NOWHERE)


@gluon.jit
def weighted(x, weight):
    """x times the mask tensor; 0 where either is, whatever the other."""
    if weight is None:
        return x
    elif weight.dtype == gl.int1:
        return gl.where(weight, x, 0.0)
    else:
        return gl.where((weight != 0) & (x != 0), x * weight.to(gl.float32), 0.0)
