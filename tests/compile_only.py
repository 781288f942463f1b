"""Compiles Triton kernels for a GPU that is not there, and reads what they would take of it."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

# Bytes of shared memory that one program may use, by compute capability (CUDA C programming guide, "Technical
# Specifications per Compute Capability").
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


class Resources(NamedTuple):
    shared: int  # bytes
    registers: int  # a thread
    spilled: int  # bytes a thread


class _Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what Triton caches kernels by

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(capability: int):
    """Within it, `kernel.warmup(...)` compiles for that GPU (Triton's own driver is restored after)."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(_Driver(capability))
    try:
        yield
    finally:
        config._active = before


def resources(compiled: Any) -> Resources:
    """Read from the binary."""
    text = _read(compiled, "cuobjdump", "-res-usage")
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(compiled.metadata.shared, usage["REG"], usage["STACK"] + usage["LOCAL"])


def sass(compiled: Any) -> str:
    """What the GPU executes."""
    return _read(compiled, "nvdisasm", "-c")


def _read(compiled: Any, tool: str, option: str) -> str:
    """The output of a tool that comes with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
