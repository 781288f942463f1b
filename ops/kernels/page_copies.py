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


@triton.jit
def page_at(first, distance):
    """A pointer to words, aligned to 16 bytes."""
    address = tl.cast(first, tl.int64, bitcast=False) + distance
    return tl.multiple_of(tl.cast(address, tl.pointer_type(tl.int64), bitcast=False), 16)


@triton.jit(do_not_specialize=["number"])
def copy_pages_kernel(distances, source, target, number, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """distances: int64 [2, number], in bytes, of pages of so many words from source, and from target."""
    PIECES: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    for i in range(tl.program_id(0), number * PIECES, tl.num_programs(0)):
        page = i // PIECES
        words = i % PIECES * BLOCK + tl.arange(0, BLOCK)
        here = page_at(source, tl.load(distances + page))
        there = page_at(target, tl.load(distances + number + page))
        tl.store(there + words, tl.load(here + words, mask=words < WORDS), mask=words < WORDS)


def copy_pages(
    distances: Tensor, source: Tensor, target: Tensor, page_bytes: int, memory: dict[Hashable, Any] | None = None
) -> None:
    """In the order of the current stream; of source and target, the host's may be pinned memory.

    distances: int64 [2, number], bytes from where source and target begin, on the GPU; all a multiple of 16, as
        page_bytes is.
    memory: as in paged_attention_triton.
    """
    extent = Extent(distances.shape[1])
    tensors = distances, source, target
    run(memory, (page_bytes, source.dtype), tensors, extent, lambda _: [copy_launch(*tensors, page_bytes, extent)])


def copy_launch(distances: Tensor, source: Tensor, target: Tensor, page_bytes: int, extent: Extent) -> Launch:
    sizes = functools.partial(copy_sizes, processors(distances.device))
    programs, numbers = sizes(extent)
    constants = {"WORDS": page_bytes // 8, "BLOCK": BLOCK, "num_warps": 1, "maxnreg": 32}
    return Launch(copy_pages_kernel, programs, (distances, source, target, *numbers.values()), constants, sizes)


def copy_sizes(sms: int, extent: Extent) -> tuple[int, dict[str, int]]:
    return sms, {"number": extent.rows}
