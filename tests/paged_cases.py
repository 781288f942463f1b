"""Sequences cut into a paged history and new tokens, with NaN and garbage wherever the paged ops have no business."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import FORWARD, assert_within_budget
from torch import Tensor

from hstu_compile.ops.hstu_attention_reference import hstu_attention_reference

H = 2
NEW = [0, 5, 1, 17, 40, 64, 33, 70, 2, 9, 0]
TARGETS = [0, 5, 0, 16, 8, 60, 33, 5, 1, 0, 0]
CONTEXTUALS = [0, 0, 1, 3, 0, 70, 2, 5, 0, 12, 0]
MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"causal": False},
    "targets": {"num_targets": TARGETS},
    "target groups": {"num_targets": TARGETS, "target_group_size": 3},
    "contextual": {"num_contextuals": CONTEXTUALS},
    "one contextual count": {"contextual_seq_len": 4, "num_targets": TARGETS},
    "window": {"max_attn_len": 30},
    "window, targets": {"max_attn_len": 19, "num_targets": TARGETS, "target_group_size": 20},
    "min full": {
        "max_attn_len": 23,
        "min_full_attn_seq_len": 20,
        "num_targets": TARGETS,
        "targets_share_position": True,
    },
    "everything": {
        "num_targets": TARGETS,
        "target_group_size": 4,
        "num_contextuals": CONTEXTUALS,
        "max_attn_len": 16,
        "min_full_attn_seq_len": 11,
        "targets_share_position": True,
    },
}


def cached_around(page_size: int) -> list[int]:
    """Histories that are empty, end at a page's border or beside it, or are longer than all new tokens."""
    p = page_size
    return [7, 0, 1, p - 1, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 200, 0]


class Case(NamedTuple):
    new: list[Tensor]  # q, k, v
    pool: Tensor
    page_table: Tensor
    cached_lengths: Tensor
    seq_offsets: Tensor
    arguments: dict[str, Any]
    whole: list[Tensor]  # q, k, v of whole sequences, jagged
    whole_offsets: Tensor
    rows: Tensor  # those of new tokens in `whole`
    unused: int  # rows of `new` that belong to no sequence

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return *self.new, self.pool, self.page_table, self.cached_lengths


def make_case(
    page_size: int,
    dtype: torch.dtype = torch.float32,
    mask: str = "causal",
    *,
    dim: int = 32,
    device: str = "cpu",
    new: list[int] = NEW,
    cached: list[int] | None = None,
    unused: int = 3,
    layout: str = "packed",
) -> Case:
    cached = cached_around(page_size) if cached is None else cached
    lengths = torch.tensor(cached) + torch.tensor(new)
    whole_offsets = F.pad(lengths.cumsum(0), (1, 0))
    starts = whole_offsets[:-1]
    rows = torch.cat([torch.arange(int(s) + c, int(s) + c + n) for s, c, n in zip(starts, cached, new, strict=True)])
    whole = [torch.randn(int(whole_offsets[-1]), H, dim, device=device, dtype=torch.float32).to(dtype) for _ in "qkv"]
    total = len(rows) + unused
    nan = float("nan")
    if layout == "packed":
        buffer = torch.full((total, 4, H, dim), nan, dtype=dtype, device=device)
        new_tensors = [buffer[:, 2], buffer[:, 3], buffer[:, 1]]
    else:  # interleaved: heads outermost in the row
        buffer = torch.full((total, H, 4 * dim), nan, dtype=dtype, device=device)
        new_tensors = [buffer[..., i * dim : (i + 1) * dim] for i in (2, 3, 1)]
    for mine, all_rows in zip(new_tensors, whole, strict=True):
        mine[: len(rows)] = all_rows[rows.to(device)]
    pool, page_table = paged(whole[1:], starts.tolist(), cached, page_size)
    longest = max([0, *lengths.tolist()])
    arguments = {"max_seq_len": longest + 2, "alpha": dim**-0.5, "scaling_seq_len": 40.0, **MASKS[mask]}
    return Case(
        new_tensors,
        pool,
        page_table,
        torch.tensor(cached, device=device, dtype=torch.int32),
        F.pad(torch.tensor(new).cumsum(0), (1, 0)).to(device),
        {n: torch.tensor(x, device=device) if isinstance(x, list) else x for n, x in arguments.items()},
        whole,
        whole_offsets.to(device),
        rows.to(device),
        unused,
    )


