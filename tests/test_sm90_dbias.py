"""The bias's gradient on Hopper: it compiles for sm_90 without a GPU; on a Hopper GPU, its numbers."""

from typing import Any

import compile_only
import pytest
import torch
from eager_attention import eager_attention
from error_budget import BACKWARD, assert_within_budget
from test_sm90_compiles import LENGTHS, MASKS, NOTHING, H, N, assert_fits, on_hopper, read_by_tma, slices
from tiled_masks import tiled

from hstu_compile.ops.hstu_attention_reference import hstu_attention_backward_reference
from hstu_compile.ops.kernels import attention_sm90, attention_sm90_dbias_launch, attention_triton
from hstu_compile.ops.kernels.launch import Workspace
from hstu_compile.ops.kernels.mask_occupancy import TiledMask
from hstu_compile.ops.mask_tile_states import GRAIN

B = len(LENGTHS)


def compiled(
    dims: tuple[int, int],
    dtype: torch.dtype,
    mask: str,
    bias_dtype: torch.dtype,
    mask_dtype: torch.dtype | None,
    sizes: tuple[int, int, int] = (16, 1, 16),
) -> Any:
    """dbias_kernel for sm_90, without the kernels that list what it visits; sizes: rows, sequences, max_seq_len."""
    T, sequences, length = sizes
    q, v = (torch.empty(T, H, dim, dtype=dtype) for dim in dims)
    bias = torch.empty(1, 1, length, length, dtype=bias_dtype)
    call = {**NOTHING, "seq_offsets": torch.zeros(sequences + 1, dtype=torch.int64), "max_seq_len": length}
    call |= {name: torch.tensor(value) if isinstance(value, list) else value for name, value in MASKS[mask].items()}
    call["attn_bias"] = bias
    if mask_dtype is not None:
        call["attn_mask"] = TiledMask(bias.to(mask_dtype), torch.empty(1, 1, 1, 1, dtype=torch.uint8), GRAIN)
    with compile_only.target(90):
        out = attention_triton.empty_bias_grad(bias)
        call |= {"alpha": 0.5, "scale": 0.1}
        call["attn_bias"] = attention_sm90_dbias_launch.loadable_bias(bias)
        workspace = Workspace(q.device, attention_sm90.extent_of(q, call))
        *_, launch = attention_sm90_dbias_launch.dbias_launches(v, q, q, v, out, workspace, 132, **call)
        return launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))


@pytest.mark.parametrize(
    "case",  # what `compiled` takes
    [
        ((32, 32), torch.float16, "full", torch.float16, None),
        ((64, 64), torch.bfloat16, "full", torch.bfloat16, torch.float32),
        ((128, 128), torch.bfloat16, "full", torch.bfloat16, torch.float32),
        ((128, 128), torch.float16, "everything", torch.float32, torch.bool),
        ((128, 128), torch.float16, "everything", torch.float16, torch.float32),
        ((128, 128), torch.bfloat16, "full", torch.float32, torch.bfloat16),
        ((64, 64), torch.bfloat16, "causal", torch.bfloat16, torch.bool),
        ((256, 256), torch.bfloat16, "causal", torch.bfloat16, None),
        ((256, 64), torch.bfloat16, "targets", torch.float64, torch.bfloat16),
    ],
)
def test_compiles(case: tuple) -> None:
    kernel = compiled(*case)
    assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.bulk.tensor.4d" in kernel.asm["ptx"]
    assert_fits(kernel, "dbias_kernel")


def test_changing_sizes_do_not_compile_again() -> None:
    """T, B, and a max_seq_len of 16 or more times 16."""
    common = (64, 64), torch.bfloat16, "causal", torch.bfloat16, torch.float32
    sizes = ((1, 1, 16), (16, 16, 32), (37, 3, 2048))
    assert len({compiled(*common, size).hash for size in sizes}) == 1


