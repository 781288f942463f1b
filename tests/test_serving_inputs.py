"""How a request's inputs are checked, and come to where a graph reads them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hstu_compile.serving.padding import _fill
from hstu_compile.serving.sizes import Size
from hstu_compile.serving.staging import Staging, array


def sizes() -> tuple[str, list[Size]]:
    """A symbol n, and n, n - 1, n // 2 and 3."""

    def views(x: Tensor) -> tuple[Tensor, ...]:
        return x[:], x[1:], x[: x.shape[0] // 2], x.new_zeros(3)

    gm = make_fx(views, tracing_mode="symbolic")(torch.zeros(10))
    (output,) = gm.graph.find_nodes(op="output")
    known = [node.meta["val"].shape[0] for node in output.args[0]]
    return str(known[0]), [Size(n) for n in known]


def test_sizes() -> None:
    n, (whole, less, half, three) = sizes()
    assert [size.of({n: 8}) for size in (whole, less, half, three)] == [8, 7, 4, 3]
    assert [size.of({"another": 8}) for size in (whole, less, half, three)] == [None, None, None, 3]
    symbols: dict[str, int] = {}
    less.check("x", 7, symbols)
    assert symbols == {n: 8}
    for size, right in ((whole, 8), (half, 4), (three, 3)):
        size.check("x", right, symbols)
        with pytest.raises(ValueError, match=f"a size of x is 9, expected {right}"):
            size.check("x", 9, symbols)
    half.check("x", 9, {})  # of what it is half is not known


DTYPES = [torch.int64, torch.int32, torch.bool, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


def test_staging_of_all_dtypes() -> None:
    """Numpy does not have all of them."""
    initial = [torch.tensor([1, 0, 3]).to(dtype) for dtype in DTYPES]
    staging = Staging([*initial, torch.tensor(5)], torch.device("cpu"))
    given = [torch.tensor([0, 7, 1]).to(dtype) for dtype in DTYPES]
    for room, x in zip(staging.rooms(), given, strict=False):
        room[...] = array(x)
    as_before = [x.clone() for x in staging.tensors]
    staging.send()
    for before, x, now, expected in zip(initial, as_before, staging.tensors, given, strict=False):
        assert torch.equal(x.view(torch.int8), before.view(torch.int8))
        assert torch.equal(now.view(torch.int8), expected.view(torch.int8)) and now.dtype == expected.dtype
    assert staging.tensors[-1].tolist() == 5
    staging.sent()
    staging.rooms()[-1][...] = 6  # not where it may still be read from
    staging.send()
    assert staging.tensors[-1].tolist() == 6 and torch.equal(staging.tensors[0], initial[0])


@pytest.mark.parametrize(
    "shape, varying, dtype",
    [
        ((3,), [(0, "tokens")], torch.bfloat16),
        ((3,), [(0, "sequences")], torch.int64),
        ((3,), [(0, "offsets")], torch.int32),
        ((3, 2), [(1, "sequences")], torch.bfloat16),
    ],
)
def test_an_input_on_the_host_is_padded_like_one_on_the_device(
    shape: tuple[int, ...], varying: list[Any], dtype: torch.dtype
) -> None:
    room = tuple(5 if dim == varying[0][0] else n for dim, n in enumerate(shape))
    given, tensor = torch.arange(6).to(dtype)[: torch.Size(shape).numel()].view(shape), torch.full(room, 9).to(dtype)
    host = tensor.clone()
    _fill(tensor, given, varying, 50)
    _fill(array(host), array(given), varying, 50)
    assert torch.equal(tensor, host)
    if varying == [(0, "offsets")]:
        assert tensor.tolist() == [0, 1, 2, 2, 50]
    else:
        assert (tensor.narrow(varying[0][0], shape[varying[0][0]], 1) == (9 if varying[0][1] == "tokens" else 0)).all()
