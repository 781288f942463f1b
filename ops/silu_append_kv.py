"""`hstu_compile::silu_append_kv`: silu of a projection where it stands, its keys and values into the pages of a cache.

`silu_` and `append_kv` in one launch, for projections so small that launches are what they cost.
"""

import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from hstu_compile.ops.call_kinds import Kinds
from hstu_compile.ops.composite import register_inference_only
from hstu_compile.ops.packed_slices import Slice
from hstu_compile.ops.paged_call import paged_features
from hstu_compile.ops.paged_validation import check_pages, check_per_sequence
from hstu_compile.ops.validation import expect

# k and v are told by their places: views of x, which is written, could not be arguments beside it.
torch.library.define(
    "hstu_compile::silu_append_kv",
    "(Tensor(a!) x, Tensor(b!) pool, int k_at, int k_head_stride, int v_at, int v_head_stride, Tensor seq_offsets, "
    "Tensor page_table, Tensor cached_lengths, Tensor? num_targets, Tensor? valid_lengths) -> ()",
)


def silu_append_kv(
    x: Tensor,
    pool: Tensor,
    *,
    k_at: int,
    k_head_stride: int,
    v_at: int,
    v_head_stride: int,
    seq_offsets: Tensor,
    page_table: Tensor,
    cached_lengths: Tensor,
    num_targets: Tensor | None = None,
    valid_lengths: Tensor | None = None,
) -> None:
    """`silu_(x)`, then `append_kv(pool, k, v, ...)` of slices k and v of x, bit for bit; no gradient.

    Args:
        x: [T, W], the dtype of pool; the last dimension is contiguous. Rows beyond the last offset become their silu,
            too.
        pool: as in `append_kv`, [num_pages, 2, page_size, H, D].
        k_at, v_at: the first column of k and of v.
        k_head_stride, v_head_stride: columns from head to head, D or more. H of these steps are at most W.
        seq_offsets, page_table, cached_lengths, num_targets, valid_lengths: as in `append_kv`.

    Raises:
        ValueError: an argument does not fit; the message names it, its value and what was expected.
    """
    places = k_at, k_head_stride, v_at, v_head_stride
    paging = seq_offsets, page_table, cached_lengths, num_targets, valid_lengths
    torch.ops.hstu_compile.silu_append_kv(x, pool, *places, *paging)


def _slices(k_at: int, k_head_stride: int, v_at: int, v_head_stride: int) -> dict[str, Slice]:
    return {"k": Slice(k_at, k_head_stride, True), "v": Slice(v_at, v_head_stride, True)}


def _check(x, pool, *args) -> None:
    places, (seq_offsets, page_table, cached_lengths, num_targets, valid_lengths) = args[:4], args[4:]
    expect(x.dim() == 2, "the shape of x", tuple(x.shape), "[T, W]")
    expect(x.stride(-1) == 1 or x.shape[-1] == 1, "the strides of x", x.stride(), "the last one 1")
    expect(x.dtype == pool.dtype, "the dtype of x", x.dtype, f"that of pool, {pool.dtype}")
    expect(x.device == pool.device, "the device of x", x.device, f"that of pool, {pool.device}")
    expect(pool.dim() == 5, "the shape of pool", tuple(pool.shape), "[num_pages, 2, page_size, H, D]")
    heads, dim = pool.shape[-2:]
    for name, one in _slices(*places).items():
        what = f"{heads} heads of {dim} among the {x.shape[1]} columns of x"
        where = (one.at, one.head_stride)
        expect(one.is_in(x.shape[1], heads, dim), f"({name}_at, {name}_head_stride)", where, what)
    k, v = (one.of(x, heads, dim) for one in _slices(*places).values())
    check_pages(k, v, pool, page_table, cached_lengths, seq_offsets)
    check_per_sequence("num_targets", num_targets, seq_offsets)
    check_per_sequence("valid_lengths", valid_lengths, seq_offsets)


@torch.library.register_fake("hstu_compile::silu_append_kv")
def _silu_append_kv_fake(*args):
    _check(*args)


def _checked_kernel(x: Tensor, *args) -> ModuleType | None:
    _check(x, *args)
    if not x.is_cuda or x.dtype == torch.float64 or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("hstu_compile.ops.kernels.silu_append_kv")


_kinds = Kinds(_checked_kernel)


@torch.library.impl("hstu_compile::silu_append_kv", ("CPU", "CUDA"))
def _silu_append_kv(x, pool, *args):
    places, (seq_offsets, page_table, *per_sequence) = args[:4], args[4:]
    features = paged_features((x,), pool, page_table, (seq_offsets, *per_sequence))
    kind = _kinds.kind((features, places), x, pool, *args)
    if kind.kernel is None:
        torch.nn.functional.silu(x, inplace=True)
        k, v = (one.of(x, *pool.shape[-2:]) for one in _slices(*places).values())
        torch.ops.hstu_compile.append_kv(pool, k, v, seq_offsets, page_table, *per_sequence)
    else:
        kind.kernel.silu_append(x, pool, *args, memory=kind.memory)


register_inference_only("silu_append_kv")
