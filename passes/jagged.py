"""Between the jagged layout [T, ...] and the padded one [B, N, ...]: what is known of a change, and fbgemm's calls."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from hstu_compile.passes.graph import argument, insert_call, number

_PAD = {"fbgemm::jagged_to_padded_dense", "fbgemm::jagged_to_padded_dense_forward"}
_UNPAD = {"fbgemm::dense_to_jagged", "fbgemm::dense_to_jagged_forward"}


@dataclass(frozen=True)
class Padded:
    """[T, ...] -> [B, max_seq_len, ...]"""

    node: fx.Node
    values: fx.Node
    offsets: fx.Node
    max_seq_len: int | fx.Node
    padding: float | int | None


@dataclass(frozen=True)
class Unpadded:
    """[B, N, ...], or [B * N, ...], -> [T, ...], in `result`; T is as the code says, or as the offsets do.

    again(dense, T, before): the same of another [B, N, F], inserted before a node.
    """

    node: fx.Node
    result: fx.Node
    dense: fx.Node
    offsets: fx.Node
    again: Callable[[fx.Node, int | fx.Node, fx.Node], fx.Node]


def _name(node: fx.Node) -> str:
    name = getattr(node.target, "name", None)
    return name().removesuffix(".default") if node.op == "call_function" and callable(name) else ""


def padded_by_call(node: fx.Node) -> Padded | None:
    """The call behind a padded tensor with one jagged dimension, under any of its names."""
    if _name(node) not in _PAD:
        return None
    values, offsets, sizes = (argument(node, i, name) for i, name in enumerate(("values", "offsets", "max_lengths")))
    if len(offsets) != 1 or len(sizes) != 1:
        return None
    return Padded(node, values, offsets[0], sizes[0], number(argument(node, 3, "padding_value", 0.0)))


def unpadded_by_call(node: fx.Node) -> Unpadded | None:
    """The call that makes a padded tensor jagged, under any of its names."""
    if _name(node) not in _UNPAD:
        return None
    dense, offsets = (argument(node, i, name) for i, name in enumerate(("dense", "x_offsets")))
    gives_list = not _name(node).endswith("_forward")
    result = node
    if gives_list:
        values = _parts(node, 0)
        if len(values) != 1 or _parts(node, 1):
            return None
        (result,) = values
    if len(offsets) != 1:
        return None

    def again(other: fx.Node, total: int | fx.Node, before: fx.Node) -> fx.Node:
        jagged = insert_call(node.graph, before, node.target, (other, [offsets[0]], total), like=before)  # type: ignore
        if gives_list:
            jagged = insert_call(node.graph, before, operator.getitem, (jagged, 0), like=before)
        return jagged

    return Unpadded(node, result, dense, offsets[0], again)


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
