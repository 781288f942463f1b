"""HSTU attention on Hopper (sm_90): what runs there, tile sizes, descriptors, launches. Deterministic.

Forward: one product. Backward: up to head dim 64 all in one kernel (5 matrix products); above, or with a mask tensor or
a bias, dq as a product, dk and dv together in a kernel of their own (7).
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_compile.ops.kernels.attention_call import extent_of, given_tensors, num_sequences
from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, processors, run
from hstu_compile.ops.kernels.silu_backward import Into, silu_backward_launch
from hstu_compile.ops.kernels.slots import slots_of
from hstu_compile.ops.kernels.strides import evenly_apart

MAX_DIM = 256
ALIGNMENT = 8  # elements of 16 bits in the 16 bytes that TMA wants strides to be a multiple of
MAX_COORDINATE = 0x7FFF0000
ROW_LIMIT = 1 << 30  # as in attention_sm90_tiles
MASK_SIZES = ("contextual_seq_len", "target_group_size", "max_attn_len", "min_full_attn_seq_len")

ROWS = 64  # of a consumer
L2_BYTES = 32 << 20  # of keys and values that are read together
TICKETS = 128  # that a multiprocessor draws: enough to even out, and no more where sequences are tiny
# By head dim, filled up to one of these: COLS, B_STAGES, C_STAGES of f and f' products.
SILU_TILES = {32: (128, 4, 4), 64: (128, 4, 4), 128: (64, 4, 4), 256: (64, 2, 2)}
GRAD_TILES = {32: (64, 4, 4), 64: (64, 4, 4), 128: (64, 4, 4), 256: (64, 2, 1)}
DKDV_TILES = {32: (64, 4), 64: (64, 4), 128: (64, 4), 256: (64, 2)}  # COLS, STAGES
DQDKDV_TILES = {32: (128, 3), 64: (128, 3)}  # COLS, STAGES
# Rows a sequence, on the average. TFLOP/s at head dim 64, in one kernel and in two: mean length 819 355, 360; 1024 282,
# 298; 1638 409, 397; 2048 365, 362; 4096 418, 400.
ONE_KERNEL_FROM = 1536


def unsupported(
    capability: tuple[int, int], *, dtype: torch.dtype, attn_dim: int, hidden_dim: int, has_mask: bool, has_bias: bool
) -> str | None:
    """Why these kernels cannot run the call, in words; None if they can."""
    if capability != (9, 0):
        return f"built for sm_90, this is sm_{capability[0]}{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype}, where the tensor cores want bfloat16 or float16"
    for name, whose, dim in (("attn_dim", "q and k", attn_dim), ("hidden_dim", "v", hidden_dim)):
        if dim % 8 or not 0 < dim <= MAX_DIM:
            return f"{name} {dim} (of a head of {whose}) is not a multiple of 8 up to {MAX_DIM}"
    from hstu_compile.ops.kernels import gluon_compat

    return gluon_compat.PROBLEM


class Kernels(NamedTuple):
    compat: ModuleType
    portable: ModuleType
    per_sequence: Any
    pairs: Any
    cells: Any
    lists: Any
    list_tiles: Callable[..., tuple[Launch, Tensor, Tensor]]
    family: Any
    result: Any
    product: Any
    dkdv: Any
    dkdv_split: Any
    dqdkdv: Any
    zero_launch: Callable[..., Launch]


@functools.cache
def kernels() -> Kernels:
    """Imported at the first launch."""
    from hstu_compile.ops.kernels import attention_triton, gluon_compat
    from hstu_compile.ops.kernels.attention_sm90_backward import dqdkdv_kernel
    from hstu_compile.ops.kernels.attention_sm90_dkdv import dkdv_kernel
    from hstu_compile.ops.kernels.attention_sm90_dkdv_split import dkdv_split_kernel
    from hstu_compile.ops.kernels.attention_sm90_pairs import Lists, Pairs
    from hstu_compile.ops.kernels.attention_sm90_product import product_kernel
    from hstu_compile.ops.kernels.attention_sm90_tiles import PerSequence, Result
    from hstu_compile.ops.kernels.attention_tiles import Cells
    from hstu_compile.ops.kernels.mask_occupancy import list_tiles
    from hstu_compile.ops.kernels.mask_tiles import Family
    from hstu_compile.ops.kernels.zero_tail import zero_launch

    return Kernels(
        gluon_compat,
        attention_triton,
        PerSequence,
        Pairs,
        Cells,
        Lists,
        list_tiles,
        Family,
        Result,
        product_kernel,
        dkdv_kernel,
        dkdv_split_kernel,
        dqdkdv_kernel,
        zero_launch,
    )


def forward(q: Tensor, k: Tensor, v: Tensor, *, memory: dict[Hashable, Any] | None = None, **call: Any) -> Tensor:
    """out, contiguous; keywords as in `hstu_compile.ops.hstu_attention`, with scale = 1 / scaling_seq_len, and a
    TiledMask for attn_mask.

    memory: the same for all calls, and no others, whose launches differ at most in addresses and their extent.
    """
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if out.numel():

        def launches(workspace: Workspace) -> list[Launch]:
            return forward_launches(q, k, v, out, workspace, processors(q.device), **call)

        run(memory, "forward", [q, k, v, out, *given_tensors(call)], extent_of(q, call), launches)
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    needs_bias_grad: bool,
    memory: dict[Hashable, Any] | None = None,
    **call: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and, if asked for, dbias, contiguous; keywords as in `forward`."""
    contiguous = torch.contiguous_format
    dq, dk, dv = grads = tuple([torch.empty_like(t, memory_format=contiguous) for t in (q, k, v)])
    if dq.numel():
        extent = extent_of(q, call)

        def launches(workspace: Workspace) -> list[Launch]:
            return backward_launches(dout, q, k, v, *grads, workspace, processors(q.device), **call)

        key = (dout.dtype, dout.shape[1:], dout.stride(), in_one_kernel(filled_dim(q, v), extent, call))
        run(memory, key, [dout, q, k, v, *grads, *given_tensors(call)], extent, launches)
    return dq, dk, dv, bias_grad(dout, q, k, v, memory, call) if needs_bias_grad else None


