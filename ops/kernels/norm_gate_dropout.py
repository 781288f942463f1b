"""norm * gate, concatenation and dropout in Triton: tile sizes, what the kernels are called with, launches.

Deterministic: what the programs of the backward have of dweight and dbias is added up in a fixed order.
"""

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, processors, run
from hstu_compile.ops.kernels.norm_gate_dropout_kernels import backward_kernel, forward_kernel
from hstu_compile.ops.kernels.partial_sums import PartialSums, Parts, buffers_of
from hstu_compile.ops.kernels.sum_shares import Programs, sum_launches

FORWARD_ELEMENTS = 16  # a thread: two 16-byte loads of 16-bit data
BACKWARD_ELEMENTS = 8  # a thread: with 16, some 200 registers are live
MAX_WARPS = 16
# Of the backward: MAX_WARPS on each multiprocessor is what its 64 Ki registers hold at 128 a thread.
BACKWARD_REGISTERS = 128
MAX_BUFFERS = 2  # tiles on their way to shared memory
SHARED_MEMORY = 96 << 10  # bytes of them on a multiprocessor; the smallest (sm_86, sm_89) has 100 KiB


def tile_of(width: int, elements: int) -> dict[str, int]:
    """The tile of groups of this width, with `elements` a thread as far as MAX_WARPS allow."""
    block = max(1 << (width - 1).bit_length(), 16)
    warps = min(max(block // (32 * elements), 4), MAX_WARPS)
    return dict(ROWS=max(32 * elements * warps // block, 1), BLOCK=block, num_warps=warps)


def backward_tile(width: int, bytes_per_element: int) -> dict[str, int]:
    """Tile and buffers; bytes_per_element: of all that is loaded."""
    tile = tile_of(width, BACKWARD_ELEMENTS)
    loaded = tile["ROWS"] * tile["BLOCK"] * bytes_per_element * (MAX_WARPS // tile["num_warps"])
    return dict(tile, BUFFERS=min(SHARED_MEMORY // loaded, MAX_BUFFERS), maxnreg=BACKWARD_REGISTERS)


def readable(t: Tensor) -> Tensor:
    """Columns must be contiguous."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def strides_and_columns(t: Tensor) -> tuple[int, int, int]:
    """Strides of rows and heads, and columns of a head, of [T, W] or [T, H, D]."""
    return (*t.stride()[:2], t.shape[2]) if t.dim() == 3 else (t.stride(0), 0, t.shape[1])


def _affine_strides(t: Tensor | None, groups: int, width: int) -> tuple[int, int]:
    if t is None:
        return 0, 0
    return t.expand(groups, width).stride()  # type: ignore[return-value]


def kernel_arguments(
    a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, *,
    norm_eps: float, num_groups: int, rms: bool, activation: str, gate_first: bool, concat_u: bool,
    concat_activated: bool, concat_x: bool, concat_norm: bool, dropout_ratio: float, out_dtype: torch.dtype,
) -> tuple[tuple, tuple, dict]:  # fmt: skip
    """Tensors, scalars and compile-time values, as both kernels take them; the tile is each kernel's own."""
    width = a.shape[1:].numel() // num_groups
    a, u = readable(a), readable(u)
    a_row, a_head, a_head_dim = strides_and_columns(a)
    u_row, u_head, u_head_dim = strides_and_columns(u)
    # One pair of strides serves weight and bias: bring both to the same shape.
    if weight is not None and bias is not None and weight.shape != bias.shape:
        weight, bias = (t.expand(num_groups, width).contiguous() for t in (weight, bias))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    given = weight if weight is not None else bias
    group_stride, column_stride = _affine_strides(given, num_groups, width)
    threshold, scale = min(round(dropout_ratio * 2**31), 2**31 - 1), 1.0 / (1.0 - dropout_ratio)
    scalars = (a.shape[0], a_row, a_head, u_row, u_head, norm_eps, threshold, scale)
    constants = dict(
        GROUPS=num_groups, WIDTH=width, A_HEAD_DIM=a_head_dim, U_HEAD_DIM=u_head_dim,
        AFFINE_GROUP=group_stride, AFFINE_COLUMN=column_stride, RMS=rms, ACTIVATION=activation, GATE_FIRST=gate_first,
        CONCAT_U=concat_u, CONCAT_ACTIVATED=concat_activated, CONCAT_X=concat_x, CONCAT_NORM=concat_norm,
    )  # fmt: skip
    return (a, u, weight, bias, seed), scalars, constants


def forward(
    a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, out: Tensor, *,
    memory: dict[Hashable, Any] | None = None, **named: Any,
) -> None:  # fmt: skip
    """Fill `out`; arguments as in `hstu_compile::norm_gate_dropout`.

    memory: the same for all calls, and no others, whose launches differ at most in addresses and T.
    """
    extent = Extent(a.shape[0])

    def launches(_: Workspace) -> list[Launch]:
        return [forward_launch(a, u, weight, bias, seed, out, extent, **named)]

    run(memory, "forward", [a, u, weight, bias, seed, out], extent, launches)


def forward_launch(
    a: Tensor | PartialSums, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, out: Tensor,
    extent: Extent, **named: Any,
) -> Launch:  # fmt: skip
    """Of a in parts, the same numbers as of their sum."""
    partial = a if isinstance(a, PartialSums) else None
    one = a.sums[0] if isinstance(a, PartialSums) else a
    tensors, scalars, constants = kernel_arguments(one, u, weight, bias, seed, **named)
    tile = tile_of(constants["WIDTH"], FORWARD_ELEMENTS)
    seq_offsets = None
    if partial is not None:
        tensors, seq_offsets = (partial.sums, *tensors[1:]), partial.seq_offsets.contiguous()
        tile["ROWS"] = max(tile["ROWS"] // 2, 1)  # of the same warps: they decide in which order a row is summed
    sizes = functools.partial(forward_sizes, tile["ROWS"], constants["GROUPS"], partial and partial.parts)
    programs, numbers = sizes(extent)
    arguments = (*tensors, out, *scalars, seq_offsets, numbers.get("batch"), numbers.get("parts"))
    constants |= {"SUM": None if partial is None else getattr(tl, str(partial.dtype).removeprefix("torch."))}
    constants |= {"BUFFERS": 0 if partial is None else buffers_of(numbers["parts"])}
    return Launch(forward_kernel, programs, arguments, constants | tile, sizes)


def forward_sizes(tile_rows: int, groups: int, parts: Parts | None, extent: Extent) -> tuple[int, dict[str, int]]:
    sizes = {"T": extent.rows}
    if parts is not None:
        sizes |= {"batch": extent.sequences, "parts": parts(extent)}
    return -(-extent.rows // tile_rows) * groups, sizes


def backward(
    dy: Tensor, a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, *,
    du: Tensor | None = None, memory: dict[Hashable, Any] | None = None, **named: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """da, du, dweight, dbias; see `forward`. du: like u, columns contiguous, to be filled; None: make one."""
    da, dweight, dbias = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, weight, bias)
    )
    du = torch.empty_like(u, memory_format=torch.contiguous_format) if du is None else du
    grads = da, du, dweight, dbias

    def launches(workspace: Workspace) -> list[Launch]:
        return backward_launches(dy, a, u, weight, bias, seed, *grads, workspace, **named)

    key, tensors = (dy.dtype, dy.stride(), du.stride()), [dy, a, u, weight, bias, seed, *grads]
    run(memory, key, tensors, Extent(a.shape[0]), launches)
    return grads


def tile_and_programs(dy: Tensor, a: Tensor, u: Tensor, named: dict) -> tuple[dict[str, int], Programs]:
    """Of the backward: its tile and buffers, and how many programs each group has."""
    groups, pieces = named["num_groups"], 1 + named["concat_u"] + named["concat_x"] + named["concat_norm"]
    tile = backward_tile(a.shape[1:].numel() // groups, a.itemsize + u.itemsize + pieces * dy.itemsize)
    resident = MAX_WARPS // tile["num_warps"] * processors(a.device)
    return tile, functools.partial(row_programs, tile["ROWS"], max(resident // groups, 1))


def row_programs(tile_rows: int, most: int, extent: Extent) -> int:
    return min(-(-extent.rows // tile_rows), most)


def backward_launches(
    dy: Tensor, a: Tensor, u: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    da: Tensor, du: Tensor, dweight: Tensor | None, dbias: Tensor | None, workspace: Workspace, **named: Any,
) -> list[Launch]:  # fmt: skip
    """What `backward` runs."""
    extent = workspace.extent
    tile, programs = tile_and_programs(dy, a, u, named)
    tensors, scalars, constants = kernel_arguments(a, u, weight, bias, seed, **named)
    groups, width = constants["GROUPS"], constants["WIDTH"]
    shares = None
    if weight is not None or bias is not None:
        shares = workspace.empty(torch.float32, lambda extent: (2, programs(extent), groups, width))
    sizes = functools.partial(backward_sizes, programs, groups)
    du_row, du_head, du_head_dim = strides_and_columns(du)
    if du_head in (0, du_head_dim):
        du_head, du_head_dim = 0, groups * width
    constants |= {"DU_HEAD": du_head, "DU_HEAD_DIM": du_head_dim}
    arguments = (dy.contiguous(), *tensors, da, du, shares, *scalars, du_row)
    first = Launch(backward_kernel, sizes(extent)[0], arguments, constants | tile, sizes)
    return [first] if shares is None else [first, *sum_launches(shares, dweight, dbias, programs, extent)]


def backward_sizes(programs: Programs, groups: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return programs(extent) * groups, {"T": extent.rows}
