"""What the kernel of attention_sm90_dbias.py is called with: lists of sharers, descriptors, tile sizes."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from hstu_compile.ops.kernels import attention_sm90 as sm90

TILE = 128  # rows and columns of a tile of the bias
CHUNK = 64  # of the head dim
STAGES = 5  # of 128 x 64 of two operands: 160 of 227 KB
BIAS_BYTES = 4 * TILE * TILE  # two tiles of 16 bits or one of 32


class Kernels(NamedTuple):
    dbias: Any
    sharers: Any
    cells: Any
    sequences: Any
    occupied_tiles: Any


@functools.cache
def kernels() -> Kernels:
    """Imported at the first launch."""
    from hstu_compile.ops.kernels.attention_sm90_dbias import dbias_kernel
    from hstu_compile.ops.kernels.attention_tiles import Cells, Sequences
    from hstu_compile.ops.kernels.attention_triton_dbias import sharers_kernel
    from hstu_compile.ops.kernels.mask_occupancy import occupied_tiles

    return Kernels(dbias_kernel, sharers_kernel, Cells, Sequences, occupied_tiles)


def dbias(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
    """The gradient of call["attn_bias"], in its shape and dtype, contiguous."""
    bias = call["attn_bias"]
    out = torch.empty(bias.shape, dtype=bias.dtype, device=q.device)
    if out.numel():
        with torch.cuda.device_of(q):
            launches = dbias_launches(dout, q, k, v, out, lists_of(q, call), sm90.processors(q.device), **call)
            for launch in launches:
                launch()
    return out


def lists_of(q: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The mask tensor's occupied tiles, queries x keys."""
    return None if call["attn_mask"] is None else kernels().occupied_tiles(unexpanded(call["attn_mask"]), TILE, TILE)


def dbias_launches(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lists: tuple[Tensor, Tensor] | None,
    sms: int,
    **call: Any,
) -> list[sm90.Launch]:
    """What finds the sequences and heads that share each tile of the bias, and what sums over them."""
    (dout, q, k, v), batch_rows = sm90.loadable(dout, q, k, v)
    sequences, num_heads, max_seq_len = sm90.num_sequences(q, call), q.shape[-2], call["max_seq_len"]
    batches, heads, N, _ = out.shape
    tiles = batches * heads * triton.cdiv(N, TILE) ** 2
    most = sequences // batches * (num_heads // heads)
    counts = torch.empty(tiles, dtype=torch.int32, device=q.device)
    sharers = counts.new_empty(tiles, max(1, most))
    sizes = (sequences, batches, heads)
    per_sequence = (call[name] for name in ("seq_offsets", "seq_lengths", "num_targets", "num_contextuals"))
    visits, ranks = lists or (None, None)
    mask_sizes = (1, 1) if visits is None else visits.shape[:2]
    arguments = (sharers, counts, *sizes, kernels().sequences(*per_sequence), visits, ranks, *mask_sizes)
    arguments += (sm90.family_of(call), N, num_heads, *(call[name] for name in sm90.MASK_SIZES))
    constants = {"ROWS": TILE, "COLS": TILE, "num_warps": 1}
    listing = sm90.Launch(kernels().sharers, tiles, arguments, constants)

    chunk = min(CHUNK, sm90.filled_dim(q, v))
    descriptors = tuple(sm90.describe(x, TILE, chunk) for x in (q, k, dout, v))
    bias = loadable_bias(call["attn_bias"])
    counter = next(sm90.counters(q, 1))
    mask = None if call["attn_mask"] is None else cells(call["attn_mask"].expand(sequences, num_heads, N, N))
    arguments = (*descriptors, describe_bias(bias), cells(out), mask, 0.5 * call["alpha"], float(call["scale"]))
    arguments += (sharers, counts, max(1, most), counter, tiles, *sizes, *sm90.batch_of(q, batch_rows, call))
    constants = {"FAMILY": sm90.family_of(call), "CHUNK": chunk, "COLS": TILE, "STAGES": STAGES}
    constants |= {"K_CHUNKS": triton.cdiv(k.shape[-1], chunk), "V_CHUNKS": triton.cdiv(v.shape[-1], chunk)}
    constants |= {"BIAS_STAGES": BIAS_BYTES // (TILE * TILE * bias.element_size()), "num_warps": 4, "maxnreg": 168}
    return [listing, sm90.Launch(kernels().dbias, min(sms, tiles), arguments, constants)]


def cells(x: Tensor) -> Any:
    """[B, H, N, N] as kernels take it; divisibility of N lets a store take several columns at once."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    return kernels().cells(x, *x.stride(), 16 if x.shape[-1] % 16 == 0 else 1)


def unexpanded(x: Tensor) -> Tensor:
    """[B|1, H|1, N, N] with every expanded leading dimension back at size 1."""
    for dim in (0, 1):
        if x.stride(dim) == 0:
            x = x.narrow(dim, 0, min(1, x.shape[dim]))
    return x


def loadable_bias(bias: Tensor) -> Tensor:
    """The bias, or where TMA cannot read it a copy with rows a multiple of 16 bytes apart."""
    bias = bias.float() if bias.dtype == torch.float64 else bias
    grain = 16 // bias.element_size()
    steps = [step for size, step in zip(bias.shape[:-1], bias.stride()[:-1], strict=True) if size > 1]
    if bias.stride(-1) == 1 and bias.data_ptr() % 16 == 0 and all(step > 0 and step % grain == 0 for step in steps):
        return bias
    *lead, N = bias.shape
    return bias.new_empty(*lead, triton.cdiv(N, grain) * grain)[..., :N].copy_(bias)


def describe_bias(bias: Tensor) -> Any:
    grain = 16 // bias.element_size()
    strides = [step if size > 1 else grain for size, step in zip(bias.shape[:-1], bias.stride()[:-1], strict=True)]
    block = [1, 1, TILE, TILE]
    descriptor = sm90.kernels().compat.TensorDescriptor
    return descriptor(bias, list(bias.shape), [*strides, 1], block, bias_layout(bias.dtype))


@functools.cache
def bias_layout(dtype: torch.dtype) -> Any:
    gl = sm90.kernels().compat.gl
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, TILE, TILE], element)
