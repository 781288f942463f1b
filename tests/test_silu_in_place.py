"""silu of a projection whose parts are read is computed where it stands; everything else is left alone."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import tests.fbgemm_stand_ins  # noqa: F401
from hstu_compile.passes import silu_in_place
from tests.tracing import traced

W = torch.randn(8, 6)  # [out, in]
BIAS = torch.randn(8)

Function = Callable[[Tensor, Tensor, Tensor], object]
REWRITTEN: dict[str, Function] = {
    "chunk": lambda x, w, b: F.silu(F.linear(x, w, b)).chunk(4, -1),
    "addmm, split": lambda x, w, b: F.silu(torch.addmm(b, x, w.T)).split([2, 2, 1, 3], dim=-1),
    "heads, unbound": lambda x, w, b: F.silu(x @ w.T).unflatten(-1, (4, 2)).unbind(1),
    "slices": lambda x, w, b: (lambda y: (y[:, :3], y[:, 3:]))(F.silu(F.linear(x, w))),
}
LEFT: dict[str, Function] = {
    "of one part": lambda x, w, b: F.silu(F.linear(x, w).chunk(4, -1)[0]),
    "read before, too": lambda x, w, b: (lambda y: (F.silu(y).chunk(2, -1), y + 1))(F.linear(x, w)),
    "of an input": lambda x, w, b: F.silu(x).chunk(2, -1),
    "read whole": lambda x, w, b: F.linear(F.silu(F.linear(x, w)), w.T),
    "one slice": lambda x, w, b: F.silu(F.linear(x, w))[:, :3],
}


def rewritten(function: Function) -> tuple[fx.GraphModule, int]:
    gm = traced(lambda w, b, x: function(x, w, b), [torch.randn(5, 6)], fixed=[W, BIAS])
    count = silu_in_place.run(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm, count


CASES = [(name, function, 1) for name, function in REWRITTEN.items()]
CASES += [(name, function, 0) for name, function in LEFT.items()]


@pytest.mark.parametrize("function, count", [pytest.param(*case, id=name) for name, *case in CASES])
def test_rewritten_or_left_alone(function: Function, count: int) -> None:
    gm, found = rewritten(function)
    x = torch.randn(9, 6)
    assert found == count
    torch.testing.assert_close(gm(W, BIAS, x), function(x, W, BIAS), rtol=0, atol=0)


def test_compiled() -> None:
    """Nothing is copied for it: the projection is written, and its parts are read from there."""
    gm, _ = rewritten(REWRITTEN["chunk"])
    x = torch.randn(9, 6)
    with torch.no_grad():
        parts = torch.compile(gm, fullgraph=True)(W, BIAS, x)
    torch.testing.assert_close(list(parts), list(F.silu(F.linear(x, W, BIAS)).chunk(4, -1)))
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1


def test_op() -> None:
    torch.library.opcheck(torch.ops.hstu_compile.silu_.default, (torch.randn(3, 4),))
    with pytest.raises(RuntimeError, match="silu_ has no gradient"):
        torch.ops.hstu_compile.silu_(torch.randn(3, 4, requires_grad=True))
