"""Options: ours by name and type, Inductor's passed on, everything else refused with the names that exist."""

from typing import Any

import pytest
import torch

import hstu_compile
from hstu_compile.options import KNOWN, Options, split
from hstu_compile.passes import NAMES


def test_defaults() -> None:
    options, inductor = split(None, {})
    assert options == Options() and inductor == {}
    assert options.passes == NAMES


def test_ours_and_inductors_mix() -> None:
    given = {"strict": True, "expect": 4, "max-autotune": False, "triton.cudagraphs": True}
    options, inductor = split("max-autotune", given)
    assert options == Options(strict=True, expect=4)
    assert inductor["max_autotune"] is False  # what is given wins over the mode
    assert inductor["triton.cudagraphs"] is True and inductor["coordinate_descent_tuning"] is True


def test_modes_are_inductors() -> None:
    for mode, options in torch._inductor.list_mode_options().items():
        assert split(mode, {})[1] == options
    with pytest.raises(RuntimeError, match="reduce-overhead"):
        split("fastest", {})


def test_passes_by_name() -> None:
    assert Options(enable=("attention", "output")).passes == ("attention", "output")
    assert Options(enable="attention").passes == ("attention",)  # type: ignore[arg-type]
    assert Options(disable=("uvqk",)).passes == tuple(name for name in NAMES if name != "uvqk")
    assert Options(last_layer_candidates_only=True).passes == (*NAMES, "candidates")


@pytest.mark.parametrize(
    "given, words",
    [
        ({"strcit": True}, ["strcit", "torch._inductor.config", *KNOWN]),
        ({"enable": ("attentoin",)}, ["attentoin", *NAMES]),
        ({"disable": "everything"}, ["everything", *NAMES]),
        ({"verify": "always"}, ["verify", "always", "first"]),
        ({"strict": 1}, ["strict", "True or False"]),
        ({"recompute_uvqk": "yes"}, ["recompute_uvqk", "yes"]),
        ({"last_layer_candidates_only": "read_rows"}, ["last_layer_candidates_only", "read_rows", "True or False"]),
        ({"enable": "candidates"}, ["candidates", *NAMES]),
        ({"expect": True}, ["expect"]),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        split(None, given)
    assert all(word in str(error.value) for word in words)


def test_refused_through_torch_compile() -> None:
    model = torch.compile(torch.nn.Linear(2, 2), backend=hstu_compile.backend, options={"strcit": True})
    with pytest.raises(Exception, match="unknown options.*strcit"):
        model(torch.randn(1, 2))
