"""Pages by their addresses, from host memory to the GPU or back, in Triton: the link is read and written by a kernel.

A program is one warp of 32 registers a thread: it finds room on a multiprocessor beside an attention program, which
takes all registers but so many. A copy of 2 KB is four loads of 16 bytes a thread; one in flight on each multiprocessor
is more than the link holds.
"""

import functools
from collections.abc import Hashable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from hstu_compile.ops.kernels.launch import Extent, Launch, processors, run

BLOCK = 256  # words of 8 bytes
ALIGNMENT = tl.constexpr(16)  # bytes, of every address


@triton.jit(do_not_specialize=["number"])
def copy_pages_kernel(addresses, number, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """addresses: int64 [2, number], from where and to where; a page has WORDS."""
    PIECES: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    for i in range(tl.program_id(0), number * PIECES, tl.num_programs(0)):
        page = i // PIECES
        words = i % PIECES * BLOCK + tl.arange(0, BLOCK)
        source = tl.load(addresses + page).to(tl.pointer_type(tl.int64))
        target = tl.load(addresses + number + page).to(tl.pointer_type(tl.int64))
        values = tl.load(tl.multiple_of(source, ALIGNMENT) + words, mask=words < WORDS)
        tl.store(tl.multiple_of(target, ALIGNMENT) + words, values, mask=words < WORDS)


def copy_pages(addresses: Tensor, page_bytes: int, memory: dict[Hashable, Any] | None = None) -> None:
    """From addresses[0] to addresses[1], in the order of the current stream.

    addresses: int64 [2, number], on the GPU; each a multiple of ALIGNMENT, as page_bytes is.
    memory: as in paged_attention_triton.
    """
    extent = Extent(addresses.shape[1])
    run(memory, page_bytes, (addresses,), extent, lambda _: [copy_launch(addresses, page_bytes, extent)])


def copy_launch(addresses: Tensor, page_bytes: int, extent: Extent) -> Launch:
    sizes = functools.partial(copy_sizes, processors(addresses.device))
    programs, numbers = sizes(extent)
    constants = {"WORDS": page_bytes // 8, "BLOCK": BLOCK, "num_warps": 1, "maxnreg": 32}
    return Launch(copy_pages_kernel, programs, (addresses, *numbers.values()), constants, sizes)


def copy_sizes(sms: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return sms, {"number": extent.rows}
