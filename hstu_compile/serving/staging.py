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
    """`tensors` on the device are the `rooms` on the host that were written before the last `send`.

    There are two sets of rooms, which take turns: the host writes to one while the other is still being copied.

    Args:
        initial: what they hold at first, on the CPU.
    """

    def __init__(self, initial: Sequence[Tensor], device: torch.device) -> None:
        sizes = [-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in initial]
        *begins, total = itertools.accumulate(sizes, initial=0)

        def views(memory: Tensor) -> list[Tensor]:
            at = zip(initial, begins, strict=True)
            return [memory[begin : begin + x.nbytes].view(x.dtype).view(x.shape) for x, begin in at]

        is_cuda = device.type == "cuda"
        self._hosts = [torch.zeros(total, dtype=torch.uint8, device="cpu", pin_memory=is_cuda) for _ in range(2)]
        self._rooms = [[array(x) for x in views(host)] for host in self._hosts]
        self._read = [torch.cuda.Event() for _ in self._hosts] if is_cuda else []
        self._turn = 0
        for room, x in zip((room for rooms in self._rooms for room in rooms), [*initial] * 2, strict=True):
            room[...] = array(x)
        self._device = torch.empty_like(self._hosts[0], device=device)
        self.tensors = views(self._device)
        self.send()
        self.sent()

    def rooms(self) -> list[np.ndarray]:
        """To be written to on the host before `send`, see `array`; waits until they have been read."""
        self._turn = 1 - self._turn
        if self._read:
            self._read[self._turn].synchronize()
        return self._rooms[self._turn]

    def send(self) -> None:
        """Copy all, in the order of the current stream."""
        self._device.copy_(self._hosts[self._turn], non_blocking=True)

    def sent(self) -> None:
        """To be called once after each `send`, when nothing that waits for the copy is left to be launched."""
        if self._read:
            self._read[self._turn].record()


def array(x: Tensor) -> np.ndarray:
    """What is in the memory of a tensor on the CPU; of floats that numpy has not, the bits."""
    if x.dtype.is_floating_point and x.dtype not in NUMPY_FLOATS:
        x = x.view(BITS[x.itemsize])
    return x.numpy(force=True)
