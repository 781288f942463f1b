"""HSTU attention on Hopper (sm_90): what runs there, tile sizes, descriptors, launches. Deterministic, no atomics.

Forward: a warp-specialised kernel, at head dim 256 the plain product (the faster of the two at each).
Backward: dq as a product and dk, dv in one kernel (7 matrix products); at head dim 256 three products (8).
"""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_DIM = 256
ALIGNMENT = 8  # elements of 16 bits in the 16 bytes that TMA wants strides to be a multiple of
MAX_COORDINATE = 0x7FFF0000
ROW_LIMIT = 1 << 30  # as in attention_sm90_tiles
MASK_SIZES = ("contextual_seq_len", "target_group_size", "max_attn_len", "min_full_attn_seq_len")

# By head dim, filled up to one of these.
FORWARD_TILES = {32: (64, 128, 4), 64: (64, 128, 4), 128: (64, 64, 4)}  # BLOCK_R per consumer, BLOCK_C, STAGES
PRODUCT_TILES = {32: (128, 128, 2, 2), 64: (128, 128, 2, 2), 128: (128, 128, 2, 2), 256: (128, 64, 2, 1)}  # f'
MASKED_PRODUCT_TILES = {128: (128, 64, 3, 3)}  # with targets or contextual rows, whose bounds would spill above
SILU_PRODUCT_TILES = {256: (128, 64, 2, 2)}  # f: BLOCK_R, BLOCK_C, B_STAGES, C_STAGES
BACKWARD_TILES = {32: (128, 128, 3), 64: (128, 128, 3), 128: (128, 64, 3)}  # KEYS, QUERIES, STAGES; or two kernels:
DKDV_TILES = {32: (128, 64, 3), 64: (128, 64, 3), 128: (128, 64, 2)}  # KEYS, QUERIES, STAGES


def unsupported(
    capability: tuple[int, int], *, dtype: torch.dtype, attn_dim: int, hidden_dim: int, has_mask: bool, has_bias: bool
) -> str | None:
    """Why these kernels cannot run the call, in words; None if they can."""
    if capability != (9, 0):
        return f"built for sm_90, this is sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype}, where the tensor cores want bfloat16 or float16"
    for name, dim in (("attn_dim", attn_dim), ("hidden_dim", hidden_dim)):
        if dim % 8 or not 0 < dim <= MAX_DIM:
            return f"{name} {dim} is not a multiple of 8 up to {MAX_DIM}"
    if has_mask:
        return "attn_mask is not fused here yet"
    if has_bias:
        return "attn_bias is not fused here yet"
    from hstu_compile.ops.kernels import gluon_compat

    return gluon_compat.PROBLEM


class Launch(NamedTuple):
    """One kernel with everything it is called with."""

    kernel: Any
    programs: int
    arguments: tuple
    constants: dict[str, Any]

    def __call__(self) -> None:
        if self.programs:
            self.kernel[(self.programs,)](*self.arguments, **self.constants)


class Kernels(NamedTuple):
    compat: ModuleType
    per_sequence: Any
    family: Any
    forward: Any
    product: Any
    dkdv: Any
    backward: Any


@functools.cache
def kernels() -> Kernels:
    """Imported at the first launch."""
    from hstu_compile.ops.kernels import gluon_compat
    from hstu_compile.ops.kernels.attention_sm90_backward import backward_kernel
    from hstu_compile.ops.kernels.attention_sm90_dkdv import dkdv_kernel
    from hstu_compile.ops.kernels.attention_sm90_forward import forward_kernel
    from hstu_compile.ops.kernels.attention_sm90_product import product_kernel
    from hstu_compile.ops.kernels.attention_sm90_tiles import PerSequence
    from hstu_compile.ops.kernels.mask_tiles import Family

    return Kernels(gluon_compat, PerSequence, Family, forward_kernel, product_kernel, dkdv_kernel, backward_kernel)