@pytest.mark.parametrize("layout", ["contiguous", "odd", "transposed", "expanded", "sliced"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_descriptors_read_any_bias(layout: str, dtype: torch.dtype) -> None:
    """By the rules of TMA: every cell, and 0 beyond the last row and column."""
    shape = (3, 2, 5, 5) if layout == "odd" else (3, 2, 8, 8)
    bias = {
        "contiguous": lambda: torch.randn(shape),
        "odd": lambda: torch.randn(shape),
        "transposed": lambda: torch.randn(shape).mT,
        "expanded": lambda: torch.randn(1, 2, 8, 8).expand(shape),
        "sliced": lambda: torch.randn(3, 2, 8, 16)[..., 8:],
    }[layout]().to(dtype)  # fmt: skip
    with compile_only.target(90):
        ready = attention_sm90_dbias_launch.loadable_bias(bias)
        descriptor = attention_sm90_dbias_launch.describe_bias(ready)
    assert ready is bias or layout in ("odd", "transposed", "expanded") or dtype == torch.float64
    size = shape[-1]
    for b in range(3):
        for head in range(2):
            for row in range(size + 1):
                for col in range(size + 1):
                    want = bias[b, head, row, col].float().item() if row < size and col < size else 0.0
                    assert read_by_tma(descriptor, [b, head, row, col]) == want


def mask_tensor(dtype: torch.dtype, batches: int, heads: int) -> torch.Tensor:
    """Tiles of zeros, of ones and of both."""
    mask = (torch.rand(batches, heads, N, N, device="cuda") < 0.5).float()
    if dtype.is_floating_point:
        mask *= torch.randn(mask.shape, device="cuda")
    mask[:, :, 128:256, :128] = 1
    mask[:, :, :128, 128:256] = 0
    return mask.to(dtype)


def check(
    layout: str = "packed",
    mask: str = "causal",
    dims: tuple[int, int] = (128, 128),
    dtype: torch.dtype = torch.bfloat16,
    bias: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
) -> None:
    """Within the budget, from inputs and memory full of NaN where nothing may be read; the same bits twice."""
    (q, k, v, dout), where = slices(layout, dtype, *dims)
    if bias is None:
        bias = torch.randn(B, 1, N, N, device="cuda").to(dtype)
    bias[:, :, max(LENGTHS) :] = bias[..., max(LENGTHS) :] = float("nan")
    call = {**NOTHING, **where, "max_seq_len": N, "alpha": dims[0] ** -0.5, "attn_bias": bias, "attn_mask": attn_mask}
    call |= {n: torch.tensor(x, device="cuda") if isinstance(x, list) else x for n, x in MASKS[mask].items()}
    if call["causal"] and "num_contextuals" not in MASKS[mask] and "contextual_seq_len" not in MASKS[mask]:
        bias[:, :, 0, 1:] = float("nan")
    plain = {**call, "scaling_seq_len": 300.0}
    double = {**plain, "attn_bias": bias.double(), "attn_mask": None if attn_mask is None else attn_mask.double()}
    inputs64 = [t.double() for t in (dout, q, k, v)]
    want = hstu_attention_backward_reference(*inputs64, **double, needs_bias_grad=True)[3]
    leaf = bias.detach().nan_to_num(0.0).requires_grad_()
    out = eager_attention(q, k, v, **{**plain, "attn_bias": leaf})
    (eager,) = torch.autograd.grad(out, leaf, dout.nan_to_num(0.0))

    call["attn_mask"] = tiled(attn_mask)

    def run() -> torch.Tensor:
        return attention_sm90_dbias_launch.dbias(dout, q, k, v, **call, scale=1 / 300)

    ours = run()
    assert ours.is_contiguous()
    assert_within_budget(ours, eager, want, BACKWARD, "dbias")
    assert torch.equal(ours, run()), "dbias differs from run to run"


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for results holds NaN until a kernel writes it."""
    empty = attention_triton.empty_bias_grad
    monkeypatch.setattr(attention_triton, "empty_bias_grad", lambda bias: empty(bias).fill_(float("nan")))


@on_hopper
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask: str) -> None:
    check(mask=mask)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dims", [(8, 8), (32, 32), (64, 64), (96, 96), (192, 192), (256, 256), (64, 128), (256, 40)])
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(dims=dims, dtype=dtype, mask="targets")


@on_hopper
@pytest.mark.parametrize("layout", ["packed", "interleaved", "dense", "heads first"])
@pytest.mark.parametrize("sizes", [(1, 1), (1, H), (B, 1), (B, H)])
def test_sharing(layout: str, sizes: tuple[int, int]) -> None:
    check(layout, bias=torch.randn(*sizes, N, N, device="cuda", dtype=torch.bfloat16))


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_biases(dtype: torch.dtype) -> None:
    for bias in (
        torch.randn(1, H, N, N, device="cuda"),
        torch.randn(1, H, N, N, device="cuda").mT,
        torch.randn(1, H, N + 7, N + 7, device="cuda")[..., 7:, :N],
        torch.randn(1, H, N, 312, device="cuda")[..., :N],
    ):
        check(mask="full", bias=bias.to(dtype, memory_format=torch.preserve_format))


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("sizes", [(1, 1), (1, H), (B, 1), (B, H)])
def test_mask_tensors(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    check(mask="full", attn_mask=mask_tensor(dtype, *sizes))
    check("dense", mask="targets", attn_mask=mask_tensor(dtype, *sizes).mT, dims=(64, 64))


@on_hopper
def test_nothing_to_do() -> None:
    for T, sequences in ((0, 0), (0, 3), (5, 0), (5, 2)):
        x = torch.randn(T, H, 64, device="cuda", dtype=torch.bfloat16)
        bias = torch.randn(1, 1, 4, 4, device="cuda", dtype=torch.bfloat16)
        call = {**NOTHING, "seq_offsets": torch.zeros(sequences + 1, dtype=torch.int64, device="cuda")}
        call |= {"max_seq_len": 4, "attn_bias": bias, "alpha": 1.0, "scale": 1.0}
        dbias = attention_sm90_dbias_launch.dbias(x, x, x, x, **call)
        assert torch.equal(dbias, torch.zeros_like(bias))
