"""fbgemm's calls between the jagged layout [T, D] and the padded one [B, N, D], under all their names."""

import operator
from dataclasses import dataclass

from torch import fx

from hstu_compile.passes.graph import argument, number

_PAD = {"fbgemm::jagged_to_padded_dense", "fbgemm::jagged_to_padded_dense_forward"}
_UNPAD = {"fbgemm::dense_to_jagged", "fbgemm::dense_to_jagged_forward"}


@dataclass(frozen=True)
class Padded:
    """[T, D] -> [B, max_seq_len, D]"""

    node: fx.Node
    values: fx.Node
    offsets: fx.Node
    max_seq_len: int | fx.Node
    padding: float | int | None


@dataclass(frozen=True)
class Unpadded:
    """[B, N, D] -> [T, D]; `result` is the node that holds the values. T is as the code says, or as the offsets do."""

    node: fx.Node
    result: fx.Node
    dense: fx.Node
    offsets: fx.Node


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "name", None)
    return name().removesuffix(".default") if node.op == "call_function" and callable(name) else ""


def as_padded(node: fx.Node) -> Padded | None:
    """The call behind a padded tensor with one jagged dimension."""
    if _name(node) not in _PAD:
        return None
    values, offsets, sizes = (argument(node, i, name) for i, name in enumerate(("values", "offsets", "max_lengths")))
    if len(offsets) != 1 or len(sizes) != 1:
        return None
    return Padded(node, values, offsets[0], sizes[0], number(argument(node, 3, "padding_value", 0.0)))


def as_unpadded(node: fx.Node) -> Unpadded | None:
    """The call that makes a padded tensor jagged."""
    if _name(node) not in _UNPAD:
        return None
    dense, offsets = (argument(node, i, name) for i, name in enumerate(("dense", "x_offsets")))
    result = node
    if not _name(node).endswith("_forward"):
        values = _parts(node, 0)
        if len(values) != 1 or _parts(node, 1):
            return None
        (result,) = values
    return Unpadded(node, result, dense, offsets[0]) if len(offsets) == 1 else None


def read_offsets_at_their_source(graph: fx.Graph) -> None:
    """dense_to_jagged returns the offsets that it was given: let the next layer, which reads those, read these."""
    for node in list(graph.nodes):
        if _name(node) in _UNPAD:
            for offsets in _parts(node, 1):
                for part in list(offsets.users):
                    if part.target is operator.getitem:
                        part.replace_all_uses_with(argument(node, 1, "x_offsets")[part.args[1]])
                        graph.erase_node(part)
                if not offsets.users:
                    graph.erase_node(offsets)


def _parts(node: fx.Node, index: int) -> list[fx.Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]
