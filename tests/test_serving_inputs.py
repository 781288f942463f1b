"""How a request's inputs are checked, and come to where a graph reads them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.testing import assert_close

from hstu_compile.passes import picked_inputs
from hstu_compile.passes.graph import same_shape, shape
from hstu_compile.serving.padding import Rows, _fill
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2), (0, 3)])
def test_new_rows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Selected where an input is, into a room on the host or the device, whatever its strides; of no tokens: zeros."""
    rows = torch.tensor([1, 4, 5, 5])
    size = torch.Size(shape).numel()
    x = (torch.arange(size) % 3).to(dtype).view(shape)
    expected = x[rows] if size else torch.zeros(4, *shape[1:], dtype=dtype)
    strided = torch.cat([x.unsqueeze(-1)] * 2, dim=-1)[..., 0]
    new = Rows(rows, rows)
    for given in (x, strided):
        staging = Staging([torch.zeros_like(expected)], torch.device("cpu"))
        room = torch.zeros_like(expected)
        new.write(given, room)
        new.write(given, torch.from_numpy(staging.rooms()[0]).view(dtype))
        staging.send()
        for found in (new.of(given), room, staging.tensors[0]):
            assert found.dtype == dtype and torch.equal(found.view(torch.int8), expected.view(torch.int8))


def index(x: Tensor, rows: Tensor) -> Tensor:
    return torch.ops.aten.index.Tensor(x, [rows])


PICKED: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool]] = {
    "at the rows": (lambda x, rows: index(x, rows) * 2, True),
    "twice": (lambda x, rows: (index(x, rows), index(x, rows).sin()), True),
    "not at all": (lambda x, rows: rows * 2, True),
    "at other rows": (lambda x, rows: index(x, rows - 1), False),
    "at other rows, too": (lambda x, rows: index(x, rows) + index(x, rows - 1), False),
    "all": (lambda x, rows: x * 2, False),
    "all, too": (lambda x, rows: index(x, rows) + x.sum(), False),
    "its number": (lambda x, rows: index(x, rows) * x.shape[0], False),
    "returned": (lambda x, rows: (x, index(x, rows)), False),
    "along another dimension": (lambda x, rows: torch.ops.aten.index.Tensor(x, [None, rows % 3]), False),
    "as rows": (lambda x, rows: index(rows, x[:, 0].long()), False),
}


@pytest.mark.parametrize("function, is_picked", PICKED.values(), ids=PICKED)
def test_inputs_that_are_read_at_rows_only(function: Callable[[Tensor, Tensor], Any], is_picked: bool) -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    row = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    fake = mode.from_tensor(torch.zeros(9, 3), symbolic_context=sizes)
    with mode:
        gm = make_fx(function)(fake, mode.from_tensor(torch.zeros(4, dtype=torch.int64), symbolic_context=row))
    node, rows = gm.graph.find_nodes(op="placeholder")
    assert picked_inputs.run([node], rows) == ({node} if is_picked else set())
    gm.graph.lint()
    gm.recompile()
    x, at = torch.randn(9, 3), torch.tensor([1, 4, 7, 8, 8])
    assert_close(gm(x[at] if is_picked else x, at), function(x, at), rtol=0, atol=0)
    assert same_shape(shape(node), (shape(rows)[0], 3) if is_picked else fake.shape)
