"""The Hopper attention with a relative bias: it compiles for sm_90 without a GPU; on a Hopper GPU, its numbers."""

from typing import Any

import compile_only
import pytest
import torch
from relative_bias_problem import relative_bias
from test_hstu_attention import offsets_of, tensors
from test_relative_bias import check
from test_relative_bias import slices as packed
from test_relative_bias_triton import CompileOnly
from test_sm90_compiles import LENGTHS, MASKS, NOTHING, H, N, assert_fits, kernels_of, on_hopper

from hstu_compile.ops import kernel_table
from hstu_compile.ops.kernels import relative_bias as relative_kernels
from hstu_compile.ops.relative_bias import RelativeBias

BY_TIME = ("time_bias", "row_times", "col_times", "time_boundaries")


def compiled(monkeypatch: pytest.MonkeyPatch, dim: int, mask: str, bias: bool, **given: Any) -> dict[str, Any]:
    """The kernels of a forward and a backward, by name and product; given: of the relative bias, None: without."""
    absent = {name: given.pop(name) for name in list(given) if given[name] is None}
    kernel = CompileOnly(relative_kernels.time_ranges_kernel)
    monkeypatch.setattr(relative_kernels, "time_ranges_kernel", kernel)
    x = torch.empty(32, H, dim, dtype=torch.bfloat16)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 32]), "max_seq_len": 32, "alpha": 0.5, "scale": 0.1}
    call |= {name: torch.tensor(value) if isinstance(value, list) else value for name, value in MASKS[mask].items()}
    call["attn_bias"] = torch.empty(1, 1, 32, 32, dtype=torch.bfloat16) if bias else None
    relative = relative_bias(1, H, 32, num_boundaries=64, **given)
    return kernels_of(x, x, call | {"relative_bias": RelativeBias(**relative | absent)})


# Bytes a thread that these may spill; what is not here spills nothing.
SPILLS: dict[tuple[int, str], int] = {
    (32, "product_kernel"): 16,
    (128, "dkdv_kernel"): 144,
    (256, "dkdv_split_kernel"): 160,
}


@pytest.mark.parametrize(
    "dim, mask, given",
    [
        (32, "everything", {"symmetric": True}),
        (64, "causal", {}),
        (128, "causal", {}),
        (128, "causal", {"dtype": torch.float32, "symmetric": True}),
        (256, "causal", {}),
    ],
)
def test_compiles(monkeypatch: pytest.MonkeyPatch, dim: int, mask: str, given: dict[str, Any]) -> None:
    kernels = compiled(monkeypatch, dim, mask, False, **given)
    assert len(kernels) == 3
    for name, kernel in kernels.items():
        assert_fits(kernel, name, SPILLS.get((dim, name), 0))


@pytest.mark.parametrize("dim, bias", [(128, False), (64, True)])
def test_a_bias_by_position_alone_spills_nothing(monkeypatch: pytest.MonkeyPatch, dim: int, bias: bool) -> None:
    for name, kernel in compiled(monkeypatch, dim, "causal", bias, **dict.fromkeys(BY_TIME)).items():
        assert_fits(kernel, name, 0)


def test_what_is_compiled_without_is_the_same_whatever_a_call_says() -> None:
    x = torch.empty(16, H, 64, dtype=torch.bfloat16)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 16]), "max_seq_len": 16, "alpha": 0.5, "scale": 0.1}
    without, none = (kernels_of(x, x, given) for given in (call, call | {"relative_bias": None}))
    assert {name: kernel.hash for name, kernel in without.items()} == {n: k.hash for n, k in none.items()}


@on_hopper
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (128, 128), (256, 256), (96, 64)], ids=str)
@pytest.mark.parametrize("mask", ["causal", "full", "everything", "window"])
@pytest.mark.parametrize("given", [{}, {"shared": True, "symmetric": True}, {"dtype": torch.float32}], ids=str)
def test_numbers(dims: tuple[int, int], mask: str, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    q, k, v = packed(sum(LENGTHS), *dims, torch.bfloat16, "packed")
    said = kernel_table.describe(q.device, q.dtype, *dims, has_mask=False, has_bias=False)
    assert said.startswith("attention_sm90")
    arguments = {"seq_offsets": offsets_of(LENGTHS), "max_seq_len": N, "alpha": dims[0] ** -0.5, "scaling_seq_len": 300}
    relative = relative_bias(len(LENGTHS), H, N, device="cuda", num_boundaries=64, **given)
    check(q, k, v, arguments | tensors(MASKS[mask]), relative)


@on_hopper
@pytest.mark.parametrize("absent", [("position_bias",), BY_TIME], ids=str)
def test_one_of_the_two_beside_a_bias_and_a_mask_tensor(absent: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, N, H, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    lengths = torch.tensor([N, 64, 129], device="cuda")
    arguments = {"seq_lengths": lengths, "max_seq_len": N, "alpha": 0.1, "scaling_seq_len": N, "causal": False}
    arguments["attn_mask"] = (torch.rand(1, 1, N, N, device="cuda") < 0.5).tril().float()
    relative = relative_bias(3, H, N, device="cuda", one_sequence=True) | dict.fromkeys(absent)
    check(q, k, v, arguments, relative, torch.randn(3, 1, N, N, device="cuda"))


if __name__ == "__main__":
    for dim in (32, 64, 128, 256):
        for given in ({}, {"symmetric": True}, {"dtype": torch.float32}, dict.fromkeys(BY_TIME)):
            with pytest.MonkeyPatch.context() as patch:
                for name, kernel in compiled(patch, dim, "causal", False, **given).items():
                    print(f"dim {dim} {given}: {name} {compile_only.resources(kernel)}", flush=True)
