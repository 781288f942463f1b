"""Pages between a pool and host memory: those asked for and no others, whatever pieces the host has them in.

The kernel's arithmetic is tested in the interpreter, in paged_triton_cases.py.
"""

from array import array
from typing import Any

import compile_only
import numpy as np
import pytest
import torch
from torch import Tensor

from hstu_compile.kv_cache.free_runs import pages_in
from hstu_compile.ops.kernels import page_copies as kernels
from hstu_compile.ops.kernels.launch import Extent
from hstu_compile.ops.page_copies import HostPages, PageCopies, addressable
from hstu_compile.ops.page_copies import _distances as distances

SHAPE = (2, 16, 3, 8)  # of a page; 1536 bytes in bf16, no multiple of what a program copies at once
ON_HOST = [(7, 9), (0, 1), (20, 24), (3, 4)]  # runs of the host's pages
PAGES = array("i", [5, 11, 2, 3, 4, 0, 9, 8])  # of the pool


LAYERS = 3
PAGE_BYTES = 2 * 2 * 16 * 3 * 8


def numbers(*pages: int, device: str = "cpu") -> Tensor:
    return torch.randn(*pages, *SHAPE, device="cpu").to(torch.bfloat16).to(device)


def chosen(host: Tensor) -> list[HostPages]:
    """Of two users."""
    return [HostPages(host, pages_in(ON_HOST[:2])), HostPages(host, pages_in(ON_HOST[2:]))]


def check_load(host: Tensor, device: str) -> None:
    copies = PageCopies(PAGES, chosen(host))
    for layer in range(LAYERS):
        pool = numbers(12, device=device)
        expected, before = pool.cpu(), host.clone()
        expected[list(PAGES)] = host[layer, pages_in(ON_HOST)]
        copies.load(pool, layer)
        assert torch.equal(pool.cpu(), expected) and torch.equal(host, before)


def check_store(host: Tensor, device: str) -> None:
    copies = PageCopies(PAGES, chosen(host))
    for layer in range(LAYERS):
        pool = numbers(12, device=device)
        expected, before = host.clone(), pool.clone()
        expected[layer, pages_in(ON_HOST)] = before.cpu()[list(PAGES)]
        copies.store(pool, layer)
        if device == "cuda":
            torch.cuda.synchronize()
        assert torch.equal(host, expected) and torch.equal(pool, before)


@pytest.mark.parametrize("check", [check_load, check_store])
def test_on_the_cpu(check: Any) -> None:
    check(numbers(LAYERS, 24), "cpu")


@pytest.mark.cuda
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("check", [check_load, check_store])
def test_on_a_gpu(check: Any, pinned: bool) -> None:
    """Pinned memory is read and written where it is, other memory by the driver; also when it is done again."""
    for _ in range(3):
        host = numbers(LAYERS, 24)
        host = host.pin_memory() if pinned else host
        assert addressable([host[:, 3:4]]) == pinned
        check(host, "cuda")


@pytest.mark.cuda
def test_parts_that_are_not_laid_out_alike() -> None:
    """Each with memory of its own: from layer to layer it is further in a larger one."""
    parts = [numbers(LAYERS, last - first).pin_memory() for first, last in ON_HOST]
    copies, pool = PageCopies(PAGES, [HostPages.all_of(part) for part in parts]), numbers(12, device="cuda")
    for layer in range(LAYERS):
        expected = pool.cpu()
        expected[list(PAGES)] = torch.cat([part[layer] for part in parts])
        copies.load(pool, layer)
        assert torch.equal(pool.cpu(), expected)
        pool = numbers(12, device="cuda")
        copies.store(pool, layer)
        torch.cuda.synchronize()
        assert torch.equal(torch.cat([part[layer] for part in parts]), pool.cpu()[list(PAGES)])


def test_distances_are_those_of_large_memories() -> None:
    """From the first part's memory, whatever integers the numbers are."""
    memory = numbers(LAYERS, 24)
    parts = [HostPages(memory[:, 4:], np.array([3, 0], dtype=np.int8)), HostPages.all_of(memory[:, 2:3])]
    found = distances(parts)
    assert found.dtype == np.int64 and found.tolist() == [PAGE_BYTES * n for n in (3, 0, -2)]


def test_what_the_kernel_cannot_address() -> None:
    assert not addressable([numbers(LAYERS, 4)])  # not pinned


@pytest.mark.cuda
def test_pinned_memory_that_the_kernel_cannot_address() -> None:
    host = numbers(LAYERS, 4).pin_memory()
    good = [host, host[:, 1:2], host[1:2, 2:]]
    odd = torch.empty(2 * 99, dtype=torch.int16).pin_memory()[1:].view(1, 1, 197)
    assert addressable(good)
    for bad in (host.transpose(2, 3), odd, numbers(LAYERS, 4)):
        assert not addressable([bad]) and not addressable([*good, bad])


def test_registers() -> None:
    """As many as an attention program leaves free on its multiprocessor; loads and stores of 16 bytes."""
    distances, pages = torch.empty(2, 4, dtype=torch.int64), torch.empty(4, 1 << 16, dtype=torch.bfloat16)
    with compile_only.target(90):
        launch = kernels.copy_launch(distances, pages, pages.clone(), 1 << 17, Extent(4))
        kernel = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
    resources = compile_only.resources(kernel)
    assert resources.spilled == 0 and resources.registers <= 32 and not resources.shared, resources
    assert kernel.asm["ptx"].count(".v2.b64") + kernel.asm["ptx"].count(".v4.b32") == 8
