"""What every pass needs of an FX graph: constants, gradients, new nodes with metadata, removal of dead ones."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

aten = torch.ops.aten

Size = int | torch.SymInt

CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    torch.ops.prims.convert_element_type.default,
}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default}


def value(arg: Any) -> Any:
    """The fake tensor or symbolic scalar behind a node; anything else is its own value."""
    return arg.meta.get("val") if isinstance(arg, fx.Node) else arg


def is_tensor(arg: Any) -> bool:
    return isinstance(value(arg), torch.Tensor)


def shape(node: fx.Node) -> tuple[Size, ...]:
    return tuple(value(node).shape)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every input of this graph; adds no guard."""
    return a is b or statically_known_true(a == b)


def same_shape(a: Iterable[Size], b: Iterable[Size]) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def is_call(node: Any, *targets: Callable) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def is_cast(node: Any) -> bool:
    """A conversion between floating dtypes, or a copy: the same numbers up to rounding."""
    return is_call(node, *CASTS, *COPIES) and is_floating(node) and is_floating(node.args[0])


def is_floating(node: Any) -> bool:
    return is_tensor(node) and value(node).dtype.is_floating_point


def look_through(node: fx.Node, *more: Callable) -> fx.Node:
    """The producer behind float casts, copies and the given single-input targets."""
    while is_cast(node) or is_call(node, *more):
        (node,) = node.all_input_nodes[:1]
    return node


def number(arg: Any) -> float | int | None:
    """The Python number that a scalar, or a tensor holding one number everywhere, is known to be; else None."""
    if isinstance(arg, (int, float)) and not isinstance(arg, bool):
        return arg
    if not isinstance(arg, fx.Node):
        return None
    if arg.op == "get_attr":
        constant = attribute(arg)
        if isinstance(constant, FakeTensor):
            constant = constant.constant
        known = (
            isinstance(constant, torch.Tensor)
            and constant.numel() == 1
            and not isinstance(constant, torch.nn.Parameter)
        )
        # A buffer may change between calls; a constant lifted by tracing (torch.tensor(0.125) in forward) does not.
        return constant.item() if known and "_tensor_constant" in str(arg.target) else None
    if is_call(arg, *CASTS, *COPIES, *_KEEPS_VALUE):
        return number(arg.args[0])
    for targets, index, name in _FILLS:
        if is_call(arg, *targets):
            return number(index if name is None else argument(arg, index, name))
    return None


# Calls that give a tensor of one number: which argument it is; or, without a name, the number itself.
_FILLS: list[tuple[set, int, str | None]] = [
    ({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}, 0, None),
    ({aten.ones.default, aten.ones_like.default, aten.new_ones.default}, 1, None),
    ({aten.full.default, aten.full_like.default}, 1, "fill_value"),
    ({aten.new_full.default}, 2, "fill_value"),
    ({aten.scalar_tensor.default}, 0, "s"),
]
_KEEPS_VALUE = {
    aten.detach.default,
    aten.detach_.default,
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
}


def attribute(node: fx.Node) -> Any:
    """What a get_attr node stands for."""
    target: Any = node.graph.owning_module
    for name in str(node.target).split("."):
        target = getattr(target, name)
    return target


def may_require_grad(node: fx.Node) -> bool:
    """Whether a gradient could flow into this value: some floating path leads to an input that requires one."""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node in seen or not (is_floating(node) or isinstance(value(node), (tuple, list))):
            continue
        seen.add(node)
        if node.op == "get_attr":
            if getattr(attribute(node), "requires_grad", False):
                return True
        elif node.op == "placeholder":
            given = node.meta.get("example_value", value(node))
            if getattr(given, "requires_grad", False):
                return True
        elif not (is_call(node, aten.detach.default) or reads_only_metadata(node)):
            todo.extend(node.all_input_nodes)
    return False


def is_parameter(node: fx.Node) -> bool:
    """A weight of the model, not something computed from the batch."""
    if node.op == "get_attr":
        return True
    return node.op == "placeholder" and isinstance(node.meta.get("example_value", value(node)), torch.nn.Parameter)


