"""What the kernel of attention_sm90_dbias.py is called with: lists of sharers, descriptors, tile sizes."""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor

from hstu_compile.ops.kernels import attention_sm90 as sm90
from hstu_compile.ops.kernels import attention_triton as portable
from hstu_compile.ops.kernels.attention_call import extent_of, given_tensors, num_sequences
from hstu_compile.ops.kernels.attention_sm90_dbias import dbias_kernel
from hstu_compile.ops.kernels.attention_triton_tiles import Tile
from hstu_compile.ops.kernels.launch import Launch, Workspace, run

TILE = 128  # rows and columns of a tile of the bias
CHUNK = 64  # of the head dim
STAGES = 5  # of two operands, TILE x CHUNK each: 160 of 227 KB
BIAS_BYTES = 4 * TILE * TILE  # two tiles of 16 bits, or one of 32


def dbias(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *, memory: dict[Hashable, Any] | None = None, **call: Any
) -> Tensor:
    """The gradient of call["attn_bias"], in its shape and dtype, contiguous; see attention_sm90.forward."""
    dtype = call["attn_bias"].dtype
    out = portable.empty_bias_grad(call["attn_bias"])
    if q.numel() == 0 or num_sequences(q, call) == 0:
        return out.zero_().to(dtype)
    if out.numel():
        call["attn_bias"] = loadable_bias(call["attn_bias"])

        def launches(workspace: Workspace) -> list[Launch]:
            return dbias_launches(dout, q, k, v, out, workspace, sm90.processors(q.device), **call)

        # Whether the bias is a copy, with strides of its own, goes by its address too.
        key = ("dbias", dout.dtype, dout.shape[1:], dout.stride(), call["attn_bias"].stride())
        run(memory, key, [dout, q, k, v, out, *given_tensors(call)], extent_of(q, call), launches)
    return out.to(dtype)


def dbias_launches(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, workspace: Workspace, sms: int, **call: Any
) -> list[Launch]:
    """What `dbias` runs, with a bias that TMA can read: first what finds the sharers of each tile."""
    counter = workspace.empty(torch.int32, (sm90.COUNTER,))
    shared = portable.Call(q, k, v, workspace, **call)
    lists = shared.sharers(Tile(TILE, TILE, 1, 1), counter)
    (dout, q, k, v), batch_rows = sm90.loadable(dout, q, k, v)
    bias, chunk = call["attn_bias"], min(CHUNK, sm90.filled_dim(q, v))
    size = sequences, _ = num_sequences(q, call), q.shape[-2]
    tiles, most = lists["sharers_ptr"].shape
    arguments = (*(sm90.describe(x, TILE, chunk) for x in (q, k, dout, v)), describe_bias(bias))
    arguments += (
        portable.cells_of(out, *size),
        sm90.pairs_of(q, {**call, "attn_bias": None}),
        0.5 * call["alpha"],
        float(call["scale"]),
        lists["sharers_ptr"],
        lists["counts_ptr"],
        most,
        counter,
        tiles,
        sequences,
        *out.shape[:2],
        *sm90.batch_of(q, batch_rows, call),
    )
    constants = {
        "FAMILY": sm90.family_of(call),
        "K_CHUNKS": triton.cdiv(k.shape[-1], chunk),
        "V_CHUNKS": triton.cdiv(v.shape[-1], chunk),
        "CHUNK": chunk,
        "COLS": TILE,
        "STAGES": STAGES,
        "BIAS_STAGES": BIAS_BYTES // (TILE * TILE * bias.element_size()),
        "num_warps": 4,
        "maxnreg": 168,
    }
    return [*shared.launches, Launch(dbias_kernel, min(sms, tiles), arguments, constants)]


def loadable_bias(bias: Tensor) -> Tensor:
    """The bias, or a copy where TMA cannot read it: base and strides must be multiples of 16 bytes, and not 0."""
    bias = bias.float() if bias.element_size() > 4 else bias
    grain = 16 // bias.element_size()
    steps = [step for size, step in zip(bias.shape[:-1], bias.stride()[:-1], strict=True) if size > 1]
    if bias.stride(-1) == 1 and bias.data_ptr() % 16 == 0 and all(step > 0 and step % grain == 0 for step in steps):
        return bias
    *lead, N = bias.shape
    return bias.new_empty(*lead, triton.cdiv(N, grain) * grain)[..., :N].copy_(bias)


def describe_bias(bias: Tensor) -> Any:
    """The TMA descriptor for tiles of [TILE, TILE]."""
    grain = 16 // bias.element_size()
    strides = [step if size > 1 else grain for size, step in zip(bias.shape[:-1], bias.stride()[:-1], strict=True)]
    descriptor = sm90.kernels().compat.TensorDescriptor
    return descriptor(bias, list(bias.shape), [*strides, 1], [1, 1, TILE, TILE], bias_layout(bias.dtype))


@functools.cache
def bias_layout(dtype: torch.dtype) -> Any:
    gl = sm90.kernels().compat.gl
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, TILE, TILE], element)
