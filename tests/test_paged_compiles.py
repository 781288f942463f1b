"""The kernels of a paged cache compile for every target without a GPU, in its registers and shared memory.

python tests/test_paged_compiles.py      # what every kernel takes of a GPU
"""

import functools
import re
from typing import Any
from unittest import mock

import compile_only
import pytest
import torch
from paged_cases import H
from test_sm90_compiles import MASKS, assert_fits, read_by_tma

from hstu_compile.ops.kernels import (
    append_kv,
    attention_sm90,
    norm_gate_dropout,
    paged_attention_sm90,
    paged_attention_triton,
    paged_parts,
    partial_sums,
    silu_append_kv,
)
from hstu_compile.ops.kernels.launch import Extent, Launch, Workspace, with_places
from hstu_compile.ops.kernels.partial_sums import PartialSums
from hstu_compile.ops.norm_gate_dropout import WITHOUT_DROPOUT

PAGE_SIZES = [16, 32, 64, 128, 256]
NOTHING: dict[str, Any] = {
    "num_targets": None,
    "num_contextuals": None,
    "causal": True,
    "contextual_seq_len": 0,
    "target_group_size": 1,
    "max_attn_len": 0,
    "min_full_attn_seq_len": 0,
    "targets_share_position": False,
}


def launched(
    kernels: Any,
    dim: int,
    dtype: torch.dtype,
    page_size: int,
    mask: str,
    parts: int,
    run: Any = None,
    gate: dict[str, Any] | None = None,
) -> list[Launch]:
    """What a call of the ops launches on 132 multiprocessors; split up if there are to be parts. run: done instead."""
    q, k, v = (torch.empty(16, 4, H, dim, dtype=dtype)[:, i] for i in range(3))
    pool = torch.empty(4, 2, page_size, H, dim, dtype=dtype)
    table, cached = torch.zeros(1, 16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    call = {**NOTHING, "seq_offsets": torch.tensor([0, 16]), "max_seq_len": 4096, "alpha": 0.5, "scale": 0.1}
    call |= {name: torch.tensor(x) if isinstance(x, list) else x for name, x in MASKS[mask].items()}
    found: list[Launch] = []
    with (
        mock.patch.object(kernels, "processors", lambda device: 132 if parts > 1 else 1),
        mock.patch.object(
            paged_parts, "run", run or (lambda *call: found.extend(call[-1](Workspace(q.device, call[-2]))))
        ),
    ):
        kernels.forward(q, k, v, pool, table, cached, gate=gate, **call)
    extent = Extent(16, 1)
    found.append(
        append_kv.append_launch(
            pool.flatten(0, 2), k, v, call["seq_offsets"], table, cached, None, cached, extent, 4, page_size
        )
    )
    places = 3 * H * dim, dim, H * dim, dim
    found.append(silu_append_kv.silu_append_launch(*silu_append_tensors(dim, dtype, page_size), places, extent))
    return found


def silu_append_tensors(dim: int, dtype: torch.dtype, page_size: int) -> list[Any]:
    x, pool = torch.empty(16, 4 * H * dim, dtype=dtype), torch.empty(4, 2, page_size, H, dim, dtype=dtype)
    counts = [torch.zeros(1, dtype=torch.int32) for _ in range(3)]
    return [x, pool, torch.tensor([0, 16]), torch.zeros(1, 16, dtype=torch.int32), *counts]


def gate_of(dim: int, dtype: torch.dtype, heads: int = H, **change: Any) -> dict[str, Any]:
    """Of 16 rows; a layer norm, if not said otherwise. In rows of a packed buffer, as in models."""
    named: dict[str, Any] = {name: False for name in WITHOUT_DROPOUT}
    named |= {"norm_eps": 1e-6, "num_groups": 1, "activation": "none", "dropout_ratio": 0.0, "out_dtype": dtype}
    named |= change
    pieces = 1 + sum(named[f"concat_{name}"] for name in ("u", "x", "norm"))
    u = torch.empty(16, 4 * heads * dim, dtype=dtype)[:, : heads * dim]
    out = torch.empty(16, pieces * heads * dim, dtype=dtype)
    weight, bias = (torch.empty(named["num_groups"], heads * dim // named["num_groups"]) for _ in range(2))
    return {"u": u, "weight": weight, "bias": bias, "seed": None, "out": out, **named}


def compile_all(launches: list[Launch], fast: bool) -> dict[str, Any]:
    """By the kernel's name."""
    compiled = {}
    for launch in launches:
        on_a_gpu = {"FAST": fast, "LIBDEVICE": True}
        constants = {name: on_a_gpu.get(name, value) for name, value in launch.constants.items()}
        compiled[launch.kernel.__name__] = launch.kernel.warmup(*launch.arguments, **constants, grid=(1,))
    return compiled


def portable(capability: int, dim: int, dtype: torch.dtype, page_size: int, mask: str, parts: int) -> dict[str, Any]:
    gpu = divmod(capability, 10), compile_only.SHARED_MEMORY[capability]
    with (
        compile_only.target(capability),
        mock.patch.object(paged_attention_triton, "capability_and_memory", lambda device: gpu),
    ):
        launches = launched(paged_attention_triton, dim, dtype, page_size, mask, parts)
        return compile_all(launches, dtype != torch.float32)


def hopper(dim: int, dtype: torch.dtype, page_size: int, mask: str, parts: int) -> Any:
    with compile_only.target(90):
        launches = launched(paged_attention_sm90, dim, dtype, page_size, mask, parts)
        (kernel,) = (x for x in launches if x.kernel.__name__ == "product_kernel")
        return compile_all([kernel], True)["product_kernel"]


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize(
    "dim, dtype, page_size, mask, parts",
    [
        (256, torch.bfloat16, 32, "targets", 3),
        (128, torch.float16, 16, "everything", 1),
        (64, torch.bfloat16, 256, "causal", 1),
        (256, torch.float32, 64, "targets", 1),
    ],
)
def test_portable(capability: int, dim: int, dtype: torch.dtype, page_size: int, mask: str, parts: int) -> None:
    for name, kernel in portable(capability, dim, dtype, page_size, mask, parts).items():
        resources = compile_only.resources(kernel)
        assert resources.shared <= compile_only.SHARED_MEMORY[capability], name
        assert resources.spilled <= 64, f"{name}: {resources}"


@pytest.mark.parametrize(
    "dim, dtype, page_size, mask, parts",
    [
        (256, torch.bfloat16, 32, "targets", 1),
        (256, torch.bfloat16, 64, "causal", 11),
        (256, torch.float16, 16, "everything", 1),
        (128, torch.bfloat16, 256, "target groups", 1),
        (64, torch.bfloat16, 16, "targets", 11),
        (32, torch.bfloat16, 128, "window", 1),
        (192, torch.bfloat16, 32, "targets", 1),
    ],
)
def test_hopper(dim: int, dtype: torch.dtype, page_size: int, mask: str, parts: int) -> None:
    kernel = hopper(dim, dtype, page_size, mask, parts)
    assert_fits(kernel, f"product_kernel {parts} parts")
    assert kernel.metadata.launch_pdl and kernel.asm["ptx"].count("griddepcontrol.wait") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim, steps", [(256, 1), (64, 4), (24, 1)])  # heads side by side, or u, v, q and k of each
def test_silu_append(dim: int, steps: int, dtype: torch.dtype) -> None:
    """No spills; x is read and written, and pages are, 16 bytes at a time."""
    tensors = silu_append_tensors(dim, dtype, 32)
    places = (3 * dim, 4 * dim, dim, 4 * dim) if steps == 4 else (3 * H * dim, dim, H * dim, dim)
    with compile_only.target(90):
        launch = silu_append_kv.silu_append_launch(*tensors, places, Extent(16, 1))
        kernel = compile_all([launch], True)["silu_append_kernel"]
    resources = compile_only.resources(kernel)
    assert resources.spilled == 0 and resources.registers <= 64, resources
    pieces = silu_append_kv.ROWS * silu_append_kv.COLS * dtype.itemsize // (128 * 16)  # a thread
    assert kernel.asm["ptx"].count("ld.global.v4.b32") == pieces
    assert kernel.asm["ptx"].count("st.global.v4.b32") == 3 * pieces


@pytest.mark.parametrize("early", [True, False])
def test_the_attention_begins_while_its_keys_are_written(early: bool) -> None:
    with compile_only.target(90), mock.patch.object(silu_append_kv, "may_begin_early", lambda device: early):
        launch = silu_append_kv.silu_append_launch(
            *silu_append_tensors(256, torch.bfloat16, 32), (768, 256, 256, 256), Extent(16, 1)
        )
        ptx = compile_all([launch], True)["silu_append_kernel"].asm["ptx"]
    assert ptx.count("griddepcontrol.launch_dependents") == early


def test_silu_append_can_be_done_again() -> None:
    tensors = silu_append_tensors(64, torch.bfloat16, 32)
    extent = Extent(16, 1)
    with compile_only.target(90):
        launch = silu_append_kv.silu_append_launch(*tensors, (384, 64, 128, 64), extent)
    places = re.findall(r"Place\(key='?(\w+)'?\)", str(with_places(launch, tensors, extent)))
    assert set(places) == {*map(str, range(len(tensors))), "total_rows", "num_sequences"}


@pytest.mark.parametrize("page_size, cols", [(16, 64), (64, 64), (256, 128)])
def test_boxes_of_pages(page_size: int, cols: int) -> None:
    """By the rules of TMA: every token of the history, and 0 behind it, whatever the page holds there."""
    dim, num_pages, cached = 24, 5, 2 * page_size + 7
    pool = torch.randn(num_pages, 2, page_size, H, dim).to(torch.bfloat16)
    table = [3, 1, 4]
    with compile_only.target(90):
        descriptor = attention_sm90.describe(pool.flatten(0, 2), min(page_size, cols), 32)
    height, limit = min(page_size, cols), attention_sm90.ROW_LIMIT
    for position in range(0, -(-cached // cols) * cols, height):  # as `load_pages` has them
        rest = cached - position
        page = table[position // page_size] if rest > 0 else 0
        for side in (0, 1):
            end = (page * 2 + side) * page_size + position % page_size + rest
            for row in (0, 1, height - 1):
                for d in (0, dim - 1, dim):
                    inside = position + row < cached and d < dim
                    want = pool[page, side, (position + row) % page_size, 1, d].item() if inside else 0.0
                    assert read_by_tma(descriptor, [limit, end, limit - rest + row, 1, d]) == want


@pytest.mark.parametrize(
    "rows, sequences, max_seq_len, parts",
    [
        (384, 1, 4480, 11),  # 3 tiles of 4 heads on 132 multiprocessors
        (8 * 256, 8, 4352, 2),
        (32 * 256, 32, 4352, 1),
        (8 * 128, 9, 4096, 4),  # the ninth is padding
        (128, 1, 4096, 16),  # at least four tiles of keys each
        (130, 1, 130, 1),
        (2000, 2000, 4096, 1),  # a token each: a tile each
        (1, 1, 63, 1),
    ],
)
def test_parts_and_programs(rows: int, sequences: int, max_seq_len: int, parts: int) -> None:
    """From shapes alone; what goes by them is found again in a launch that is done again."""
    extent = Extent(rows, sequences, max_seq_len)
    split = functools.partial(paged_parts.parts_of, 4, 128, 64, 132)
    assert split(extent) == parts
    programs, sizes = paged_attention_sm90.paged_sizes(4, 256, split, 132, extent)
    assert sizes["num_heads"] == 4 * parts and sizes["parts"] == parts and sizes["N"] == max_seq_len
    assert programs == min(132, sizes["num_tickets"])
    assert paged_attention_triton.paged_sizes(4, 128, split, extent)[0] >= -(-rows // 128) * 4 * parts


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kernels", [paged_attention_sm90, paged_attention_triton])
@pytest.mark.parametrize("parts", [1, 11])
def test_launches_can_be_done_again(kernels: Any, parts: int, gated: bool) -> None:
    """Every tensor and size among the arguments of a launch is one that a later call brings."""
    seen = []

    def instead(memory: Any, key: Any, tensors: list, extent: Extent, launches: Any) -> None:
        workspace = Workspace(tensors[0].device, extent)
        for launch in launches(workspace):
            places = str(with_places(launch, [*tensors, *workspace.tensors], extent))
            seen.append(
                (launch.kernel.__name__, set(launch.sizes(extent)[1]) <= set(re.findall(r"key='(\w+)'", places)))
            )

    gate = gate_of(64, torch.bfloat16) if gated else None
    launched(kernels, 64, torch.bfloat16, 32, "targets", parts, instead, gate)
    assert len(seen) == 2 + (gated and parts == 1) and all(found for _, found in seen), seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "dim, change",
    [
        (256, {}),
        (256, {"num_groups": 4, "concat_u": True, "concat_x": True}),
        (256, {"activation": "silu", "gate_first": True}),
        (64, {"num_groups": 4, "rms": True}),
        (2048, {}),
    ],
)
@pytest.mark.parametrize("parts, together", [(8, 7), (11, 15)])
def test_gate_of_parts(dim: int, change: dict[str, Any], dtype: torch.dtype, parts: int, together: int) -> None:
    """Parts are on their way to shared memory, 16 bytes at a time, many together where rows are not long; nothing is
    spilled. A row is summed in the order in which the gate of a whole attention does: threads own the same elements."""
    gate, extent = gate_of(dim, dtype, heads=4, **change), Extent(16, 1, 4096)
    offsets, sums = torch.zeros(2, dtype=torch.int64), torch.empty(parts, 16, 4, dim)
    partial = PartialSums(sums, dtype, offsets, lambda extent: parts)
    layouts = []
    for a in (torch.empty(16, 4, dim, dtype=dtype), partial):
        launch = norm_gate_dropout.forward_launch(a, **gate, extent=extent)
        with compile_only.target(90):
            kernel = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
        assert compile_only.resources(kernel).spilled == 0
        layouts.append(layouts_of_sums(kernel.asm["ttgir"]))
    assert layouts[0] == layouts[1] and len(layouts[0]) == (1 if change.get("rms") else 2)
    tile = 4 * launch.constants["ROWS"] * launch.constants["BLOCK"]
    copies = len(re.findall(r"cp\.async\.cg\.shared\.global .*, 0x10,", kernel.asm["ptx"]))
    buffers = min(together, partial_sums.SHARED_MEMORY.value // tile)
    assert copies == (buffers + 1) * tile // (16 * 32 * launch.constants["num_warps"])
    assert compile_only.resources(kernel).shared <= partial_sums.SHARED_MEMORY.value


def layouts_of_sums(ttgir: str) -> list[str]:
    """Of what is summed, in the order of the sums."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    summed = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<.*?(#\w+)>\)', ttgir, re.DOTALL)
    return [layouts[name] for name in summed]


if __name__ == "__main__":
    for dim in (32, 64, 128, 256):
        for page_size, mask, parts in (
            (16, "targets", 1),
            (32, "causal", 11),
            (64, "everything", 1),
            (256, "window", 11),
        ):
            kernel = hopper(dim, torch.bfloat16, page_size, mask, parts)
            print("Hopper", dim, page_size, mask, parts, compile_only.resources(kernel), flush=True)
    for capability in (90, 80, 86):
        for dim in (64, 128, 256):
            for dtype in (torch.bfloat16, torch.float32):
                for page_size, mask, parts in ((16, "targets", 1), (64, "everything", 11)):
                    for name, kernel in portable(capability, dim, dtype, page_size, mask, parts).items():
                        print(capability, dim, dtype, page_size, mask, parts, name, compile_only.resources(kernel))
