"""What the Hopper attention kernels share: where a sequence lies, how its tiles come in, are masked and go out.

Every input is one TMA descriptor over the rows of all sequences, with the strides of the tensor as it is. Two things
come out of the hardware's bounds check as zeros: head dims between powers of two, rows beyond the end of a sequence.
These belong to others or to nobody and may hold NaN; 0 * NaN is NaN, so masking the scores would not be enough.

The bounds check ends at ROW_LIMIT, so a sequence is addressed from its end: its last row is row ROW_LIMIT - 1 of a
dimension, whose origin a second dimension of the same stride moves; a third takes ROW_LIMIT rows off again, because
addresses wrap around at 2^64 (the idea of triton.tools.ragged_tma). In elements, with L = ROW_LIMIT = 2^30:

    L (2^34 - stride) + (start + length) stride + (L - length + row) stride = 2^64 + (start + row) stride
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.gluon_compat import async_load, gl, gluon, mbarrier
from hstu_compile.ops.kernels.mask_intervals import live_in
from hstu_compile.ops.kernels.mask_tiles import Mask
from hstu_compile.ops.kernels.silu import silu_and_grad

ROW_LIMIT = gl.constexpr(1 << 30)
NOWHERE = gl.constexpr(-32.0)  # half of silu's argument where tanh is -1, so that silu and its derivative are 0

# Arguments that change from call to call; never a reason to compile again.
RUNTIME = [
    "N",
    "batch_rows",
    "num_heads",
    "tiles_per_seq",
    "slots_per_seq",
    "num_sequences",
    "group",
    "num_tickets",
    "heads_a_ticket",
    "parts",
    "contextual_seq_len",
    "target_group_size",
    "max_attn_len",
    "min_full_attn_seq_len",
]


class PerSequence(NamedTuple):
    """What there is a value of for each sequence: pointers or None."""

    seq_offsets: Any
    seq_lengths: Any
    num_targets: Any
    num_contextuals: Any
    cached_lengths: Any  # tokens of a sequence that lie in pages, before those of the inputs (paged_tiles.py)


class Batch(NamedTuple):
    """The sequences of a call and the mask they share."""

    each: PerSequence
    N: Any
    batch_rows: Any  # dense: rows from one sequence to the next in the inputs; paged: from part to part in the output
    num_heads: Any  # times parts
    contextual_seq_len: Any
    target_group_size: Any
    max_attn_len: Any
    min_full_attn_seq_len: Any
    parts: Any  # of the keys of an output tile, each of which has a result of its own


class Result(NamedTuple):
    """An output or a gradient: rows of [heads, DIM], or slices of longer ones."""

    ptr: Any
    row_stride: Any
    head_stride: gl.constexpr
    silu_of: Any  # for the gradient of silu(x): x, which lies as the gradient does. Else None


class Sequence(NamedTuple):
    """One head of one sequence."""

    z: Any  # which one
    start: Any  # its first row in the inputs
    head: Any
    length: Any
    out_row: Any  # its first row in the outputs, of which there are fewer than MAX_COORDINATE (attention_sm90.py)
    stored: Any  # how many rows are stored: its own, and if dense the unused ones, as zeros


@gluon.jit
def barriers(STAGES: gl.constexpr, FULL: gl.constexpr, EMPTY: gl.constexpr):
    """Two a stage: so many arrivals fill it, so many empty it."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=FULL)
        mbarrier.init(empty.index(i), count=EMPTY)
    return full, empty


@gluon.jit
def first_row(z, batch):
    """Of sequence z in the inputs."""
    if batch.each.seq_offsets is not None:
        return gl.load(batch.each.seq_offsets + z).to(gl.int32)
    else:
        return z * batch.batch_rows


@gluon.jit
def length_at(z, batch):
    """Of sequence z (or several), in the inputs."""
    if batch.each.seq_offsets is not None:
        start = gl.load(batch.each.seq_offsets + z).to(gl.int32)
        return gl.minimum(gl.load(batch.each.seq_offsets + z + 1).to(gl.int32) - start, batch.N)
    elif batch.each.seq_lengths is not None:
        return gl.load(batch.each.seq_lengths + z).to(gl.int32)
    else:
        return batch.N


@gluon.jit
def cached_at(z, batch):
    """How many tokens of sequence z lie in pages; None where there are no pages."""
    if batch.each.cached_lengths is not None:
        return gl.load(batch.each.cached_lengths + z).to(gl.int32)


@gluon.jit
def part_of(index, batch):
    """The part, and the head, of number `index` of all sequences."""
    heads = batch.num_heads // pinned(batch.parts)  # else it waits in a register from the start
    return index % batch.num_heads // heads, index % heads


