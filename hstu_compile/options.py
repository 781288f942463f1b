"""The options of the backend: ours, checked by name and type; everything else belongs to Inductor."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hstu_compile.passes import NAMES


@dataclass(frozen=True)
class Options:
    """What `torch.compile(model, backend=hstu_compile.backend, options={...})` accepts besides Inductor's options."""

    strict: bool = False  # raise when a graph is not captured, a pass fails, or nothing matches
    expect: int | None = None  # raise when fewer attention regions than this are fused in a graph
    verify: str | None = None  # "first": compare with the original graph on the first call, raise when out of budget
    enable: tuple[str, ...] = NAMES  # passes that run
    disable: tuple[str, ...] = ()  # passes that do not
    debug_checks: bool = False  # check the values of offsets, lengths and counts on the GPU too (waits for the device)
    last_layer_candidates_only: bool = False  # of the last attention and behind it, compute only rows that are read
    recompute_input_layernorm: bool = False  # in the backward, instead of saving its output
    recompute_input_silu: bool = False
    recompute_uvqk: bool = False  # norm, projection and silu: the whole way from x to u, v, q, k
    recompute_budget: float | None = None  # choose among these: bytes (above 1), or the share (up to 1) of what is held

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"hstu_compile: option {field.name} is {value!r}, expected True or False")
        if self.expect is not None and (isinstance(self.expect, bool) or not isinstance(self.expect, int)):
            raise ValueError(f"hstu_compile: option expect is {self.expect!r}, expected a number of regions")
        if self.verify not in (None, "first"):
            raise ValueError(f'hstu_compile: option verify is {self.verify!r}, expected "first"')
        self._check_budget()
        for name in ("enable", "disable"):
            chosen = getattr(self, name)
            chosen = (chosen,) if isinstance(chosen, str) else tuple(chosen)
            if unknown := sorted(set(chosen) - set(NAMES)):
                raise ValueError(f"hstu_compile: option {name} names {unknown}, expected passes among {list(NAMES)}")
            object.__setattr__(self, name, chosen)

    def _check_budget(self) -> None:
        budget = self.recompute_budget
        if budget is None:
            return
        number = isinstance(budget, (int, float)) and not isinstance(budget, bool)
        if not number or not (0 < budget <= 1 or (isinstance(budget, int) and budget > 1)):
            expected = "expected a share in (0, 1], or a number of bytes as an int above 1"
            raise ValueError(f"hstu_compile: option recompute_budget is {budget!r}, {expected}")
        fixed = ("recompute_input_layernorm", "recompute_input_silu", "recompute_uvqk")
        if given := [name for name in fixed if getattr(self, name)]:
            raise ValueError(
                f"hstu_compile: option recompute_budget chooses what is recomputed, expected it without {given}"
            )

    @property
    def passes(self) -> tuple[str, ...]:
        chosen = tuple(name for name in NAMES if name in self.enable and name not in self.disable)
        return (*chosen, "candidates") if self.last_layer_candidates_only else chosen


KNOWN = tuple(field.name for field in fields(Options))


def split(mode: str | None, given: Mapping[str, Any]) -> tuple[Options, dict[str, Any]]:
    """Our options, and Inductor's: those of the mode, and over them those given.

    Raises:
        ValueError: a name that neither of us knows, or a value of ours that does not fit.
    """
    from torch._inductor import list_mode_options, list_options

    ours = {name: value for name, value in given.items() if name in KNOWN}
    inductor = {name.replace("-", "_"): value for name, value in given.items() if name not in KNOWN}
    if unknown := sorted(inductor.keys() - set(list_options())):
        raise ValueError(
            f"hstu_compile: unknown options {unknown}; known are {list(KNOWN)} and every key of torch._inductor.config"
        )
    return Options(**ours), {**(list_mode_options(mode) if mode else {}), **inductor}
