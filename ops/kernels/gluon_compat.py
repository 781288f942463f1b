"""Gluon's names for Hopper, whatever triton calls them: read in 3.6, 3.7, 3.8 and 3.9.

`PROBLEM` is None, or why this triton cannot compile the Hopper kernels (the portable ones then run).
"""

PROBLEM: str | None = None

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia import hopper

    class TensorDescriptor(hopper.TensorDescriptor):
        """Without the checks of every call: attention_sm90 makes sure of what they check."""

        def __post_init__(self) -> None:
            pass

    # 3.6 and 3.7 say async_copy_global_to_shared; 3.8 replaced it by async_load, with the same arguments.
    async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
    thread_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # of a partition
except (ImportError, AttributeError) as error:
    PROBLEM = f"this triton's Gluon lacks what the Hopper kernels need ({error})"

__all__ = [
    "PROBLEM",
    "TensorDescriptor",
    "async_load",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "thread_barrier",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
