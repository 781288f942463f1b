"""Whether a tensor holds nothing but zeros and ones, told from how it is made."""

from typing import Any

import torch
from torch import fx

from hstu_compile.passes.axes import LAYOUT
from hstu_compile.passes.contents import assume, content
from hstu_compile.passes.graph import CASTS, COPIES, argument, aten, is_call, is_tensor, number, value

_MOVES = {
    *LAYOUT,
    *COPIES,
    *CASTS,
    aten.detach.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.index.Tensor,
    aten.index_select.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.tril.default,
    aten.triu.default,
}
_PRODUCTS = {
    aten.mul.Tensor,
    aten.multiply.Tensor,
    aten.minimum.default,
    aten.maximum.default,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.bitwise_xor.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
}


def is_zero_or_one(node: Any) -> bool:
    """True only where every element is 0 or 1, whatever the inputs of the graph are that may change."""
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return number(node) in (0, 1)
    if value(node).dtype == torch.bool or number(node) in (0, 1):
        return True
    if (known := content(node)) is not None and known.is_zero_or_one:
        assume(node)
        return True
    if is_call(node, *_MOVES):
        return is_zero_or_one(node.args[0])
    if is_call(node, *_PRODUCTS):
        return all(map(is_zero_or_one, node.args))
    if is_call(node, aten.rsub.Scalar, aten.sub.Tensor):
        other, one = node.args[:2] if is_call(node, aten.rsub.Scalar) else node.args[1::-1]
        return number(one) == 1 and argument(node, 2, "alpha", 1) == 1 and is_zero_or_one(other)
    if is_call(node, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar):
        return all(map(is_zero_or_one, node.args[1:]))
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return is_zero_or_one(node.args[0]) and is_zero_or_one(node.args[2])
    return False
