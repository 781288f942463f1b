"""For racecheck, a hand-over that is certainly right: every lane of a warp stores a value, then one lane arrives.

The warp's barrier stands between its stores and the arrival, so that who waits for the arrival sees all 32 values.
"""

import torch

from hstu_compile.ops.kernels.attention_sm90_tiles import barriers
from hstu_compile.ops.kernels.gluon_compat import gl, gluon, mbarrier

HAND_OVERS = 4


@gluon.jit
def give(values, full, empty, number):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for i in range(0, number):
        mbarrier.wait(empty.index(0), (i & 1) ^ 1)
        values.store(gl.full((32,), i + 1, gl.int64, layout))
        mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def take(out, values, full, empty, number):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    for i in range(0, number):
        mbarrier.wait(full.index(0), i & 1)
        taken = values.load(layout)
        mbarrier.arrive(empty.index(0), count=1)
        gl.store(out + i * 32 + gl.arange(0, 32, layout=layout), taken)


@gluon.jit
def kernel(out, number, num_warps: gl.constexpr):
    # 64 bits: stores of 16 or 32 become stmatrix, which racecheck does not see.
    values = gl.allocate_shared_memory(gl.int64, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full, empty = barriers(1, 1, 1)
    gl.warp_specialize(
        [(take, (out, values, full, empty, number)), (give, (values, full, empty, number))], [1], [24]
    )  # fmt: skip


if __name__ == "__main__":
    out = torch.zeros(HAND_OVERS, 32, dtype=torch.int64, device="cuda")
    kernel[(1,)](out, HAND_OVERS, num_warps=4)
    assert (out.T == torch.arange(1, HAND_OVERS + 1, device="cuda")).all(), out