def bias_grad(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, memory: dict[Hashable, Any] | None, call: dict[str, Any]
) -> Tensor | None:
    if call["attn_bias"] is None:
        return None
    from hstu_compile.ops.kernels.attention_sm90_dbias_launch import dbias

    return dbias(dout, q, k, v, memory=memory, **call)


def silu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Sequence[Into],
    of_u: tuple[Tensor, Into] | None = None,
    *,
    needs_bias_grad: bool,
    memory: dict[Hashable, Any] | None = None,
    **call: Any,
) -> Tensor | None:
    """The gradients of q, k and v where they belong, or instead of them those of what they are the silu of; returns
    that of the bias, if asked for. Keywords as in `backward`.

    of_u: the gradient of u, and where it goes.
    """
    extent = extent_of(q, call)
    grads, silu_of = zip(*into, strict=True)
    du, into_u = (None, ()) if of_u is None else (evenly_apart(of_u[0]), of_u[1])

    def launches(workspace: Workspace) -> list[Launch]:
        args = dout, q, k, v, *grads, workspace, processors(q.device)
        of_attention = backward_launches(*args, silu_of, **call)
        return [*of_attention, *([] if du is None else [silu_backward_launch(du, into_u, extent)])]

    given = [dout, *grads, *silu_of, du, *into_u]
    layouts = [None if t is None else (t.dtype, t.shape[1:], t.stride()) for t in given]
    key = (*layouts, in_one_kernel(filled_dim(q, v), extent, call))
    if q.numel():
        run(memory, key, [q, k, v, *given, *given_tensors(call)], extent, launches)
    return bias_grad(dout, q, k, v, memory, call) if needs_bias_grad else None


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, workspace: Workspace, sms: int, **call: Any
) -> list[Launch]:
    """What `forward` runs, on a GPU with that many multiprocessors."""
    counter = workspace.empty(torch.int32, (COUNTER,))
    zeros = kernels().zero_launch((out,), call["seq_offsets"], workspace.extent, (counter,))
    (q, k, v), batch_rows = loadable(q, k, v)
    run = Run(filled_dim(q, v), batch_of(q, batch_rows, call), call, sms, workspace)
    return [zeros, *product(q, q, k, v, result_of(out), float(call["scale"]), run, counter, grad=False)]


