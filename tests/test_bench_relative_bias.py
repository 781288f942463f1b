"""What bench/relative_bias.py compares is one thing in three spellings, or two."""

import pytest
import torch
from error_budget import BACKWARD, FORWARD, assert_within_budget

from bench.relative_bias import LAYOUTS, Inputs, attention, inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table_heads", [1, 2])
def test_tensor_and_tables_are_the_same_bias(layout: str, table_heads: int) -> None:
    torch.manual_seed(0)
    given = inputs(layout, 3, 50, 2, 32, table_heads, DEVICE)

    def results(kind: str, given: Inputs) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in (*given.qkv, *given.tables)]
        out = attention(kind, given, *leaves)
        return [out, *torch.autograd.grad(out, leaves, given.dout)]

    wide = given._replace(qkv=[t.double() for t in given.qkv], tables=[t.double() for t in given.tables])
    wide = wide._replace(dout=given.dout.double())
    of_tables, of_tensor = (results(kind, given) for kind in ("relative bias", "bias tensor"))
    for i, (ours, eager, exact) in enumerate(zip(of_tables, of_tensor, results("bias tensor", wide), strict=True)):
        assert_within_budget(ours, eager, exact, BACKWARD if i else FORWARD)