def insert_call(
    graph: fx.Graph, before: fx.Node, target: Callable, args: tuple, kwargs: dict | None = None, *, like: fx.Node
) -> fx.Node:
    """A new call before a node, with `meta["val"]` computed from its inputs; on the source line, and in the
    checkpointed region, of `like`."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs or {})
    values, named = map_arg((args, kwargs or {}), value)
    with _fake_mode(values, named, value(like), value(before)), enable_python_dispatcher(), torch.no_grad():
        node.meta["val"] = target(*values, **named)
    for key in ("stack_trace", "nn_module_stack", "seq_nr", "recompute", "ac_graph_id"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def copied_before(node: fx.Node, before: fx.Node) -> fx.Node:
    """The node, or the same computed anew in front of `before`, where it stands behind; what it calls is pure."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    copies: dict[fx.Node, fx.Node] = {}

    def copy(n: fx.Node) -> fx.Node:
        if n in copies or order[n] < order[before]:
            return copies.get(n, n)
        args, kwargs = map_arg((n.args, dict(n.kwargs)), copy)
        copies[n] = insert_call(node.graph, before, n.target, args, kwargs, like=n)  # type: ignore[arg-type]
        return copies[n]

    return copy(node)


@contextlib.contextmanager
def _fake_mode(*values: Any) -> Iterator[None]:
    tensors = [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, FakeTensor)]
    with tensors[0].fake_mode if tensors else contextlib.nullcontext():
        yield


SIZE_OF = {aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int}
_LIKES = {aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.full_like.default: None}


def reads_only_metadata(user: fx.Node) -> bool:
    """A use that wants the shape or dtype of a tensor, never its numbers."""
    return is_call(user, *SIZE_OF, *_LIKES, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)


def real_users(node: fx.Node) -> list[fx.Node]:
    """The uses that want the numbers of a tensor."""
    return [user for user in node.users if not reads_only_metadata(user)]


def erase_dead(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """Remove the nodes among `roots`, and whatever only they needed, that nobody uses; returns them.

    Unlike `Graph.eliminate_dead_code` it touches nothing else: autocast regions, mutations and assertions stay.
    """
    todo = list(roots)
    erased: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node in erased or node.users or node.op not in ("call_function", "get_attr") or not is_pure(node.target):
            continue
        todo.extend(node.all_input_nodes)
        erased.add(node)
        node.graph.erase_node(node)
    return erased


def is_pure(target: Any) -> bool:
    """Whether calls do nothing but give a value, the same for the same arguments."""
    if may_write(target):
        return False
    random = torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
    return not (random or isinstance(target, torch._ops.OpOverload) and "assert" in target.name())


def may_write(target: Any) -> bool:
    """Whether calls may write to a tensor or change what others give."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return not (isinstance(target, str) or getattr(target, "__module__", None) == "_operator")


def writes_to(node: fx.Node, operand: fx.Node) -> bool:
    """Whether the call is an in-place one on the storage of a tensor."""
    mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    return mutable and is_tensor(node) and share_storage(node.all_input_nodes[0], operand)


def share_storage(a: fx.Node, b: fx.Node) -> bool:
    return value(a).untyped_storage()._cdata == value(b).untyped_storage()._cdata


def storages(nodes: Iterable[fx.Node]) -> dict[int, Size]:
    """The memory behind these nodes that are tensors, each piece once: its bytes."""
    found = (value(node).untyped_storage() for node in nodes if is_tensor(node))
    return {storage._cdata: storage.nbytes() for storage in found}


def total(sizes: Iterable[Size], hints: Mapping[sympy.Symbol, int]) -> int:
    """The sum of sizes, at these values of their symbols; as torch's partitioner does, a size without one is 4096."""
    exact = (size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in sizes)
    return sum(int(e.xreplace({s: sympy.Integer(hints.get(s, 4096)) for s in e.free_symbols})) for e in exact)


def cast(node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """The node in the given dtype; itself where it has it."""
    if value(node).dtype == dtype:
        return node
    return insert_call(node.graph, before, aten.to.dtype, (node, dtype), like=before)
