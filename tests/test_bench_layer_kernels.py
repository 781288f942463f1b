"""The table of a step's kernels, from results as a GPU gives them."""

import pytest
import torch

from bench import layer_kernels, tables

NAMES = {
    "nvjet_tst_256x128_64x4_2x1_v_bz_TNT": "product (cuBLAS)",
    "triton_poi_fused_silu_slice_view_1": "poi_fused_silu_slice_view",
    "void at::native::reduce_kernel<512, 1, ReduceOp<float>>(ReduceOp<float>)": "at::native::reduce_kernel",
    "dkdv_split_kernel": "dkdv_split_kernel",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert layer_kernels.short(name) == NAMES[name]


def row(seq_len: int, place: int, kernel: str, us: float, recompute: tuple[str, ...] = ()) -> dict:
    return {"seq_len": seq_len, "recompute": list(recompute), "place": place, "kernel": kernel, "us": us}


def test_table() -> None:
    rows = [row(n, i, name, us * n / 1024) for n in (1024, 4096) for i, (name, us) in enumerate((("a", 1), ("b", 2.5)))]
    rows += [row(n, 0, "c", 7, ("input_silu",)) for n in (1024, 4096)]
    text = tables.layer_kernels(rows)
    assert "| b | 2.5 | 10.0 |" in text and "| in all | 4 | 14 |" in text and "Recomputed: input_silu" in text
    with pytest.raises(ValueError, match="other kernels at another length"):
        tables.layer_kernels([*rows[:3], row(4096, 1, "d", 1)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert layer_kernels.main([]) == 1 and "no GPU" in capsys.readouterr().out