def forward(q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
    """out, contiguous; keywords as in `hstu_compile.ops.hstu_attention`, with scale = 1 / scaling_seq_len."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    if out.numel():
        with torch.cuda.device_of(q):
            for launch in forward_launches(q, k, v, out, processors(q.device), **call):
                launch()
    return out


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, needs_bias_grad: bool, **call: Any
) -> tuple[Tensor, Tensor, Tensor, None]:
    """dq, dk, dv, contiguous; keywords as in `forward`. There is no bias here, hence no dbias."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if dq.numel():
        with torch.cuda.device_of(q):
            for launch in backward_launches(dout, q, k, v, dq, dk, dv, **call):
                launch()
    return dq, dk, dv, None


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_launches(q: Tensor, k: Tensor, v: Tensor, out: Tensor, sms: int, **call: Any) -> list[Launch]:
    """What `forward` runs, on a GPU with that many multiprocessors."""
    width, half_alpha, scale = filled_dim(q, v), 0.5 * call["alpha"], float(call["scale"])
    (q, k, v), batch_rows = loadable(q, k, v)
    batch = batch_of(q, batch_rows, call)
    if width not in FORWARD_TILES:
        tiles = SILU_PRODUCT_TILES[width]
        return [product(q, q, k, v, out, width, tiles, half_alpha, scale, batch, call, False, False)]
    rows, cols, stages = FORWARD_TILES[width]
    tiles_per_seq = math.ceil(call["max_seq_len"] / (2 * rows))
    tiles = tiles_per_seq * heads_in(q, call)
    arguments = (describe(q, rows, width), describe(k, cols, width), describe(v, cols, width))
    arguments += (out, row_width(out), half_alpha, scale, *batch, tiles_per_seq, tiles)
    constants = {"DIM": v.shape[-1], "D": width, "BLOCK_R": rows, "BLOCK_C": cols, "STAGES": stages}
    constants |= {"FAMILY": family_of(call), "num_warps": 4, "maxnreg": 168}
    return [Launch(kernels().forward, min(sms, tiles), arguments, constants)]


def backward_launches(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, **call: Any
) -> list[Launch]:
    """What `backward` runs."""
    width, half_alpha, scale = filled_dim(q, v), 0.5 * call["alpha"], float(call["scale"])
    factor = call["alpha"] * scale
    (dout, q, k, v), batch_rows = loadable(dout, q, k, v)
    batch = batch_of(q, batch_rows, call)
    if width in BACKWARD_TILES:
        return [one_kernel(dout, q, k, v, dq, dk, dv, width, half_alpha, factor, scale, batch, call)]
    tiles = MASKED_PRODUCT_TILES.get(width, PRODUCT_TILES[width]) if is_ragged(call) else PRODUCT_TILES[width]
    dq_launch = product(q, dout, k, v, dq, width, tiles, half_alpha, factor, batch, call, True, False)
    if width not in DKDV_TILES:
        return [
            product(k, k, q, dout, dv, width, SILU_PRODUCT_TILES[width], half_alpha, scale, batch, call, False, True),
            product(k, v, q, dout, dk, width, tiles, half_alpha, factor, batch, call, True, True),
            dq_launch,
        ]
    keys, queries, stages = DKDV_TILES[width]
    tiles_per_seq = math.ceil(call["max_seq_len"] / keys)
    arguments = (describe(q, queries, width), describe(k, keys, width))
    arguments += (describe(v, keys, width), describe(dout, queries, width))
    arguments += (dk, dv, row_width(dk), row_width(dv), half_alpha, factor, scale, *batch, tiles_per_seq)
    constants = {"K_DIM": k.shape[-1], "V_DIM": v.shape[-1], "D": width}
    constants |= {"KEYS": keys, "QUERIES": queries, "STAGES": stages, "FAMILY": family_of(call), "num_warps": 8}
    return [Launch(kernels().dkdv, tiles_per_seq * heads_in(q, call), arguments, constants), dq_launch]


def one_kernel(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, width: int,
    half_alpha: float, factor: float, scale: float, batch: tuple, call: dict[str, Any],
) -> Launch:  # fmt: skip
    """Five products, see attention_sm90_backward."""
    keys, queries, stages = BACKWARD_TILES[width]
    tiles_per_seq = math.ceil(call["max_seq_len"] / keys)
    heads = heads_in(q, call)
    slots = (math.prod(q.shape[:-2]) // queries) * q.shape[-2] + heads  # tiles of dq, of all sequences
    sums = torch.empty(slots, queries * width, dtype=torch.float32, device=q.device)
    counters = torch.zeros(slots, dtype=torch.int32, device=q.device)
    arguments = (describe(q, queries, width), describe(k, keys // 2, width))
    arguments += (describe(v, keys // 2, width), describe(dout, queries, width))
    arguments += (dq, dk, dv, row_width(dq), row_width(dk), row_width(dv), sums, counters, half_alpha, factor, scale)
    arguments += (*batch, tiles_per_seq)
    constants = {"K_DIM": k.shape[-1], "V_DIM": v.shape[-1], "D": width}
    constants |= {"KEYS": keys, "QUERIES": queries, "STAGES": stages, "FAMILY": family_of(call)}
    constants |= {"num_warps": 4, "maxnreg": 168}
    return Launch(kernels().backward, tiles_per_seq * heads, arguments, constants)


def product(
    a: Tensor, da: Tensor, b: Tensor, c: Tensor, out: Tensor, width: int, tiles: tuple[int, int, int, int],
    half_alpha: float, factor: float, batch: tuple, call: dict[str, Any], grad: bool, keys_resident: bool,
) -> Launch:  # fmt: skip
    rows, cols, b_stages, c_stages = tiles
    tiles_per_seq = math.ceil(call["max_seq_len"] / rows)
    arguments = (describe(a, rows, width), describe(da, rows, width))
    arguments += (describe(b, cols, width), describe(c, cols, width))
    arguments += (out, row_width(out), half_alpha, factor, *batch, tiles_per_seq)
    constants = {"DIM": out.shape[-1], "D": width, "BLOCK_R": rows, "BLOCK_C": cols}
    constants |= {"B_STAGES": b_stages, "C_STAGES": c_stages, "GRAD": grad, "KEYS_RESIDENT": keys_resident}
    constants |= {"FAMILY": family_of(call), "num_warps": 8}
    return Launch(kernels().product, tiles_per_seq * heads_in(a, call), arguments, constants)


def filled_dim(q: Tensor, v: Tensor) -> int:
    """The head dim that tiles have: TMA fills up with zeros."""
    return max(32, 1 << (max(q.shape[-1], v.shape[-1]) - 1).bit_length())


def row_width(out: Tensor) -> int:
    return out.shape[-2] * out.shape[-1]


def heads_in(q: Tensor, call: dict[str, Any]) -> int:
    """Heads of all sequences."""
    offsets = call["seq_offsets"]
    return q.shape[-2] * (q.shape[0] if offsets is None else offsets.shape[0] - 1)


def batch_of(q: Tensor, batch_rows: int, call: dict[str, Any]) -> tuple:
    """The kernels' arguments `each` to `min_full_attn_seq_len`, the same wherever the sequences lie."""
    each = kernels().per_sequence(*(call[name] for name in kernels().per_sequence._fields))
    return each, call["max_seq_len"], batch_rows, q.shape[-2], *(call[name] for name in MASK_SIZES)


def is_ragged(call: dict[str, Any]) -> bool:
    """Whether the mask has more than a causal edge and a window."""
    return call["num_targets"] is not None or has_context(call)


def has_context(call: dict[str, Any]) -> bool:
    return call["num_contextuals"] is not None or call["contextual_seq_len"] > 0


def family_of(call: dict[str, Any]) -> Any:
    """Which clauses of the mask a kernel is compiled with."""
    return kernels().family(
        CAUSAL=call["causal"],
        CONTEXT=has_context(call),
        TARGETS=call["num_targets"] is not None,
        WINDOW=call["max_attn_len"] > 0,
        SHARED=call["targets_share_position"],
    )


@functools.cache
def shared_layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    gl = kernels().compat.gl
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, 1, width], element)


def describe(x: Tensor, rows: int, width: int) -> Any:
    """The TMA descriptor for tiles of [rows, width] of one head of x: see attention_sm90_tiles."""
    heads, dim = x.shape[-2:]
    head_stride = x.stride(-2) if heads > 1 else ALIGNMENT
    step = row_stride(x)
    return kernels().compat.TensorDescriptor(
        x,
        [MAX_COORDINATE, MAX_COORDINATE, ROW_LIMIT, heads, dim],
        [(1 << 34) - step, step, step, head_stride, 1],
        [1, 1, rows, 1, width],
        shared_layout(rows, width, x.dtype),
    )


def row_stride(x: Tensor) -> int:
    """From one row to the next; where there is but one, anything that TMA accepts, or to the next sequence's."""
    if x.shape[-3] > 1:
        return x.stride(-3)
    return x.stride(0) if x.dim() == 4 and x.shape[0] > 1 else ALIGNMENT


def rows_apart(x: Tensor) -> int:
    """Dense: rows from one sequence to the next; 0 where that is no whole number."""
    if x.shape[0] == 1:
        return x.shape[1]
    return 0 if x.stride(0) % row_stride(x) else x.stride(0) // row_stride(x)


def loadable(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The tensors, or copies where TMA cannot read them, and the rows from one sequence to the next if dense.

    Base and strides must be multiples of 16 bytes, and not 0; dense sequences equally many rows apart in all tensors.
    """
    ready = [x if is_aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in tensors]
    if ready[0].dim() == 3:
        return ready, 0
    apart = {rows_apart(x) for x in ready}
    if len(apart) > 1 or 0 in apart:
        apart = {ready[0].shape[1]}
        ready = [x if rows_apart(x) in apart else x.clone(memory_format=torch.contiguous_format) for x in ready]
    return ready, apart.pop()


def is_aligned(x: Tensor) -> bool:
    strides = [step for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % ALIGNMENT == 0 for step in strides)
