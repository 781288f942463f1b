"""The stand-ins for fbgemm's jagged ops give what fbgemm gives, and never wait for the device when told the size."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fbgemm_stand_ins import pad, unpad

LENGTHS = {
    "all kinds": [3, 0, 5, 1],
    "longer than N": [9, 4, 12],
    "empty at the ends": [0, 2, 0],
    "no token": [0, 0],
    "no sequence": [],
}
WAITS = {"nonzero", "_local_scalar_dense", "masked_select", "unique"}  # also what a boolean index is made of


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        indices = args[1] if self.names[-1] in ("index", "index_put") else []
        self.names += ["nonzero" for index in indices if index is not None and index.dtype == torch.bool]
        return func(*args, **kwargs or {})


def offsets_of(name: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    return torch.nn.functional.pad(torch.tensor(LENGTHS[name], dtype=dtype, device=device).cumsum(0), (1, 0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "no sequence"])
def test_as_fbgemm(name: str, index: torch.dtype, dtype: torch.dtype) -> None:
    pytest.importorskip("fbgemm_gpu")
    offsets, fbgemm = [offsets_of(name, index)], torch.ops.fbgemm
    total = int(offsets[0][-1])
    values, dense = (torch.randn(shape).mul(9).to(dtype) for shape in ((total, 3), (len(LENGTHS[name]), 5, 3)))
    for padding in (0.0, -2.0):
        assert torch.equal(
            pad(values, offsets, [5], padding), fbgemm.jagged_to_padded_dense(values, offsets, [5], padding)
        )
    for size in (None, total, total + 4):
        assert torch.equal(unpad(dense, offsets, size), fbgemm.dense_to_jagged(dense, offsets, size)[0])
    unordered = dense.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(unpad(unordered, offsets, total), unpad(dense, offsets, total))


@pytest.mark.parametrize("name", LENGTHS)
def test_float64_there_and_back(name: str) -> None:
    offsets = offsets_of(name, torch.int64)
    total = int(offsets[-1])
    values = torch.randn(total, 2, dtype=torch.float64, requires_grad=True)
    back = unpad(pad(values, [offsets], [5]), [offsets], total)
    column = torch.arange(total) - offsets[torch.searchsorted(offsets, torch.arange(total), right=True) - 1]
    kept = (column < 5)[:, None].double()  # the others are cut off
    assert torch.equal(back, values * kept)
    if total:
        back.sum().backward()
        assert torch.equal(values.grad, kept.expand_as(values))
    assert unpad(torch.ones(len(offsets) - 1, 0, 2), [offsets], total).count_nonzero() == 0  # N = 0


def test_nothing_waits_for_the_device() -> None:
    offsets = [offsets_of("all kinds", torch.int64)]
    with Calls() as calls:
        unpad(pad(torch.ones(9, 2), offsets, [5]), offsets, 9)
    assert calls.names and not WAITS & set(calls.names)


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu() -> None:
    offsets = [offsets_of("all kinds", torch.int64, "cuda")]
    values = torch.ones(9, 2, device="cuda")
    mode = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        unpad(pad(values, offsets, [5]), offsets, 9)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
