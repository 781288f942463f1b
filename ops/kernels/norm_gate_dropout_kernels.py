"""norm * gate, concatenation and dropout in Triton: the kernels, one pass over memory forward and one backward.

A tile is ROWS x one norm group, held in registers. The backward recomputes mean and deviation from the tile, which it
holds anyway, and regenerates the dropout mask from the seed: nothing but the operands is saved. Its programs stay, as
many as a multiprocessor holds at once, each with one group, and copy the next tiles to shared memory while they work on
this one. Each sums its own share of dweight and dbias.
"""

import triton
import triton.language as tl

from hstu_compile.ops.kernels.partial_sums import sum_of_parts
from hstu_compile.ops.kernels.silu import sigmoid


@triton.jit
def tile_offsets(rows, cols, row_stride, head_stride, HEAD_DIM: tl.constexpr):
    """Offsets of [rows, cols] in a tensor of heads of HEAD_DIM columns."""
    heads = cols // HEAD_DIM
    return rows.to(tl.int64)[:, None] * row_stride + (heads * head_stride + cols % HEAD_DIM)[None, :]


@triton.jit
def keep_scale(seed, piece, group, rows, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """What dropout multiplies by; `random_bits` of the reference, one Philox call for four elements."""
    zeros = tl.zeros((ROWS, BLOCK // 4), tl.int32)
    quads = tl.arange(0, BLOCK // 4)[None, :] + zeros
    r0, r1, r2, r3 = tl.philox(tl.load(seed), quads, rows[:, None] + zeros, piece + zeros, group + zeros, n_rounds=7)
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (ROWS, BLOCK))
    return tl.where((bits & 0x7FFFFFFF).to(tl.int32) >= threshold, scale, 0.0)


@triton.jit
def fast(dtype: tl.constexpr):
    """Whether one unit more or less in fp32 is lost when rounded to it; then approximate instructions do."""
    return dtype.primitive_bitwidth == 16


@triton.jit
def inverse_root(x, FAST: tl.constexpr):
    return tl.rsqrt(x) if FAST else tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.sqrt_rn(x))


@triton.jit
def normalised(x, inside, norm_eps, WIDTH: tl.constexpr, RMS: tl.constexpr, FAST: tl.constexpr):
    """x, centred and divided by its deviation; it is 0 outside."""
    if not RMS:
        mean = tl.sum(x, axis=1) / WIDTH
        x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = inverse_root(tl.sum(x * x, axis=1) / WIDTH + norm_eps, FAST)
    return x * rstd[:, None]


@triton.jit
def row_sums(a, b):
    """The sums of the rows of a and of b; as one reduction, so that the warps meet once."""
    return tl.split(tl.sum(tl.join(a, b), axis=1))


@triton.jit
def activated(u, ACTIVATION: tl.constexpr, FAST: tl.constexpr):
    """activation(u) and its derivative."""
    if ACTIVATION == "none":
        return u, tl.full(u.shape, 1.0, tl.float32)
    else:
        s = tl.sigmoid(u) if FAST else sigmoid(0.5 * u)
        if ACTIVATION == "sigmoid":
            return s, s * (1.0 - s)
        else:
            return u * s, s * (1.0 + u * (1.0 - s))


@triton.jit
def load_affine(ptr, default, group, cols, GROUP_STRIDE: tl.constexpr, COLUMN_STRIDE: tl.constexpr, inside):
    """weight or bias of one group as [1, BLOCK]; the default where there is none."""
    if ptr is None:
        return tl.full((1, cols.shape[0]), default, tl.float32)
    else:
        return tl.load(ptr + group * GROUP_STRIDE + cols * COLUMN_STRIDE, mask=inside, other=0.0).to(tl.float32)[
            None, :
        ]


@triton.jit
def put(
    y, offsets, inside, values, seed, piece, group, rows, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Store one piece of the output after dropout."""
    if seed is not None:
        values *= keep_scale(seed, piece, group, rows, threshold, scale, ROWS, BLOCK)
    tl.store(y + offsets, values.to(y.dtype.element_ty), mask=inside)


@triton.jit
def get(dy, offsets, inside, seed, piece, group, rows, threshold, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of one piece before dropout."""
    values = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        values *= keep_scale(seed, piece, group, rows, threshold, scale, ROWS, BLOCK)
    return values


@triton.jit(do_not_specialize=["T", "threshold", "scale", "norm_eps", "batch", "parts"])
def forward_kernel(
    a, u, weight, bias, seed, y, T, a_row, a_head, u_row, u_head, norm_eps, threshold, scale, seq_offsets, batch, parts,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, A_HEAD_DIM: tl.constexpr, U_HEAD_DIM: tl.constexpr,
    AFFINE_GROUP: tl.constexpr, AFFINE_COLUMN: tl.constexpr, RMS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr, CONCAT_ACTIVATED: tl.constexpr,
    CONCAT_U: tl.constexpr, CONCAT_X: tl.constexpr, CONCAT_NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SUM: tl.constexpr, BUFFERS: tl.constexpr,
):  # fmt: skip
    """a: or fp32 parts of it, whose sum, rounded to SUM, is 0 in rows beyond seq_offsets[batch]."""
    group = tl.program_id(0) % GROUPS
    rows = tl.program_id(0) // GROUPS * ROWS + tl.arange(0, ROWS)
    in_group = tl.arange(0, BLOCK)
    cols = group * WIDTH + in_group
    inside = (rows < T)[:, None] & (in_group < WIDTH)[None, :]
    places = a + tile_offsets(rows, cols, a_row, a_head, A_HEAD_DIM)
    if SUM is None:
        x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(u + tile_offsets(rows, cols, u_row, u_head, U_HEAD_DIM), mask=inside, other=0.0).to(tl.float32)
    w = load_affine(weight, 1.0, group, in_group, AFFINE_GROUP, AFFINE_COLUMN, in_group < WIDTH)
    b = load_affine(bias, 0.0, group, in_group, AFFINE_GROUP, AFFINE_COLUMN, in_group < WIDTH)
    if SUM is not None:  # behind the other loads, which are on their way meanwhile
        end = tl.load(seq_offsets + batch)
        size = tl.cast(T, tl.int64) * (GROUPS * WIDTH)
        x = sum_of_parts(places, parts, size, inside, BUFFERS)
        x = tl.where((rows < end)[:, None], x, 0.0).to(SUM).to(tl.float32)  # not before: the sum would wait for `end`

    gate, _ = activated(g, ACTIVATION, fast(u.dtype.element_ty))
    normed = x * gate if GATE_FIRST else x
    norm = normalised(normed, inside, norm_eps, WIDTH, RMS, fast(a.dtype.element_ty if SUM is None else SUM)) * w + b
    PIECES: tl.constexpr = 1 + CONCAT_U + CONCAT_X + CONCAT_NORM
    out = tile_offsets(rows, cols, PIECES * GROUPS * WIDTH, 0, GROUPS * WIDTH)
    if CONCAT_U:
        put(y, out, inside, gate if CONCAT_ACTIVATED else g, seed, 0, group, rows, threshold, scale, ROWS, BLOCK)
        out += GROUPS * WIDTH
    if CONCAT_X:
        put(y, out, inside, x, seed, 1, group, rows, threshold, scale, ROWS, BLOCK)
        out += GROUPS * WIDTH
    if CONCAT_NORM:
        put(y, out, inside, norm, seed, 2, group, rows, threshold, scale, ROWS, BLOCK)
        out += GROUPS * WIDTH
    put(y, out, inside, norm if GATE_FIRST else norm * gate, seed, 3, group, rows, threshold, scale, ROWS, BLOCK)


@triton.jit(do_not_specialize=["T", "threshold", "scale", "norm_eps"])
def backward_kernel(
    dy, a, u, weight, bias, seed, da, du, shares, T, a_row, a_head, u_row, u_head, norm_eps, threshold, scale, du_row,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, A_HEAD_DIM: tl.constexpr, U_HEAD_DIM: tl.constexpr,
    AFFINE_GROUP: tl.constexpr, AFFINE_COLUMN: tl.constexpr, RMS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr, CONCAT_ACTIVATED: tl.constexpr,
    CONCAT_U: tl.constexpr, CONCAT_X: tl.constexpr, CONCAT_NORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    DU_HEAD: tl.constexpr, DU_HEAD_DIM: tl.constexpr, BUFFERS: tl.constexpr,
):  # fmt: skip
    """shares [2, programs, GROUPS * WIDTH]: each program's part of dweight and dbias, or None without affine."""
    program, programs = tl.program_id(0) // GROUPS, tl.num_programs(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    in_group = tl.arange(0, BLOCK)
    cols = group * WIDTH + in_group
    w = load_affine(weight, 1.0, group, in_group, AFFINE_GROUP, AFFINE_COLUMN, in_group < WIDTH)
    b = load_affine(bias, 0.0, group, in_group, AFFINE_GROUP, AFFINE_COLUMN, in_group < WIDTH)
    PIECES: tl.constexpr = 1 + CONCAT_U + CONCAT_X + CONCAT_NORM
    ROW_WIDTH: tl.constexpr = GROUPS * WIDTH
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(program, tl.cdiv(T, ROWS), programs, num_stages=1 + BUFFERS):
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < T)[:, None] & (in_group < WIDTH)[None, :]
        x = tl.load(a + tile_offsets(rows, cols, a_row, a_head, A_HEAD_DIM), mask=inside, other=0.0).to(tl.float32)
        g = tl.load(u + tile_offsets(rows, cols, u_row, u_head, U_HEAD_DIM), mask=inside, other=0.0).to(tl.float32)
        out = tile_offsets(rows, cols, PIECES * ROW_WIDTH, 0, ROW_WIDTH)
        last = out + (PIECES - 1) * ROW_WIDTH
        dgated = get(dy, last, inside, seed, 3, group, rows, threshold, scale, ROWS, BLOCK)

        gate, gate_grad = activated(g, ACTIVATION, fast(u.dtype.element_ty))
        normed = x * gate if GATE_FIRST else x
        dnorm = dgated if GATE_FIRST else dgated * gate
        if CONCAT_NORM:
            at = out + (CONCAT_U + CONCAT_X) * ROW_WIDTH
            dnorm += get(dy, at, inside, seed, 2, group, rows, threshold, scale, ROWS, BLOCK)
        dxhat = dnorm * w
        if not RMS:
            mean, dmean = row_sums(normed, dxhat)
            normed = tl.where(inside, normed - (mean / WIDTH)[:, None], 0.0)
            dxhat -= (dmean / WIDTH)[:, None]
        square, product = row_sums(normed * normed, dxhat * normed)
        rstd = tl.where(rows < T, inverse_root(square / WIDTH + norm_eps, fast(a.dtype.element_ty)), 0.0)[:, None]
        xhat = normed * rstd
        dx = rstd * (dxhat - xhat * (rstd * (product / WIDTH)[:, None]))
        dgate = dx * x if GATE_FIRST else dgated * (xhat * w + b)
        if CONCAT_U and CONCAT_ACTIVATED:
            dgate += get(dy, out, inside, seed, 0, group, rows, threshold, scale, ROWS, BLOCK)
        dg = dgate * gate_grad
        if GATE_FIRST:
            dx *= gate
        if CONCAT_U and not CONCAT_ACTIVATED:
            dg += get(dy, out, inside, seed, 0, group, rows, threshold, scale, ROWS, BLOCK)
        if CONCAT_X:
            at = out + CONCAT_U * ROW_WIDTH
            dx += get(dy, at, inside, seed, 1, group, rows, threshold, scale, ROWS, BLOCK)
        packed = tile_offsets(rows, cols, ROW_WIDTH, 0, ROW_WIDTH)
        tl.store(da + packed, dx.to(da.dtype.element_ty), mask=inside)
        to = tile_offsets(rows, cols, du_row, DU_HEAD, DU_HEAD_DIM)
        tl.store(du + to, dg.to(du.dtype.element_ty), mask=inside)
        if shares is not None:
            dweight += dnorm * xhat
            dbias += dnorm
    if shares is not None:
        own = shares + program * ROW_WIDTH + cols
        tl.store(own, tl.sum(dweight, axis=0), mask=in_group < WIDTH)
        tl.store(own + programs * ROW_WIDTH, tl.sum(dbias, axis=0), mask=in_group < WIDTH)