def backward_launches(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    workspace: Workspace,
    sms: int,
    silu_of: Sequence[Tensor | None] = (None, None, None),
    **call: Any,
) -> list[Launch]:
    """What `backward` runs; silu_of: what q, k and v are the silu of, for its gradient instead of theirs."""
    scale = float(call["scale"])
    factor = call["alpha"] * scale
    (dout, q, k, v), batch_rows = loadable(dout, q, k, v)
    run = Run(filled_dim(q, v), batch_of(q, batch_rows, call), call, sms, workspace)
    width = run.width
    one_kernel = in_one_kernel(width, workspace.extent, call)
    cols, stages = (DQDKDV_TILES if one_kernel else DKDV_TILES)[width]
    arguments = (describe(q, cols, width), describe(k, ROWS, width))
    arguments += (describe(v, ROWS, width), describe(dout, cols, width))
    dq_out, dk_out, dv_out = map(result_of, (dq, dk, dv), silu_of)
    outputs = (dk_out, dv_out, 0.5 * call["alpha"], factor, scale, *run.batch)
    constants = {"K_DIM": k.shape[-1], "V_DIM": v.shape[-1], "D": width, "COLS": cols, "STAGES": stages}
    zeros = functools.partial(kernels().zero_launch, (dq, dk, dv), call["seq_offsets"], workspace.extent)
    if one_kernel:
        tiles = functools.partial(dq_tiles, call["seq_offsets"] is not None, q.shape[-2], cols)
        added = workspace.empty(torch.int32, lambda extent: (tiles(extent),))
        sums = workspace.empty(torch.float32, lambda extent: (tiles(extent), cols * width))
        return [zeros((added,), tiles), dqdkdv(arguments, dq_out, sums, added, outputs, constants, run)]
    counters = [workspace.empty(torch.int32, (COUNTER,)) for _ in range(2)]  # each launch's own
    kernel, rows = (kernels().dkdv, 2 * ROWS) if width <= 128 else (kernels().dkdv_split, ROWS)
    of_keys = persistent(kernel, k, rows, arguments + outputs, constants, run, counters[0])
    of_queries = product(q, dout, k, v, dq_out, factor, run, counters[1], grad=True)
    return [zeros(tuple(counters)), *of_keys, *of_queries]


class Run(NamedTuple):
    """What the products of one call share."""

    width: int
    batch: tuple
    call: dict[str, Any]
    sms: int
    workspace: Workspace


def has_pairs(call: dict[str, Any]) -> bool:
    return call["attn_mask"] is not None or call["attn_bias"] is not None


def in_one_kernel(width: int, extent: Extent, call: dict[str, Any]) -> bool:
    long = mean_length(call["seq_offsets"] is not None, extent) >= ONE_KERNEL_FROM
    return width in DQDKDV_TILES and long and not has_pairs(call)


def mean_length(jagged: bool, extent: Extent) -> int:
    return extent.rows // max(1, extent.sequences) if jagged else extent.max_seq_len


COUNTER = 4  # elements of what tickets are drawn from: 16 bytes


