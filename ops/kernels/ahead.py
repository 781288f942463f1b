"""Kernels that are compiled before they are launched, in threads.

Triton's passes, ptxas and, in triton 3.6, the C compiler that makes a launcher for each signature, work outside of
Python's lock.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode

log = logging.getLogger("hstu_compile")


class Rehearsed(NamedTuple):
    """A launch that was not done."""

    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    device: int  # -1: not a GPU


_rehearsed: ContextVar[list[Rehearsed] | None] = ContextVar("rehearsed", default=None)
_pending: dict[int, list[threading.Thread]] = {}  # by the id of a kernel, which lives as long as its module


class Addresses(TorchFunctionMode):
    """Within it, tensors without memory have addresses, as if all their memory began at 0."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.data_ptr:
            return args[0].storage_offset() * args[0].element_size()
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def rehearsal() -> Iterator[list[Rehearsed]]:
    """Within it, and in this thread, `launch_kernel` only tells what it was called with."""
    launches: list[Rehearsed] = []
    token = _rehearsed.set(launches)
    try:
        with Addresses():
            yield launches
    finally:
        _rehearsed.reset(token)


def is_rehearsal() -> bool:
    return _rehearsed.get() is not None


def launch_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> Any:
    """kernel[grid](...), as all kernels are launched the public way; the compiled kernel, None in a rehearsal."""
    launches = _rehearsed.get()
    if launches is not None:
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        launches.append(Rehearsed(kernel, arguments, constants, device))
        return None
    if _pending:
        wait_for(kernel)
    return kernel[grid](*arguments, **constants)


def wait_for(kernel: Any) -> None:
    """Until all that is being compiled of the kernel has been, rather than to compile the same again."""
    for thread in _pending.get(id(kernel), ()):
        thread.join()
    _pending.pop(id(kernel), None)


def compile_in_background(launches: list[Rehearsed], threads: int | None) -> None:
    """So many at a time; None: as there are processors. No two at a time that may be one and the same."""
    alike: dict[tuple[int, str], list[Rehearsed]] = {}
    for launch in launches:
        with torch.cuda.device(launch.device):
            _prepare(launch.kernel)
        alike.setdefault((id(launch.kernel), repr(launch.constants)), []).append(launch)
    turns = threading.Semaphore(threads or os.cpu_count() or 1)
    for (kernel, _), group in alike.items():
        thread = threading.Thread(target=_compile, args=(group, turns), name="hstu_compile")
        thread.start()
        _pending.setdefault(kernel, []).append(thread)


def _prepare(kernel: Any) -> None:
    """What Triton finds out about a kernel once, and in several threads at a time not well (read in 3.6, 3.7 and 3.9):
    where one of two keeps what it compiles is lost, and the key in the cache on disk depends on how far the other is.
    """
    _ = kernel.device_caches[triton.runtime.driver.active.get_current_device()], kernel.cache_key


def _compile(launches: list[Rehearsed], turns: threading.Semaphore) -> None:
    for launch in launches:
        with turns:
            if not threading.main_thread().is_alive():  # the interpreter exits, and waits for this thread
                return
            try:
                with torch.cuda.device(launch.device), Addresses():
                    compiled = launch.kernel.warmup(*launch.arguments, **launch.constants, grid=(1,))
                    # What it makes is left in the cache on disk.
                    triton.runtime.driver.active.launcher_cls(compiled.src, compiled.metadata)
            except Exception:  # the launch compiles again, and says what is wrong
                log.debug("hstu_compile: a kernel was not compiled ahead", exc_info=True)
