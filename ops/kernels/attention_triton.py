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

from hstu_compile.ops.kernels.attention_tiles import Cells, Rows, Sequences
from hstu_compile.ops.kernels.attention_triton_dbias import dbias_kernel, sharers_kernel
from hstu_compile.ops.kernels.attention_triton_kernels import dk_dv_kernel, product_kernel
from hstu_compile.ops.kernels.attention_triton_tiles import Tile, tiles_for
from hstu_compile.ops.kernels.launch import Extent
from hstu_compile.ops.kernels.mask_occupancy import TiledMask, occupied_tiles
from hstu_compile.ops.kernels.mask_tiles import Family
from hstu_compile.ops.kernels.silu_backward import Into, silu_backward_launch
from hstu_compile.ops.kernels.slots import Slots, slots_of
from hstu_compile.ops.kernels.strides import evenly_apart
from hstu_compile.ops.kernels.zero_tail import zero_tail

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

    memory: see `attention_sm90`; nothing is remembered here.
    """
    call = Call(q, k, v, **arguments)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    call.product(call.tiles.forward, out, call.scale, x=q, y=k, z=v)
    zero_tail((out,), arguments["seq_offsets"])
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
    call = Call(q, k, v, **arguments)
    dq, dk, dv = (t.new_empty(t.shape) for t in (q, k, v))
    dout = call.gradients(dout, dq, dk, dv)
    zero_tail((dq, dk, dv), arguments["seq_offsets"])
    return dq, dk, dv, call.dbias(call.tiles.dbias, dout) if needs_bias_grad else None


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
    call = Call(q, k, v, **arguments)
    grads = tuple(grad for grad, _ in into)
    dout = call.gradients(dout, *grads)
    with torch.cuda.device_of(q):
        for grad, silu_of in into:
            if silu_of is not None:
                silu_backward_launch(grad, (grad, silu_of), call.extent)()
        zero_tail(grads, arguments["seq_offsets"])
        if of_u is not None:
            du, into_u = of_u
            silu_backward_launch(evenly_apart(du), into_u, call.extent)()
    return call.dbias(call.tiles.dbias, dout) if needs_bias_grad else None


class Call:
    """One call's arguments as the kernels take them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
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
        self.num_sequences = q.shape[0] if seq_offsets is None else seq_offsets.shape[0] - 1
        self.num_heads, attn_dim = q.shape[-2:]
        has_cells = attn_mask is not None or attn_bias is not None
        gpu = capability_and_memory(q.device)
        self.tiles = tiles_for(q.dtype, max(attn_dim, v.shape[-1]), *gpu, has_cells=has_cells)
        self.max_seq_len = max_seq_len
        self.extent = Extent(q.shape[0], self.num_sequences, max_seq_len)
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
        if t.dtype == torch.bool:
            t = t.view(torch.uint8)
        return cells_of(t, self.num_sequences, self.num_heads)

    def occupied(self, rows: int, cols: int, *, by_keys: bool) -> dict[str, Any]:
        """Lists of the mask tensor's occupied tiles, made once: a line for `rows` queries each, or for `cols` keys."""
        if self.attn_mask is None:
            return {"visits": None, "ranks": None, "mask_batches": 1, "mask_heads": 1}
        key = rows, cols, by_keys
        if key not in self.lists:
            mask, *sizes = (self.attn_mask.mT, cols, rows) if by_keys else (self.attn_mask, rows, cols)
            self.lists[key] = occupied_tiles(mask, *sizes)
        visits, ranks = self.lists[key]
        return {"visits": visits, "ranks": ranks, "mask_batches": visits.shape[0], "mask_heads": visits.shape[1]}

    def slots(self, kept: int) -> Slots:
        """For tiles of the kept side."""
        return slots_of(self.sequences["sequences"].offsets is not None, kept, self.extent)

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
        slots = self.slots(kept)
        operands = {"x_rows": x, "y_rows": y, "dx_rows": dx, "dy_rows": dy, "z_rows": z, "out_rows": out}
        launch(
            product_kernel,
            self.q,
            slots.number * self.num_heads,
            tile,
            slots_per_seq=slots.slots_per_seq,
            **self.shared,
            **{name: None if t is None else rows_of(t) for name, t in operands.items()},
            **self.occupied(*((streamed, kept) if by_keys else (kept, streamed)), by_keys=by_keys),
            scale=scale,
            BY_KEYS=by_keys,
            KEPT=kept,
            STREAMED=streamed,
        )

    def gradients(self, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """dq, dk and dv; returns dout as the kernels read it."""
        q, k, v = self.q, self.k, self.v
        if dout.stride(-1) != 1:
            dout = dout.contiguous()
        self.product(self.tiles.dq, dq, self.alpha * self.scale, x=q, y=k, dx=dout, dy=v)
        if self.tiles.dk_dv is None:
            self.product(self.tiles.forward, dv, self.scale, by_keys=True, x=k, y=q, z=dout)
            self.product(self.tiles.dq, dk, self.alpha * self.scale, by_keys=True, x=k, y=q, dx=v, dy=dout)
        else:
            self.dk_dv(self.tiles.dk_dv, dout, dk, dv)
        return dout

    def dk_dv(self, tile: Tile, dout: Tensor, dk: Tensor, dv: Tensor) -> None:
        slots = self.slots(tile.cols)
        operands = {
            "q_rows": self.q,
            "k_rows": self.k,
            "v_rows": self.v,
            "dout_rows": dout,
            "dk_rows": dk,
            "dv_rows": dv,
        }
        launch(
            dk_dv_kernel,
            self.q,
            slots.number * self.num_heads,
            tile,
            slots_per_seq=slots.slots_per_seq,
            **self.shared,
            **{name: rows_of(t) for name, t in operands.items()},
            **self.occupied(tile.rows, tile.cols, by_keys=True),
            scale=self.scale,
            ROWS=tile.rows,
            COLS=tile.cols,
        )

    def sharers(self, tile: Tile) -> dict[str, Any]:
        """Which sequences and heads share each tile of the bias: the lists of `sharers_kernel`."""
        batches, heads, N, _ = self.attn_bias.shape
        tiles = batches * heads * triton.cdiv(N, tile.rows) * triton.cdiv(N, tile.cols)
        counts = torch.empty(tiles, dtype=torch.int32, device=self.q.device)
        sharers = counts.new_empty(tiles, self.num_sequences // batches * (self.num_heads // heads))
        lists = {"sharers_ptr": sharers, "counts_ptr": counts}
        lists |= {"bias_batches": batches, "bias_heads": heads, "ROWS": tile.rows, "COLS": tile.cols}
        occupied = self.occupied(tile.rows, tile.cols, by_keys=False)
        launch(sharers_kernel, self.q, tiles, tile._replace(num_warps=1), **self.sequences, **lists, **occupied)
        return lists

    def dbias(self, tile: Tile, dout: Tensor) -> Tensor | None:
        """One program for every tile of the bias, if any, which streams the sequences and heads that share it."""
        if self.attn_bias is None:
            return None
        dbias = empty_bias_grad(self.attn_bias)
        if dbias.numel():
            lists = self.sharers(tile)
            operands = {"q_rows": self.q, "k_rows": self.k, "v_rows": self.v, "dout_rows": dout}
            launch(
                dbias_kernel,
                self.q,
                lists["counts_ptr"].numel(),
                tile,
                **self.shared,
                **lists,
                **{name: rows_of(t) for name, t in operands.items()},
                dbias_cells=self.cells(dbias),
                scale=self.scale,
                CHUNK=CHUNK,
            )
        return dbias.to(self.attn_bias.dtype)


def empty_bias_grad(bias: Tensor) -> Tensor:
    """Contiguous, of at most four bytes a cell."""
    return torch.empty(bias.shape, dtype=bias.dtype if bias.element_size() <= 4 else torch.float32, device=bias.device)


def launch(kernel: Any, like: Tensor, programs: int, tile: Tile, **arguments: Any) -> None:
    if programs == 0:
        return
    with torch.cuda.device_of(like):
        kernel[(programs,)](**arguments, num_warps=tile.num_warps, num_stages=tile.num_stages)


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
