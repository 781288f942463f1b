"""Pages between a pool and host memory: those asked for and no others, whatever pieces the host has them in.

The kernel's arithmetic is tested in the interpreter, in paged_triton_cases.py.
"""

from array import array
from typing import Any

import compile_only
import pytest
import torch
from torch import Tensor

from hstu_compile.ops.kernels import page_copies as kernels
from hstu_compile.ops.kernels.launch import Extent
from hstu_compile.ops.page_copies import PageCopies, addressable

SHAPE = (2, 16, 3, 8)  # of a page; 1536 bytes in bf16, no multiple of what a program copies at once
ON_HOST = [(7, 9), (0, 1), (20, 24), (3, 4)]  # runs of the host's pages
PAGES = array("i", [5, 11, 2, 3, 4, 0, 9, 8])  # of the pool


def numbers(pages: int, device: str) -> Tensor:
    return torch.randn(pages, *SHAPE, device="cpu").to(torch.bfloat16).to(device)


def chosen(host: Tensor) -> list[Tensor]:
    return [host[first:last] for first, last in ON_HOST]


def check_load(pool: Tensor, host: Tensor, copies: PageCopies | None = None) -> None:
    expected, before = pool.cpu(), host.clone()
    expected[list(PAGES)] = torch.cat(chosen(host))
    (copies or PageCopies()).load(pool, PAGES, chosen(host))
    assert torch.equal(pool.cpu(), expected) and torch.equal(host, before)


def check_store(pool: Tensor, host: Tensor, copies: PageCopies | None = None) -> None:
    expected, before, at = host.clone(), pool.clone(), 0
    for first, last in ON_HOST:
        expected[first:last] = pool.cpu()[list(PAGES[at : at + last - first])]
        at += last - first
    (copies or PageCopies()).store(pool, PAGES, chosen(host))
    if pool.is_cuda:
        torch.cuda.synchronize()
    assert torch.equal(host, expected) and torch.equal(pool, before)


@pytest.mark.parametrize("check", [check_load, check_store])
def test_on_the_cpu(check: Any) -> None:
    check(numbers(12, "cpu"), numbers(24, "cpu"))


@pytest.mark.cuda
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("check", [check_load, check_store])
def test_on_a_gpu(check: Any, pinned: bool) -> None:
    """Pinned memory is read and written where it is, other memory by the driver; layer by layer, and anew."""
    for _ in range(3):
        copies = PageCopies()
        host = numbers(3 * 24, "cpu")
        host = host.pin_memory() if pinned else host
        assert addressable(host[3:4]) == pinned
        for layer in host.split(24):
            check(numbers(12, "cuda"), layer, copies)


@pytest.mark.cuda
def test_layers_that_lie_elsewhere() -> None:
    """Distances differ from layer to layer, on either side or in number."""
    copies = PageCopies()
    host, pool = numbers(24, "cpu").pin_memory(), numbers(12, "cuda")
    expected = pool.cpu()
    for pages, runs in (
        ([1, 2, 3], [(0, 3)]),
        ([1, 2, 3], [(4, 5), (9, 11)]),
        ([3, 8, 0], [(4, 5), (9, 11)]),
        ([7], [(1, 2)]),
    ):
        parts = [host[first:last] for first, last in runs]
        expected[pages] = torch.cat(parts)
        copies.load(pool, array("i", pages), parts)
        assert torch.equal(pool.cpu(), expected)


def test_what_the_kernel_cannot_address() -> None:
    pages = numbers(4, "cpu")
    assert not addressable(pages)  # not pinned
    assert not addressable(pages.transpose(1, 2)) and not addressable(
        torch.empty(100, dtype=torch.int16)[1:].view(9, 11)
    )


def test_registers() -> None:
    """As many as an attention program leaves free on its multiprocessor; loads and stores of 16 bytes."""
    distances, pages = torch.empty(2, 4, dtype=torch.int64), torch.empty(4, 1 << 16, dtype=torch.bfloat16)
    with compile_only.target(90):
        launch = kernels.copy_launch(distances, pages, pages.clone(), 1 << 17, Extent(4))
        kernel = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
    resources = compile_only.resources(kernel)
    assert resources.spilled == 0 and resources.registers <= 32 and not resources.shared, resources
    assert kernel.asm["ptx"].count(".v2.b64") + kernel.asm["ptx"].count(".v4.b32") == 8
