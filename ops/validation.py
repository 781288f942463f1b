"""Argument checks of the attention op. Every message names the argument, its value and what was expected."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hstu_compile.ops.mask_tile_states import mask_tile_states as tile_states
from hstu_compile.ops.mask_tile_states import tile_states_shape

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_checked_everywhere = False


@contextlib.contextmanager
def values_checked() -> Iterator[None]:
    """Inside, the values of offsets, lengths and counts are checked on a GPU too, at the price of a wait for it."""
    global _checked_everywhere
    before, _checked_everywhere = _checked_everywhere, True
    try:
        yield
    finally:
        _checked_everywhere = before


def checks_values(device: torch.device) -> bool:
    return device.type == "cpu" or _checked_everywhere


def expect(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"hstu_attention: {name} is {value}, expected {expected}")


def expect_same(actual, expected, name: str, value: object, text: Callable[[], str]) -> None:
    # Sizes may be symbolic: torch._check records the equality instead of specialising to it.
    if isinstance(actual, int) and isinstance(expected, int):
        if actual != expected:
            expect(False, name, value, text())
    else:
        torch._check(actual == expected, lambda: f"hstu_attention: {name} is {value}, expected {text()}")


def check_attention_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seq_offsets: Tensor | None,
    seq_lengths: Tensor | None,
    num_targets: Tensor | None,
    num_contextuals: Tensor | None,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    mask_tile_states: Tensor | None,
    max_seq_len: int,
    alpha: float,
    scaling_seq_len: float,
    causal: bool,
    contextual_seq_len: int,
    target_group_size: int,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    targets_share_position: bool,
) -> None:
    """Ranks, shapes, dtypes and devices; reads no tensor's content. In the way of every launch, hence messages late."""
    jagged = seq_offsets is not None
    rank = 3 if jagged else 4
    device, dtype, shape = q.device, q.dtype, q.shape
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != rank:
            layout = "[T, H, D] (seq_offsets given)" if jagged else "[B, N, H, D] (no seq_offsets)"
            expect(False, f"the shape of {name}", tuple(t.shape), layout)
        if t.dtype not in DTYPES:
            expect(False, f"the dtype of {name}", t.dtype, "float32, float16 or bfloat16")
        if t.dtype != dtype:
            expect(False, f"the dtype of {name}", t.dtype, f"that of q, {dtype}")
        if t.device != device:
            expect(False, f"the device of {name}", t.device, f"that of q, {device}")
        if t is not q:
            for size, wanted in zip(t.shape[:-1], shape[:-1], strict=True):
                expect_same(
                    size, wanted, f"the shape of {name}", tuple(t.shape), lambda: f"{tuple(shape[:-1])} as in q"
                )
    expect_same(k.shape[-1], shape[-1], "the shape of k", tuple(k.shape), lambda: f"that of q, {tuple(shape)}")

    if seq_offsets is not None:
        expect(seq_lengths is None, "seq_lengths", "given", "None when seq_offsets are given")
        batch = seq_offsets.shape[0] - 1
    else:
        batch = shape[0]
        expect_same(shape[1], max_seq_len, "max_seq_len", max_seq_len, lambda: f"N = {shape[1]} of the dense q")
    for name, count in (
        ("seq_offsets", seq_offsets),
        ("seq_lengths", seq_lengths),
        ("num_targets", num_targets),
        ("num_contextuals", num_contextuals),
    ):
        if count is None:
            continue
        if count.dim() != 1:
            expect(False, f"the shape of {name}", tuple(count.shape), "one dimension")
        if count.dtype not in (torch.int32, torch.int64):
            expect(False, f"the dtype of {name}", count.dtype, "int32 or int64")
        if count.device != device:
            expect(False, f"the device of {name}", count.device, f"that of q, {device}")
        if count is seq_offsets:
            if isinstance(batch, int) and batch < 0:
                expect(False, "the shape of seq_offsets", tuple(count.shape), "[B + 1]")
        else:
            expect_same(count.shape[0], batch, f"the shape of {name}", tuple(count.shape), lambda: f"[B] = [{batch}]")
    for name, plane in (("attn_mask", attn_mask), ("attn_bias", attn_bias)):
        if plane is not None:
            _check_plane(name, plane, (batch, shape[-2], max_seq_len, max_seq_len), device)
    if attn_bias is not None:
        expect(attn_bias.is_floating_point(), "the dtype of attn_bias", attn_bias.dtype, "a floating point dtype")
    if attn_mask is not None:
        expect(not attn_mask.requires_grad, "attn_mask.requires_grad", True, "False: the mask has no gradient")
    _check_tile_states(attn_mask, mask_tile_states)
    # Symbolic sizes are left to the launch: a comparison here would specialise the graph.
    for name, value, least in (
        ("contextual_seq_len", contextual_seq_len, 0),
        ("target_group_size", target_group_size, 1),
        ("max_attn_len", max_attn_len, 0),
        ("min_full_attn_seq_len", min_full_attn_seq_len, 0),
        ("max_seq_len", max_seq_len, 0),
    ):
        if isinstance(value, int) and value < least:
            expect(False, name, value, f"at least {least}")
    expect(not isinstance(scaling_seq_len, (int, float)) or scaling_seq_len != 0, "scaling_seq_len", 0, "not 0")


def _check_plane(name: str, plane: Tensor, sizes: tuple, device: torch.device) -> None:
    """A mask or bias is [B|1, H|1, N, N]."""
    expect(plane.dim() == 4, f"the shape of {name}", tuple(plane.shape), "[B|1, H|1, N, N]")
    expect(plane.device == device, f"the device of {name}", plane.device, f"that of q, {device}")
    for dim, (size, full) in enumerate(zip(plane.shape, sizes, strict=True)):
        if not (dim < 2 and isinstance(size, int) and size == 1):
            expect_same(
                size,
                full,
                f"the shape of {name}",
                tuple(plane.shape),
                lambda: f"[B|1, H|1, {sizes[-1]}, {sizes[-1]}]",
            )


def _check_tile_states(attn_mask: Tensor | None, states: Tensor | None) -> None:
    if attn_mask is None or states is None:
        both = "both of attn_mask and mask_tile_states, or neither"
        expect(attn_mask is states, "mask_tile_states", "missing" if states is None else "given", both)
        return
    expect(states.dtype == torch.uint8, "the dtype of mask_tile_states", states.dtype, "uint8")
    expect(states.device == attn_mask.device, "the device of mask_tile_states", states.device, "that of attn_mask")
    expect(states.dim() == 4, "the shape of mask_tile_states", tuple(states.shape), "[B|1, H|1, tiles, tiles]")
    wanted = tile_states_shape(attn_mask)
    for size, full in zip(states.shape, wanted, strict=True):
        expect_same(
            size, full, "the shape of mask_tile_states", tuple(states.shape), lambda: f"{wanted}, for that attn_mask"
        )


def check_attention_values(
    q: Tensor,
    *,
    seq_offsets: Tensor | None,
    seq_lengths: Tensor | None,
    num_targets: Tensor | None,
    num_contextuals: Tensor | None,
    attn_mask: Tensor | None,
    mask_tile_states: Tensor | None,
    max_seq_len: int,
    contextual_seq_len: int,
    **_others,
) -> None:
    """Offsets, lengths and counts themselves, and whether the states of the mask's tiles are its own.

    On a GPU this waits for the device: only the debug option does it.
    """
    if attn_mask is not None and mask_tile_states is not None:
        own = torch.equal(mask_tile_states, tile_states(attn_mask))
        expect(own, "mask_tile_states", "of another mask", "those of attn_mask")
    if seq_offsets is not None:
        offsets = seq_offsets.tolist()
        expect(offsets[0] == 0, "seq_offsets[0]", offsets[0], "0")
        lengths = seq_offsets.diff()
        decrease = lengths.lt(0).nonzero().flatten().tolist()
        expect(
            not decrease,
            f"seq_offsets[{decrease[0] + 1 if decrease else 0}]",
            f"below the one before: {offsets}",
            "no decrease",
        )
        expect(offsets[-1] <= q.shape[0], "seq_offsets[-1]", offsets[-1], f"at most T = {q.shape[0]}")
    elif seq_lengths is not None:
        lengths = seq_lengths
        expect(bool((lengths >= 0).all()), "seq_lengths", lengths.tolist(), "no negative length")
    else:
        lengths = torch.full((q.shape[0],), max_seq_len, device=q.device)
    if lengths.numel() == 0:
        return
    longest = int(lengths.max())
    expect(longest <= max_seq_len, "max_seq_len", max_seq_len, f"at least the longest sequence, {longest}")
    targets = torch.zeros_like(lengths) if num_targets is None else num_targets
    contextual = torch.full_like(lengths, contextual_seq_len) if num_contextuals is None else num_contextuals
    expect(bool((targets >= 0).all()), "num_targets", targets.tolist(), "no negative count")
    expect(bool((contextual >= 0).all()), "num_contextuals", contextual.tolist(), "no negative count")
    expect(bool((targets <= lengths).all()), "num_targets", targets.tolist(), f"at most the lengths {lengths.tolist()}")
