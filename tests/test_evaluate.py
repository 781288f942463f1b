"""Nodes of a graph computed on the CPU."""

import torch
from torch import fx, nn

from hstu_compile.passes.evaluate import Evaluation


def test_what_it_reads_and_computes() -> None:
    """Of the inputs those that matter; attributes as they are at the call; everything on the CPU."""
    module = nn.Module()
    module.register_buffer("step", torch.tensor(2))
    graph = fx.Graph()
    unused, x = graph.placeholder("unused"), graph.placeholder("x")
    product = graph.call_function(torch.mul, (x, graph.get_attr("step")))
    row = graph.call_function(torch.arange, (3,), {"device": torch.device("meta")})
    total = graph.call_function(torch.add, (product, row))
    graph.output(total)
    fx.GraphModule(module, graph)
    evaluation = Evaluation([total, x], [unused, x])
    assert evaluation.reads == [x]
    given = torch.tensor([1, 2, 3])
    assert evaluation([given])[0].tolist() == [2, 5, 8]
    module.step.fill_(3)
    found, same = evaluation([given])
    assert found.tolist() == [3, 7, 11] and same is given
