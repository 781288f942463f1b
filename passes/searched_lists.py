"""Lists that are searched get memory of their own.

On a GPU Inductor reads the boundaries of `bucketize` and `searchsorted` from where their memory begins, also where they
are a slice, offsets[1:], that begins later (pytorch/pytorch#160964; read in torch 2.11, where a compiled
bucketize(row, offsets[1:]) is off by one). Models find the sequence of a token that way. A clone would not help:
Inductor takes one that moves nothing for the slice itself. So the list is clamped at the least number there is.
"""

import torch
from torch import fx

from hstu_compile.passes.graph import aten, insert_call, is_call, is_tensor, share_storage, value

_LISTS = {  # where the list is among the arguments
    aten.bucketize.Tensor: 1,
    aten.bucketize.Scalar: 1,
    aten.searchsorted.Tensor: 0,
    aten.searchsorted.Scalar: 0,
}


def as_whole(graph: fx.Graph) -> None:
    """Compute every searched list anew that is a view made in this graph."""
    for node in list(graph.nodes):
        if is_call(node, *_LISTS):
            searched = node.args[_LISTS[node.target]]
            if any(is_tensor(source) and share_storage(source, searched) for source in searched.all_input_nodes):
                dtype = value(searched).dtype
                least = float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
                whole = insert_call(graph, node, aten.clamp.default, (searched, least), like=node)
                node.replace_input_with(searched, whole)
