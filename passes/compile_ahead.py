"""The kernels of our ops are compiled while Inductor compiles the rest.

The joint graph has the calls of our ops as they will run, forward and backward. A graph from PyTorch's caches goes
through no pass, and its kernels are in Triton's cache on disk.
"""

import logging
import os
from typing import Any

from torch import Tensor, fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.runtime.cache_dir_utils import triton_cache_dir

from hstu_compile.ops.compile_ahead import OpCall, TensorLike, compile_ahead
from hstu_compile.ops.implementation import IMPLEMENTATIONS
from hstu_compile.ops.kernel_table import has_kernels
from hstu_compile.passes.graph import at_hints, value
from hstu_compile.passes.index_space import symbol_hints

log = logging.getLogger("hstu_compile")


class CompileAhead(CustomGraphPass):
    """A pass over the joint graph that leaves it as it is, for Inductor's `joint_custom_pre_pass`."""

    def __call__(self, graph: fx.Graph) -> None:
        try:
            calls = op_calls(graph)
            if calls:
                device = next(x.device for x in calls[0].arguments if isinstance(x, TensorLike))
                # Where Inductor has Triton's cache, as it is going to say: torch 2.11, 2.13 (CachingAutotuner).
                os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index))
                compile_ahead(calls, config.compile_threads)
        except Exception:  # every launch compiles what it needs
            log.debug("hstu_compile: no kernel is compiled ahead", exc_info=True)

    def uuid(self) -> Any:
        return "hstu_compile.compile_ahead"


def op_calls(graph: fx.Graph) -> list[OpCall]:
    """Those that run kernels, at the sizes that the graph was captured with."""
    hints = symbol_hints(graph)

    def at_capture(arg: Any) -> Any:
        known = value(arg)
        if not isinstance(known, Tensor):
            return at_hints(known, hints)
        shape, stride = (tuple(at_hints(n, hints) for n in numbers) for numbers in (known.shape, known.stride()))
        return TensorLike(shape, stride, at_hints(known.storage_offset(), hints), known.dtype, known.device)

    calls = (node for node in graph.nodes if node.target in IMPLEMENTATIONS and has_kernels(value(node.args[0]).device))
    return [OpCall(node.target, tuple(map(at_capture, node.args))) for node in calls]