def paged(kv: list[Tensor], starts: list[int], cached: list[int], page_size: int) -> tuple[Tensor, Tensor]:
    """A pool with the histories in pages in random order, NaN elsewhere, and its table, garbage elsewhere."""
    used = [-(-c // page_size) for c in cached]
    max_pages, num_pages = max([0, *used]) + 2, sum(used) + 3
    order = torch.randperm(num_pages).tolist()
    device = kv[0].device
    pool = torch.full((num_pages, 2, page_size, *kv[0].shape[1:]), float("nan"), dtype=kv[0].dtype, device=device)
    table = torch.randint(-(2**31), 2**31 - 1, (len(cached), max_pages), dtype=torch.int32)
    for z, (start, length) in enumerate(zip(starts, cached, strict=True)):
        for i in range(used[z]):
            table[z, i] = page = order.pop()
            rows = slice(start + i * page_size, start + min((i + 1) * page_size, length))
            for side, tensor in enumerate(kv):
                pool[page, side, : rows.stop - rows.start] = tensor[rows]
    return pool, table.to(device)


def assert_attention(out: Tensor, case: Case) -> None:
    """Within the budget of unpaged eager attention of the whole sequences; 0 in rows of no sequence."""
    used = len(case.rows)
    double = [t.double() for t in case.whole]
    arguments = {"seq_offsets": case.whole_offsets, **case.arguments}
    reference = hstu_attention_reference(*double, **arguments)[case.rows]
    eager = eager_attention(*case.whole, **arguments)[case.rows]
    assert out.shape == case.new[0].shape and out.dtype == case.new[0].dtype and out.is_contiguous()
    assert_within_budget(out[:used], eager, reference, FORWARD)
    assert (out[used:] == 0).all()


def append_case(case: Case, valid: int | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of append_kv for a table with pages for all new history, and the pool as it has to be after it.

    valid: so many of the new tokens are there already.
    """
    page_size = case.pool.shape[2]
    targets = case.arguments.get("num_targets", torch.zeros_like(case.cached_lengths))
    lengths = (case.cached_lengths + case.seq_offsets.diff() - targets).tolist()
    starts = case.whole_offsets[:-1].tolist()
    after, table = paged(case.whole[1:], starts, lengths, page_size)
    before = after.clone()
    for z, (cached, length) in enumerate(zip(case.cached_lengths.tolist(), lengths, strict=True)):
        for position in range(cached, length):
            before[table[z, position // page_size], :, position % page_size] = float("nan")
    arguments = {"seq_offsets": case.seq_offsets, "page_table": table, "cached_lengths": case.cached_lengths}
    if "num_targets" in case.arguments:
        arguments["num_targets"] = case.arguments["num_targets"]
    if valid is not None:
        arguments["valid_lengths"] = case.cached_lengths + valid
        for z, length in enumerate(lengths):
            full = min(int(arguments["valid_lengths"][z]) // page_size, -(-length // page_size))
            pages = table[z, int(case.cached_lengths[z]) // page_size : full].long()
            after[pages] = before[pages]
    return {"pool": before, "k": case.new[1], "v": case.new[2], **arguments}, after


def silu_append_case(case: Case, valid: int | None = None) -> dict[str, Any]:
    """Arguments of silu_append_kv: x, of which k and v of the case are slices; half of the rest of it is NaN."""
    arguments, _ = append_case(case, valid)
    for name in "kv":
        t = arguments.pop(name)
        arguments |= {f"{name}_at": t.storage_offset(), f"{name}_head_stride": t.stride(1)}
    base = case.new[1]._base
    assert base is not None
    x = base.flatten(1).clone()
    others = torch.randn(x.shape, dtype=torch.float32).to(x)
    arguments["x"] = torch.where(x.isnan() & (torch.rand(x.shape) < 0.5).to(x.device), others, x)
    return arguments


def slice_of(arguments: dict[str, Any], name: str, x: Tensor) -> Tensor:
    """k or v, in x."""
    heads, dim = arguments["pool"].shape[-2:]
    strides = (x.stride(0), arguments[f"{name}_head_stride"], 1)
    return x.as_strided((len(x), heads, dim), strides, x.storage_offset() + arguments[f"{name}_at"])


def bits(t: Tensor) -> Tensor:
    """To compare: as they are in memory, but for which NaN a NaN is."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(t.isnan(), float("nan"), t).view(integers[t.element_size()])