@gluon.jit
def sequence_of(index, batch):
    """Head number `index` of all sequences. Of a paged one rows count from its first token, in pages."""
    z = index // batch.num_heads
    start = first_row(z, batch)
    length = length_at(z, batch)
    cached = cached_at(z, batch)
    if cached is not None:
        part, head = part_of(index, batch)
        start -= cached
        length += cached
        return Sequence(z, start, head, length, start + part * batch.batch_rows, length)
    elif batch.each.seq_offsets is not None:
        return Sequence(z, start, index % batch.num_heads, length, start, length)
    else:
        return Sequence(z, start, index % batch.num_heads, length, z * batch.N, batch.N)


@gluon.jit
def mask_of(z, batch, FAMILY: gl.constexpr):
    """The mask of sequence z. What is computed from the sizes that all share would else wait in registers."""
    length = length_at(z, batch)
    cached = cached_at(z, batch)
    if cached is not None:
        length += cached
    history_end = length
    if batch.each.num_targets is not None:
        history_end = length - gl.load(batch.each.num_targets + z).to(gl.int32)
    contextual = batch.contextual_seq_len
    if FAMILY.CONTEXT:
        contextual = pinned(contextual)
    max_attn_len = batch.max_attn_len
    if FAMILY.WINDOW:
        max_attn_len = pinned(max_attn_len)
    if batch.each.num_contextuals is not None:
        contextual = gl.load(batch.each.num_contextuals + z).to(gl.int32)
    return Mask(length, history_end, contextual, batch.target_group_size, max_attn_len, batch.min_full_attn_seq_len)


@gluon.jit
def load_tile(desc, sequence, row, bar, buffer, pred, col=0):
    """Rows row ... of the sequence, from column col on, into `buffer`; `bar` completes when they are there."""
    mbarrier.expect(bar, desc.block_type.nbytes, pred=pred)
    end = sequence.start + sequence.length
    from_end = ROW_LIMIT - sequence.length + row
    async_load(desc, [ROW_LIMIT, end, from_end, sequence.head, col], bar, buffer, pred=pred)


@gluon.jit
def matrix(buffer):
    """A [1, 1, rows, 1, dim] tile as the matrix it is."""
    return buffer.reshape([buffer.shape[2], buffer.shape[4]])


@gluon.jit
def pinned(x):
    """x; what is computed from it stays where it stands. (Hoisted out of a loop, the bounds of a mask would spill.)"""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def anew(x):
    """As `pinned`; what x is a multiple of stays known. A constant is left as it is."""
    if isinstance(x, gl.constexpr):
        return x
    else:
        return x * pinned(1)


@gluon.jit
def live_tile(x, row0, col0, z, batch, FAMILY: gl.constexpr, KEYS_FIRST: gl.constexpr):
    """The live cells of a tile like x, queries x keys (KEYS_FIRST: keys x queries), that starts at (row0, col0)."""
    layout: gl.constexpr = x.type.layout
    first = row0 + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))
    second = col0 + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))
    mask = mask_of(pinned(z), batch, FAMILY)
    return live_in(pinned(first)[:, None], second[None, :], mask, FAMILY, KEYS_FIRST)


@gluon.constexpr_function
def row_layout(rows, dim, warps):
    """As a result of wgmma lies in warps, but with 4 columns a thread: a shuffle away, and stored by whole sectors."""
    registers = [[0, 1], [0, 2]] + [[8, 0]]
    registers += [[0, 1 << i] for i in range(4, dim.bit_length() - 1)]
    registers += [[16 * warps << i, 0] for i in range((rows // (16 * warps)).bit_length() - 1)]
    warp_rows = [[16 << i, 0] for i in range(warps.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warp_rows, [], [rows, dim])


@gluon.jit
def store_rows(out, acc, row0, sequence, DIM: gl.constexpr):
    """Rows of a Result. By pointer: a TMA store would overwrite the next sequence's first rows."""
    dtype: gl.constexpr = out.ptr.dtype.element_ty
    layout: gl.constexpr = row_layout(acc.shape[0], acc.shape[1], gl.num_warps())
    rows = row0 + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    row_stride = anew(out.row_stride).to(gl.int64)
    first = sequence.out_row * row_stride + sequence.head * out.head_stride
    where = rows[:, None].to(gl.int64) * row_stride + cols[None, :]
    inside = rows[:, None] < sequence.stored
    if DIM < acc.shape[1]:
        inside = inside & (cols[None, :] < DIM)
    if out.silu_of is not None:
        half = 0.5 * gl.load(out.silu_of + first + where, mask=inside, other=0.0).to(gl.float32)
        acc = (gl.convert_layout(acc, layout) * silu_and_grad(half, True)[1]).to(dtype)
    else:
        acc = gl.convert_layout(acc.to(dtype), layout)
    zero = gl.zeros(acc.shape, acc.dtype, layout)
    gl.store(out.ptr + first + where, gl.where(rows[:, None] < sequence.length, acc, zero), mask=inside)
