"""What the Hopper attention kernels share: where a sequence lies, how its tiles come in, are masked and go out.

Every input is a TMA descriptor over [batch, row, head, dim] with the strides of the tensor as it is (jagged: one batch
of T rows), so that no layout needs a copy and head dims between powers of two are filled up with zeros.

Rows beyond the end of a sequence belong to others, or to nobody: they may hold NaN, and 0 * NaN is NaN. As part of a
resident tile they only reach output rows that are not stored. As part of a streamed tile they would meet every output
row, so the last, partial tile of a sequence gets its tail zeroed in shared memory before a product sums over it.
"""

from typing import Any, NamedTuple

from hstu_compile.ops.kernels.gluon_compat import async_load, fence_async_shared, gl, gluon, mbarrier
from hstu_compile.ops.kernels.mask_tiles import Mask, all_cells_live, in_spans, key_spans, query_spans

# Arguments that change from call to call; never a reason to compile again.
RUNTIME = ["batch", "tiles_per_seq", "total_tiles"]


class Batch(NamedTuple):
    """The sequences of a call and the mask they share: pointers or None, and sizes."""

    seq_offsets: Any
    seq_lengths: Any
    num_targets: Any
    num_contextuals: Any
    N: Any
    num_heads: Any
    contextual_seq_len: Any
    target_group_size: Any
    max_attn_len: Any
    min_full_attn_seq_len: Any


class Sequence(NamedTuple):
    """One head of one sequence: its coordinates in the descriptors, and its rows in the outputs."""

    batch: Any
    start: Any
    head: Any
    length: Any
    out_row: Any  # its first row in the outputs
    stored: Any  # how many rows are stored: its own, and if dense the unused ones, as zeros


@gluon.jit
def sequence_and_mask(index, batch):
    """Head number `index` of all sequences, and its mask."""
    z = index // batch.num_heads
    head = index % batch.num_heads
    if batch.seq_offsets is not None:
        start = gl.load(batch.seq_offsets + z).to(gl.int32)
        length = gl.minimum(gl.load(batch.seq_offsets + z + 1).to(gl.int32) - start, batch.N)
        sequence = Sequence(0, start, head, length, start.to(gl.int64), length)
    elif batch.seq_lengths is not None:
        length = gl.load(batch.seq_lengths + z).to(gl.int32)
        sequence = Sequence(z, 0, head, length, z.to(gl.int64) * batch.N, batch.N)
    else:
        length = batch.N
        sequence = Sequence(z, 0, head, length, z.to(gl.int64) * batch.N, batch.N)
    history_end = length
    if batch.num_targets is not None:
        history_end = length - gl.load(batch.num_targets + z).to(gl.int32)
    contextual = batch.contextual_seq_len
    if batch.num_contextuals is not None:
        contextual = gl.load(batch.num_contextuals + z).to(gl.int32)
    mask = Mask(
        length,
        history_end,
        contextual,
        batch.target_group_size,
        batch.max_attn_len,
        batch.min_full_attn_seq_len,
    )
    return sequence, mask


@gluon.jit
def load_tile(desc, sequence, row, bar, buffer, pred):
    """Rows row ... of the sequence into `buffer`; `bar` completes when they are there."""
    mbarrier.expect(bar, desc.block_type.nbytes, pred=pred)
    async_load(desc, [sequence.batch, sequence.start + row, sequence.head, 0], bar, buffer, pred=pred)


@gluon.jit
def matrix(buffer):
    """A [1, rows, 1, dim] tile as the matrix it is."""
    return buffer.reshape([buffer.shape[1], buffer.shape[3]])


@gluon.jit
def zero_tail(tile, live_rows, num_warps: gl.constexpr):
    """Zero the rows of a shared matrix from `live_rows` on, for the tensor cores to read."""
    width: gl.constexpr = min(tile.shape[1], 64)
    lanes: gl.constexpr = width // 8
    height: gl.constexpr = max(8, num_warps * 32 // lanes)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])
    rows = gl.arange(0, height, layout=gl.SliceLayout(1, layout))
    for i in gl.static_range(tile.shape[0] // height):
        if (i + 1) * height > live_rows:
            for j in gl.static_range(tile.shape[1] // width):
                part = tile.slice(i * height, height).slice(j * width, width, 1)
                part.store(gl.where((i * height + rows)[:, None] < live_rows, part.load(layout), 0.0))
    fence_async_shared()


@gluon.jit
def live_in(first, second, mask, FAMILY: gl.constexpr, KEYS_FIRST: gl.constexpr):
    """`live_cells` as intervals: what a row meets is up to three runs of columns.

    Bounds are held for the rows alone, of which a thread has two: a mask per column would spill.
    """
    if KEYS_FIRST:
        live = in_spans(second, query_spans(first, 1, 1, mask, FAMILY))
    else:
        live = in_spans(second, key_spans(first, 1, 1, mask, FAMILY))
    if FAMILY.TARGETS and FAMILY.WINDOW and not FAMILY.SHARED:  # spans let a window end within a group of targets
        apart = gl.maximum(first - second, second - first)
        history = (first < mask.history_end) | (second < mask.history_end)
        live = live & (history | (apart <= mask.max_attn_len) | (mask.min_full_attn_seq_len > 0))
    return live


@gluon.jit
def mask_tile(x, row0, col0, mask, FAMILY: gl.constexpr, KEYS_FIRST: gl.constexpr):
    """Zero the dead cells of a tile of queries x keys (KEYS_FIRST: keys x queries) that starts at (row0, col0)."""
    layout: gl.constexpr = x.type.layout
    first = row0 + gl.arange(0, x.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
    second = col0 + gl.arange(0, x.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    return gl.where(live_in(first, second, mask, FAMILY, KEYS_FIRST), x, 0.0)


@gluon.jit
def whole_tile(
    row0, col0, ROWS: gl.constexpr, COLS: gl.constexpr, mask, FAMILY: gl.constexpr, KEYS_FIRST: gl.constexpr
):
    """Whether no cell of the tile needs masking; may say no where it is so."""
    if KEYS_FIRST:
        whole = all_cells_live(col0, row0, COLS, ROWS, mask, FAMILY)
    else:
        whole = all_cells_live(row0, col0, ROWS, COLS, mask, FAMILY)
    return whole & (col0 + COLS <= mask.length)  # what is streamed from beyond the end may be NaN


@gluon.jit
def store_rows(out, row_stride, acc, row0, sequence, DIM: gl.constexpr):
    """Rows of a [..., heads, DIM] output. By pointer: a TMA store would overwrite the next sequence's first rows."""
    layout: gl.constexpr = acc.type.layout
    rows = row0 + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
    out += sequence.out_row * row_stride + sequence.head * DIM
    where = rows[:, None].to(gl.int64) * row_stride + cols[None, :]
    inside = rows[:, None] < sequence.stored
    if DIM < acc.shape[1]:
        inside = inside & (cols[None, :] < DIM)
    acc = gl.where(rows[:, None] < sequence.length, acc, 0.0)
    gl.store(out + where, acc.to(out.dtype.element_ty), mask=inside)
