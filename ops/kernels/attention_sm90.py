"""HSTU attention on Hopper (sm_90): what runs there, tile sizes, descriptors, launches. Deterministic, no atomics.

Forward: a warp-specialised kernel, at head dim 256 the plain product (the faster of the two at each, see docs/kernels.md).
Backward: dq as a product and dk, dv in one kernel (7 matrix products); at head dim 256 three products (8).
"""

import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_DIM = 256
BATCH_ARGUMENTS = (
    "seq_offsets",
    "seq_lengths",
    "num_targets",
    "num_contextuals",
    "contextual_seq_len",
    "target_group_size",
    "max_attn_len",
    "min_full_attn_seq_len",
)

# By head dim, filled up to one of these.
FORWARD_TILES = {32: (64, 128, 4), 64: (64, 128, 4), 128: (64, 64, 4)}  # BLOCK_R per consumer, BLOCK_C, STAGES
PRODUCT_TILES = {32: (128, 128, 2, 2), 64: (128, 128, 2, 2), 128: (128, 128, 2, 2), 256: (128, 64, 2, 1)}  # f'
SILU_PRODUCT_TILES = {256: (128, 64, 2, 2)}  # f: BLOCK_R, BLOCK_C, B_STAGES, C_STAGES
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
        self.kernel[(self.programs,)](*self.arguments, **self.constants)


class Kernels(NamedTuple):
    compat: ModuleType
    batch: Any
    family: Any
    forward: Any
    product: Any
    dkdv: Any


@functools.cache
def kernels() -> Kernels:
    """Imported at the first launch."""
    from hstu_compile.ops.kernels import gluon_compat
    from hstu_compile.ops.kernels.attention_sm90_dkdv import dkdv_kernel
    from hstu_compile.ops.kernels.attention_sm90_forward import forward_kernel
    from hstu_compile.ops.kernels.attention_sm90_product import product_kernel
    from hstu_compile.ops.kernels.attention_sm90_tiles import Batch
    from hstu_compile.ops.kernels.mask_tiles import Family

    return Kernels(gluon_compat, Batch, Family, forward_kernel, product_kernel, dkdv_kernel)


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
    width, half_alpha, scale = filled_dim(q, v), call["alpha"] / 2, call["scale"]
    if width not in FORWARD_TILES:
        return [product(q, q, k, v, out, width, SILU_PRODUCT_TILES[width], half_alpha, scale, call, False, False)]
    rows, cols, stages = FORWARD_TILES[width]
    tiles_per_seq = math.ceil(call["max_seq_len"] / (2 * rows))
    heads = heads_in(q, call)
    tiles = tiles_per_seq * heads
    describe = Describe(width, call)
    arguments = (describe(q, rows), describe(k, cols), describe(v, cols), out, row_width(out), half_alpha, scale)
    constants = {"DIM": v.shape[-1], "D": width, "BLOCK_R": rows, "BLOCK_C": cols, "STAGES": stages}
    constants |= {"FAMILY": family_of(call), "num_warps": 4, "maxnreg": 168}
    arguments += (batch_of(q, call), tiles_per_seq, tiles)
    return [Launch(kernels().forward, min(sms, tiles), arguments, constants)]


def backward_launches(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, **call: Any
) -> list[Launch]:
    """What `backward` runs."""
    width, half_alpha, scale = filled_dim(q, v), call["alpha"] / 2, call["scale"]
    tiles, factor = PRODUCT_TILES[width], call["alpha"] * call["scale"]
    dq_launch = product(q, dout, k, v, dq, width, tiles, half_alpha, factor, call, True, False)
    if width not in DKDV_TILES:
        return [
            product(k, k, q, dout, dv, width, SILU_PRODUCT_TILES[width], half_alpha, scale, call, False, True),
            product(k, v, q, dout, dk, width, tiles, half_alpha, factor, call, True, True),
            dq_launch,
        ]
    keys, queries, stages = DKDV_TILES[width]
    tiles_per_seq = math.ceil(call["max_seq_len"] / keys)
    describe = Describe(width, call)
    arguments = (describe(q, queries), describe(k, keys), describe(v, keys), describe(dout, queries))
    arguments += (dk, dv, row_width(dk), row_width(dv), half_alpha, factor, scale)
    constants = {"K_DIM": k.shape[-1], "V_DIM": v.shape[-1], "D": width}
    constants |= {"KEYS": keys, "QUERIES": queries, "STAGES": stages, "FAMILY": family_of(call), "num_warps": 8}
    arguments += (batch_of(q, call), tiles_per_seq)
    return [Launch(kernels().dkdv, tiles_per_seq * heads_in(q, call), arguments, constants), dq_launch]


def product(
    a: Tensor, da: Tensor, b: Tensor, c: Tensor, out: Tensor, width: int, tiles: tuple[int, int, int, int],
    half_alpha: float, factor: float, call: dict[str, Any], grad: bool, keys_resident: bool,
) -> Launch:  # fmt: skip
    rows, cols, b_stages, c_stages = tiles
    tiles_per_seq = math.ceil(call["max_seq_len"] / rows)
    describe = Describe(width, call)
    arguments = (describe(a, rows), describe(da, rows), describe(b, cols), describe(c, cols))
    arguments += (out, row_width(out), half_alpha, factor)
    constants = {"DIM": out.shape[-1], "D": width, "BLOCK_R": rows, "BLOCK_C": cols}
    constants |= {"B_STAGES": b_stages, "C_STAGES": c_stages, "GRAD": grad, "KEYS_RESIDENT": keys_resident}
    constants |= {"FAMILY": family_of(call), "num_warps": 8}
    arguments += (batch_of(a, call), tiles_per_seq)
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


def batch_of(q: Tensor, call: dict[str, Any]) -> Any:
    """The kernels' `batch`: the same fields wherever they come from."""
    return kernels().batch(
        N=call["max_seq_len"], num_heads=q.shape[-2], **{name: call[name] for name in BATCH_ARGUMENTS}
    )


def family_of(call: dict[str, Any]) -> Any:
    """Which clauses of the mask a kernel is compiled with."""
    return kernels().family(
        CAUSAL=call["causal"],
        CONTEXT=call["num_contextuals"] is not None or call["contextual_seq_len"] > 0,
        TARGETS=call["num_targets"] is not None,
        WINDOW=call["max_attn_len"] > 0,
        SHARED=call["targets_share_position"],
    )


@functools.cache
def shared_layout(rows: int, width: int, dtype: torch.dtype) -> Any:
    gl = kernels().compat.gl
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, width], element)


class Describe(NamedTuple):
    """TMA descriptors for tiles of [rows, width] of one head."""

    width: int
    call: dict[str, Any]

    def __call__(self, x: Tensor, rows: int) -> Any:
        x = loadable(x)
        if self.call["seq_offsets"] is not None:
            x = x.unsqueeze(0)
        # The stride of a dimension of size 1 means nothing, but TMA wants it to be a multiple of 16 bytes.
        strides = [s if n > 1 else MAX_DIM for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
        layout = shared_layout(rows, self.width, x.dtype)
        return kernels().compat.TensorDescriptor(x, list(x.shape), [*strides, 1], [1, rows, 1, self.width], layout)


def loadable(x: Tensor) -> Tensor:
    """x, or a copy of it where TMA cannot read it: base and strides must be multiples of 16 bytes, and not 0."""
    strides = [s for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n > 1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)