def dq_tiles(jagged: bool, heads: int, rows: int, extent: Extent) -> int:
    """Of all sequences."""
    total_rows = extent.rows if jagged else extent.rows * extent.max_seq_len
    return (total_rows // rows + extent.sequences) * heads


def dqdkdv(
    inputs: tuple, dq: Any, sums: Tensor, added: Tensor, outputs: tuple, constants: dict[str, Any], run: Run
) -> Launch:
    """Five products: see attention_sm90_backward."""
    sizes = functools.partial(dqdkdv_sizes, run.call["seq_offsets"] is not None, dq.ptr.shape[-2])
    programs, numbers = sizes(run.workspace.extent)
    _, *numbers = numbers.values()
    arguments = (*inputs, dq, sums, added, *outputs, *numbers)
    constants = {**constants, "FAMILY": family_of(run.call), "num_warps": 4, "maxnreg": 168}
    return Launch(kernels().dqdkdv, programs, arguments, constants, sizes)


def dqdkdv_sizes(jagged: bool, heads: int, extent: Extent) -> tuple[int, dict[str, int]]:
    """In the order of the kernel's arguments."""
    slots = slots_of(jagged, 2 * ROWS, extent)
    sizes = {"N": extent.max_seq_len, "num_sequences": extent.sequences}
    return slots.number * heads, sizes | {"tiles_per_seq": slots.tiles_per_seq, "slots_per_seq": slots.slots_per_seq}


def product(
    a: Tensor, da: Tensor, b: Tensor, c: Tensor, out: Any, factor: float, run: Run, counter: Tensor, *, grad: bool
) -> list[Launch]:
    width, call = run.width, run.call
    cols, b_stages, c_stages = (GRAD_TILES if grad else SILU_TILES)[width]
    a_rows = describe(a, ROWS, width)
    arguments = (a_rows, a_rows if da is a else describe(da, ROWS, width))
    arguments += (describe(b, cols, width), describe(c, cols, width), None, None, out, 0.5 * call["alpha"], factor)
    constants = {"DIM": out.ptr.shape[-1], "D": width, "COLS": cols, "B_STAGES": b_stages, "C_STAGES": c_stages}
    constants |= {
        "GRAD": grad,
        "IN_REGISTERS": width <= 128 and not grad,
        "REGISTERS": 240,
        "parts": 1,
        "BEGINS_EARLY": False,
    }
    return persistent(kernels().product, a, 2 * ROWS, (*arguments, *run.batch), constants, run, counter)


def persistent(
    kernel: Any, x: Tensor, rows: int, arguments: tuple, constants: dict[str, Any], run: Run, counter: Tensor
) -> list[Launch]:
    """A launch with tickets for output tiles of so many rows of x (see attention_sm90_schedule), and what it waits for.

    counter: 0 then; a launch's own, since launches of other streams may run at a time.
    """
    jagged, heads = run.call["seq_offsets"] is not None, x.shape[-2]
    sizes = functools.partial(ticket_sizes, jagged, heads, rows, run.width, run.sms)
    programs, numbers = sizes(run.workspace.extent)
    _, *tickets = numbers.values()
    before, lists = lists_of(rows, constants["COLS"], run, by_keys=kernel is not kernels().product)
    pairs = pairs_of(x, run.call, lists)
    constants |= {"FAMILY": family_of(run.call), "num_warps": 4, "maxnreg": 168}
    return [*before, Launch(kernel, programs, (*arguments, pairs, counter, *tickets), constants, sizes)]


def ticket_sizes(
    jagged: bool, heads: int, rows: int, width: int, sms: int, extent: Extent
) -> tuple[int, dict[str, int]]:
    """In the order of the kernels' arguments."""
    slots = slots_of(jagged, rows, extent)
    group = group_of(heads, width, mean_length(jagged, extent))
    tiles = slots.number * heads
    wanted = max(1, tiles // (TICKETS * sms))  # tiles a ticket
    heads_a_ticket = math.gcd(heads, 1 << (wanted.bit_length() - 1))
    tickets = tiles // heads_a_ticket
    sizes = {"N": extent.max_seq_len, "num_sequences": extent.sequences, "group": group}
    sizes |= {"tiles_per_seq": slots.tiles_per_seq, "slots_per_seq": slots.slots_per_seq}
    return min(sms, tickets), sizes | {"num_tickets": tickets, "heads_a_ticket": heads_a_ticket}


def group_of(heads: int, width: int, length: int) -> int:
    """How many sequences of so many keys have tiles that are ordered together."""
    return max(1, min(32, L2_BYTES // max(1, 4 * heads * width * length)))


def filled_dim(q: Tensor, v: Tensor) -> int:
    """The head dim that tiles have: TMA fills up with zeros."""
    return max(32, 1 << (max(q.shape[-1], v.shape[-1]) - 1).bit_length())


def result_of(out: Tensor, silu_of: Tensor | None = None) -> Any:
    """[..., heads, dim], all rows evenly apart."""
    return kernels().result(out, out.stride(-3), kernels().portable.constant(out.stride(-2)), silu_of)


def batch_of(q: Tensor, batch_rows: int, call: dict[str, Any]) -> tuple:
    """The kernels' arguments `each` to `min_full_attn_seq_len`, the same wherever the sequences lie."""
    per_sequence = (call.get(name) for name in kernels().per_sequence._fields)
    each = kernels().per_sequence(*(t if t is None else t.contiguous() for t in per_sequence))
    return each, call["max_seq_len"], batch_rows, q.shape[-2], *(call[name] for name in MASK_SIZES)


def lists_of(rows: int, cols: int, run: Run, *, by_keys: bool) -> tuple[list[Launch], Any]:
    """Which tiles of the mask tensor, if there is one, output tiles of so many rows stream; and what lists them."""
    mask = run.call["attn_mask"]
    if mask is None:
        return [], None
    launch, visits, ranks = kernels().list_tiles(mask, rows, cols, run.workspace, by_keys=by_keys)
    by_sequence, by_head = (kernels().portable.constant(n > 1) for n in mask.states.shape[:2])
    return [launch], kernels().lists(visits, ranks, by_sequence, by_head)


def pairs_of(x: Tensor, call: dict[str, Any], lists: Any = None) -> Any:
    """Bias and mask tensor, as a kernel takes them."""
    size = num_sequences(x, call), x.shape[-2]
    absent = kernels().lists(None, None, None, None)
    return kernels().pairs(cells_of(call["attn_bias"], *size), weights_of(call, *size), lists or absent)


def weights_of(call: dict[str, Any], sequences: int, heads: int) -> Any:
    """The mask tensor, if there is one."""
    mask = call["attn_mask"]
    return cells_of(None if mask is None else mask.cells, sequences, heads)


def cells_of(t: Tensor | None, sequences: int, heads: int) -> Any:
    """A bias or mask tensor, with a GRAIN of 2 where two adjacent cells are one aligned load in every row."""
    if t is None:
        return kernels().cells(*[None] * len(kernels().cells._fields))
    cells = kernels().portable.cells_of(t, sequences, heads)
    steps = [step for step in cells.ptr.stride() if step != 1]
    aligned = cells.ptr.data_ptr() % 16 == 0 and all(n % 2 == 0 for n in (t.shape[-1], *steps))
    return cells._replace(GRAIN=kernels().portable.constant(2 if aligned else 1))


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
