"""Tensors at addresses of their own on the device, all filled from the host by one copy."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 256  # bytes, as an allocation of its own has it
NUMPY_FLOATS = (torch.float16, torch.float32, torch.float64)
BITS = {1: torch.int8, 2: torch.int16}  # of the others, by their size


class Staging:
    """`tensors` on the device are `rooms` on the host, as of the last `send`.

    Args:
        initial: what they hold at first, on the CPU.
    """

    def __init__(self, initial: Sequence[Tensor], device: torch.device) -> None:
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in initial]
        *begins, total = itertools.accumulate(sizes, initial=0)
        self._host = torch.zeros(total, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
        self._device = torch.zeros_like(self._host, device=device)

        def views(memory: Tensor) -> list[Tensor]:
            at = zip(initial, begins, strict=True)
            return [memory[begin : begin + x.nbytes].view(x.dtype).view(x.shape) for x, begin in at]

        self.tensors, self._rooms = views(self._device), [array(x) for x in views(self._host)]
        self._sent = torch.cuda.Event() if device.type == "cuda" else None
        for room, x in zip(self._rooms, initial, strict=True):
            room[...] = array(x)
        self.send()

    def rooms(self) -> list[np.ndarray]:
        """To be written to on the host, see `array`; waits until the last copy from there is over."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._rooms

    def send(self) -> None:
        """Copy all, in the order of the current stream."""
        self._device.copy_(self._host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


def array(x: Tensor) -> np.ndarray:
    """What is in the memory of a tensor on the CPU; of floats that numpy has not, the bits."""
    if x.dtype.is_floating_point and x.dtype not in NUMPY_FLOATS:
        x = x.view(BITS[x.itemsize])
    return x.numpy(force=True)
