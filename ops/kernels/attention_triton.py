"""Portable HSTU attention in Triton, forward and backward: any NVIDIA GPU from sm_80 on (and the Triton interpreter).

The mask family, a mask tensor and a bias are fused; rows, heads and sequences may have any stride. Deterministic.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.attention_call import extent_of, given_tensors
from hstu_compile.ops.kernels.attention_tiles import Cells, Rows, Sequences
from hstu_compile.ops.kernels.attention_triton_dbias import dbias_kernel, sharers_kernel
from hstu_compile.ops.kernels.attention_triton_kernels import dk_dv_kernel, product_kernel
from hstu_compile.ops.kernels.attention_triton_tiles import Tile, tiles_for
from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, run
from hstu_compile.ops.kernels.mask_occupancy import TiledMask, list_tiles
from hstu_compile.ops.kernels.mask_tiles import Family
from hstu_compile.ops.kernels.silu_backward import Into, silu_backward_launch
from hstu_compile.ops.kernels.slots import slots_of
from hstu_compile.ops.kernels.strides import evenly_apart
from hstu_compile.ops.kernels.zero_tail import zero_launch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
CHUNK = 64


def unsupported(
    capability: tuple[int, int],
    *,
    dtype: torch.dtype,
    attn_dim: int,
    hidden_dim: int,
    has_mask: bool,
    has_bias: bool,
) -> str | None:
    """Why the kernels can't run a call, in words; None if they can."""
    if capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, this one has {capability[0]}.{capability[1]}"
    if dtype not in DTYPES:
        return f"needs float32, float16 or bfloat16, got {dtype}"
    for name, whose, dim in (("attn_dim", "q and k", attn_dim), ("hidden_dim", "v", hidden_dim)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            return f"needs {name} (of a head of {whose}) from 1 to {MAX_HEAD_DIM}, got {dim}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, *, memory: dict[Hashable, Any] | None = None, **arguments: Any) -> Tensor:
    """The kernels' side of `hstu_compile::hstu_attention`; the keywords are those of `Call`, all required.

    memory: the same for all calls, and no others, whose launches differ at most in addresses and their extent.
    """
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if out.numel():
        arguments["attn_mask"] = readable_mask(arguments["attn_mask"])

        def launches(workspace: Workspace) -> list[Launch]:
            call = Call(q, k, v, workspace, **arguments)
            call.product(call.tiles.forward, out, call.scale, x=q, y=k, z=v)
            call.zero_tail(out)
            return call.launches

        run(memory, "forward", [q, k, v, out, *given_tensors(arguments)], extent_of(q, arguments), launches)
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    needs_bias_grad: bool,
    memory: dict[Hashable, Any] | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and, if asked for, dbias in the shape of attn_bias; see `forward`."""
    dq, dk, dv = grads = tuple([torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)])
    into = [(grad, None) for grad in grads]
    dbias = silu_backward(dout, q, k, v, into, memory=memory, needs_bias_grad=needs_bias_grad, **arguments)
    return dq, dk, dv, dbias


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
    **arguments: Any,
) -> Tensor | None:
    """The gradients of q, k and v, or of what they are the silu of, of u and the bias: see attention_sm90."""
    bias = arguments["attn_bias"] if needs_bias_grad else None
    dbias = None if bias is None else empty_bias_grad(bias)
    if not q.numel():
        return None if dbias is None else dbias.zero_().to(bias.dtype)
    arguments["attn_mask"] = readable_mask(arguments["attn_mask"])
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads, silu_of = zip(*into, strict=True)
    du, into_u = (None, ()) if of_u is None else (evenly_apart(of_u[0]), of_u[1])
    extent = extent_of(q, arguments)

    def launches(workspace: Workspace) -> list[Launch]:
        call = Call(q, k, v, workspace, **arguments)
        call.gradients(dout, *grads)
        for grad, of in into:
            if of is not None:
                call.launches.append(silu_backward_launch(grad, (grad, of), extent))
        call.zero_tail(*grads)
        if du is not None:
            call.launches.append(silu_backward_launch(du, into_u, extent))
        if dbias is not None and dbias.numel():
            call.dbias(call.tiles.dbias, dout, dbias)
        return call.launches

    given = [dout, *grads, *silu_of, du, *into_u]
    layouts = [None if t is None else (t.dtype, t.shape[1:], t.stride()) for t in given]
    tensors = [q, k, v, *given, dbias, *given_tensors(arguments)]
    run(memory, (*layouts, dbias is None), tensors, extent, launches)
    return None if dbias is None else dbias.to(bias.dtype)


def readable_mask(mask: TiledMask | None) -> TiledMask | None:
    """With numbers for bools."""
    if mask is None or mask.cells.dtype != torch.bool:
        return mask
    return mask._replace(cells=mask.cells.view(torch.uint8))


class Call:
    """One call's arguments as the kernels take them, and its launches so far."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        workspace: Workspace,
        *,
        seq_offsets: Tensor | None,
        seq_lengths: Tensor | None,
        num_targets: Tensor | None,
        num_contextuals: Tensor | None,
        attn_mask: TiledMask | None,
        attn_bias: Tensor | None,
        max_seq_len: int,
        alpha: float,
        scale: float,
        causal: bool,
        contextual_seq_len: int,
        target_group_size: int,
        max_attn_len: int,
        min_full_attn_seq_len: int,
        targets_share_position: bool,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.workspace = workspace
        self.launches: list[Launch] = []
        self.num_sequences = workspace.extent.sequences
        self.num_heads, attn_dim = q.shape[-2:]
        has_cells = attn_mask is not None or attn_bias is not None
        gpu = capability_and_memory(q.device)
        self.tiles = tiles_for(q.dtype, max(attn_dim, v.shape[-1]), *gpu, has_cells=has_cells)
        self.extent = workspace.extent
        self.attn_mask = attn_mask
        self.attn_bias = attn_bias
        self.lists: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = {}
        per_sequence = (seq_offsets, seq_lengths, num_targets, num_contextuals)
        self.sequences = {
            "num_sequences": self.num_sequences,
            "sequences": Sequences(*(None if t is None else t.contiguous() for t in per_sequence)),
            "family": family_of(
                causal,
                num_contextuals is not None or contextual_seq_len != 0,
                num_targets is not None,
                max_attn_len != 0,
                targets_share_position and num_targets is not None,
            ),
            "N": max_seq_len,
            "num_heads": self.num_heads,
            "contextual_seq_len": contextual_seq_len,
            "target_group_size": target_group_size,
            "max_attn_len": max_attn_len,
            "min_full_attn_seq_len": min_full_attn_seq_len,
        }
        self.alpha, self.scale = float(alpha), float(scale)
        self.shared = {
            **self.sequences,
            "mask": None if attn_mask is None else self.cells(attn_mask.cells),
            "bias": None if attn_bias is None else self.cells(attn_bias),
            "alpha": self.alpha,
            "FAST": q.is_cuda and q.element_size() == 2,
        }

    def cells(self, t: Tensor) -> Cells:
        return cells_of(t, self.num_sequences, self.num_heads)

    def launch(self, kernel: Any, kept: int, tile: Tile, **arguments: Any) -> None:
        """For tiles of so many rows of the kept side, of every head."""
        sizes = functools.partial(kept_sizes, self.sequences["sequences"].offsets is not None, self.num_heads, kept)
        programs, numbers = sizes(self.extent)
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        self.launches.append(Launch(kernel, programs, (), arguments | numbers | options, sizes))

    def launch_over_bias(self, kernel: Any, programs: int, tile: Tile, **arguments: Any) -> None:
        """For tiles of the bias, which has the same sizes in all calls of a kind."""
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        self.launches.append(Launch(kernel, programs, (), arguments | options))

    def zero_tail(self, *outs: Tensor) -> None:
        """Rows of no sequence."""
        offsets = self.sequences["sequences"].offsets
        if offsets is not None:
            self.launches.append(zero_launch(outs, offsets, self.extent))

    def occupied(self, rows: int, cols: int, *, by_keys: bool) -> dict[str, Any]:
        """Lists of the mask tensor's occupied tiles, made once: a line for `rows` queries each, or for `cols` keys."""
        if self.attn_mask is None:
            return {"visits": None, "ranks": None, "mask_batches": 1, "mask_heads": 1}
        key = rows, cols, by_keys
        if key not in self.lists:
            sizes = (cols, rows) if by_keys else (rows, cols)
            launch, *self.lists[key] = list_tiles(self.attn_mask, *sizes, self.workspace, by_keys=by_keys)
            self.launches.append(launch)
        visits, ranks = self.lists[key]
        return {"visits": visits, "ranks": ranks, "mask_batches": visits.shape[0], "mask_heads": visits.shape[1]}

    def product(
        self,
        tile: Tile,
        out: Tensor,
        scale: float,
        *,
        x: Tensor,
        y: Tensor,
        z: Tensor | None = None,
        dx: Tensor | None = None,
        dy: Tensor | None = None,
        by_keys: bool = False,
    ) -> None:
        """out from `product_kernel`; by keys, the tile's rows are keys and its columns queries."""
        kept, streamed = tile.rows, tile.cols
        operands = {"x_rows": x, "y_rows": y, "dx_rows": dx, "dy_rows": dy, "z_rows": z, "out_rows": out}
        self.launch(
            product_kernel,
            kept,
            tile,
            **self.shared,
            **{name: None if t is None else rows_of(t) for name, t in operands.items()},
            **self.occupied(*((streamed, kept) if by_keys else (kept, streamed)), by_keys=by_keys),
            scale=scale,
            BY_KEYS=by_keys,
            KEPT=kept,
            STREAMED=streamed,
        )

    def gradients(self, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        q, k, v = self.q, self.k, self.v
        self.product(self.tiles.dq, dq, self.alpha * self.scale, x=q, y=k, dx=dout, dy=v)
        if self.tiles.dk_dv is None:
            self.product(self.tiles.forward, dv, self.scale, by_keys=True, x=k, y=q, z=dout)
            self.product(self.tiles.dq, dk, self.alpha * self.scale, by_keys=True, x=k, y=q, dx=v, dy=dout)
        else:
            self.dk_dv(self.tiles.dk_dv, dout, dk, dv)

    def dk_dv(self, tile: Tile, dout: Tensor, dk: Tensor, dv: Tensor) -> None:
        operands = {
            "q_rows": self.q,
            "k_rows": self.k,
            "v_rows": self.v,
            "dout_rows": dout,
            "dk_rows": dk,
            "dv_rows": dv,
        }
        self.launch(
            dk_dv_kernel,
            tile.cols,
            tile,
            **self.shared,
            **{name: rows_of(t) for name, t in operands.items()},
            **self.occupied(tile.rows, tile.cols, by_keys=True),
            scale=self.scale,
            ROWS=tile.rows,
            COLS=tile.cols,
        )

    def sharers(self, tile: Tile, counter: Tensor | None = None) -> dict[str, Any]:
        """Which sequences and heads share each tile of the bias: the lists of `sharers_kernel`."""
        batches, heads, N, _ = self.attn_bias.shape
        tiles = batches * heads * triton.cdiv(N, tile.rows) * triton.cdiv(N, tile.cols)
        most = self.num_sequences // batches * (self.num_heads // heads)
        lists = {
            "sharers_ptr": self.workspace.empty(torch.int32, (tiles, most)),
            "counts_ptr": self.workspace.empty(torch.int32, (tiles,)),
        }
        lists |= {"bias_batches": batches, "bias_heads": heads, "ROWS": tile.rows, "COLS": tile.cols}
        occupied = self.occupied(tile.rows, tile.cols, by_keys=False)
        arguments = {**self.sequences, **lists, **occupied, "counter_ptr": counter}
        self.launch_over_bias(sharers_kernel, tiles, tile._replace(num_warps=1), **arguments)
        return lists

    def dbias(self, tile: Tile, dout: Tensor, dbias: Tensor) -> None:
        """One program for every tile of the bias, which streams the sequences and heads that share it."""
        lists = self.sharers(tile)
        operands = {"q_rows": self.q, "k_rows": self.k, "v_rows": self.v, "dout_rows": dout}
        self.launch_over_bias(
            dbias_kernel,
            lists["counts_ptr"].numel(),
            tile,
            **self.shared,
            **lists,
            **{name: rows_of(t) for name, t in operands.items()},
            dbias_cells=self.cells(dbias),
            scale=self.scale,
            CHUNK=CHUNK,
        )


def kept_sizes(jagged: bool, heads: int, rows: int, extent: Extent) -> tuple[int, dict[str, int]]:
    slots = slots_of(jagged, rows, extent)
    sizes = {"slots_per_seq": slots.slots_per_seq, "num_sequences": extent.sequences, "N": extent.max_seq_len}
    return slots.number * heads, sizes


def empty_bias_grad(bias: Tensor) -> Tensor:
    """Contiguous, of at most four bytes a cell."""
    return torch.empty(bias.shape, dtype=bias.dtype if bias.element_size() <= 4 else torch.float32, device=bias.device)


def rows_of(t: Tensor) -> Rows:
    *batch_stride, row_stride, head_stride, _ = t.stride()
    return Rows(t, batch_stride[0] if batch_stride else 0, row_stride, head_stride, *widths(t.shape[-1]))


def cells_of(t: Tensor, num_sequences: int, num_heads: int) -> Cells:
    """[B|1, H|1, N, N] as the kernels take it: at most four bytes a cell."""
    if t.element_size() > 4:
        t = t.float()
    strides = t.expand(num_sequences, num_heads, *t.shape[-2:]).stride()
    return Cells(t, *strides, constant(16 if t.shape[-1] % 16 == 0 else 1))


@functools.lru_cache(maxsize=None, typed=True)  # typed: True is not 1
def constant(value: int | bool) -> tl.constexpr:
    """One object a value: Triton finds a compiled kernel sooner by identity than by comparing."""
    return tl.constexpr(value)


@functools.cache
def widths(dim: int) -> tuple[tl.constexpr, tl.constexpr]:
    """A head dimension and the width in which tl.dot takes it."""
    return constant(dim), constant(max(16, triton.next_power_of_2(dim)))


@functools.cache
def family_of(causal: bool, contextual: bool, targets: bool, window: bool, shared: bool) -> Family:
    return Family(constant(causal), constant(contextual), constant(targets), constant(window), constant(shared))


@functools.cache
def capability_and_memory(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory that one program may use."""
    if device.type != "cuda":  # the Triton interpreter
        return (0, 0), 0
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin
