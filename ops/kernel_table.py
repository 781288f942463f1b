"""Which kernel runs an op: exact match on the architecture's major version, else the portable Triton kernel.

Never "the highest that is lower": sm_90a code does not run on sm_100.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

KERNELS = "hstu_compile.ops.kernels"
PORTABLE = "attention_triton"
REFERENCE = "plain PyTorch"
ATTENTION = {9: "attention_sm90"}  # capability's major version -> module
PAGED_PORTABLE = "paged_attention_triton"
PAGED = {9: "paged_attention_sm90"}

forced: str | None = None  # the one kernel that attention runs on, where a benchmark compares them


@dataclass(frozen=True)
class Choice:
    """The kernel module that will run, and why each faster one does not."""

    name: str
    declined: tuple[str, ...] = ()

    @property
    def is_reference(self) -> bool:
        return self.name == REFERENCE

    def module(self) -> ModuleType:
        return importlib.import_module(f"{KERNELS}.{self.name}")

    def __str__(self) -> str:
        return "; ".join((self.name, *self.declined))


@functools.cache
def choose_attention(
    device: torch.device, dtype: torch.dtype, attn_dim: int, hidden_dim: int, *, has_mask: bool, has_bias: bool
) -> Choice:
    """The fastest kernel that supports the call; the plain PyTorch reference where none does.

    Raises:
        ValueError: the kernel that is forced does not support the call.
    """
    call = {"dtype": dtype, "attn_dim": attn_dim, "hidden_dim": hidden_dim, "has_mask": has_mask, "has_bias": has_bias}
    return _choose(device, ATTENTION, PORTABLE, call)


@functools.cache
def choose_paged_attention(device: torch.device, dtype: torch.dtype, dim: int) -> Choice:
    """The same for attention over a paged history, which has kernels of its own."""
    return _choose(device, PAGED, PAGED_PORTABLE, {"dtype": dtype, "dim": dim})


def _choose(device: torch.device, by_major: dict[int, str], portable: str, call: dict[str, Any]) -> Choice:
    """Among one op's kernels; one that is forced may be another op's."""
    own = forced if forced in (REFERENCE, portable, *by_major.values()) else None
    choice = _best(device, by_major, portable, own, call)
    if own not in (None, choice.name):
        raise ValueError(f"hstu_compile: attention is forced to run on {own}, and cannot: {'; '.join(choice.declined)}")
    return choice


def _best(
    device: torch.device, by_major: dict[int, str], portable: str, own: str | None, call: dict[str, Any]
) -> Choice:
    if own == REFERENCE:
        return Choice(REFERENCE, ("forced",))
    if device.type != "cuda":
        return Choice(REFERENCE, (f"no kernel for device type {device.type}",))
    if importlib.util.find_spec("triton") is None:
        return Choice(REFERENCE, ("triton is not installed",))
    capability = torch.cuda.get_device_capability(device)
    declined: list[str] = []
    for name in (by_major.get(capability[0]), portable) if own is None else (own,):
        if name is None:
            declined.append(f"no kernel of its own for sm_{capability[0]}{capability[1]}")
            continue
        reason = importlib.import_module(f"{KERNELS}.{name}").unsupported(capability, **call)
        if reason is None:
            return Choice(name, tuple(declined))
        declined.append(f"not {name}: {reason}")
    return Choice(REFERENCE, tuple(declined))


def describe(
    device: torch.device, dtype: torch.dtype, attn_dim: int, hidden_dim: int, *, has_mask: bool, has_bias: bool
) -> str:
    """One line for a report."""
    return str(choose_attention(device, dtype, attn_dim, hidden_dim, has_mask=has_mask, has_bias=has_bias))


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Within it attention runs on this kernel, a module or REFERENCE, in every thread: a backward has one of its own.

    Raises:
        ValueError: there is no such kernel.
    """
    global forced
    known = (*ATTENTION.values(), PORTABLE, *PAGED.values(), PAGED_PORTABLE, REFERENCE)
    if name not in known:
        raise ValueError(f"hstu_compile: kernel {name!r}, expected one of {known}")
    before, forced = forced, name
    _forget()
    try:
        yield
    finally:
        forced = before
        _forget()


def _forget() -> None:
    choose_attention.cache_clear()
    choose_paged_attention.cache_clear()
