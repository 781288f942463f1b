"""The second half of the layer: dropout(cat[u, a, norm(a) * act(u)]), up to the output projection, as one op.

The anchor is a product norm(a) * u of two full tensors, or a norm of a product a * u. Backwards it takes up the norm,
the activation of u, and exact casts; forwards the concatenation, the dropout and the cast. Each step is optional. The
projection and the residual stay ATen: cuBLAS runs them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch._inductor.config
from torch import fx

from hstu_compile.ops.norm_gate_dropout import PARAMETERS, runs_on
from hstu_compile.passes import unknown_norm
from hstu_compile.passes.activation import as_activation
from hstu_compile.passes.axes import RESHAPES
from hstu_compile.passes.graph import (
    argument,
    aten,
    erase_dead,
    insert_call,
    is_call,
    is_cast,
    is_parameter,
    is_tensor,
    real_users,
    same,
    same_shape,
    shape,
    value,
    writes_to,
)
from hstu_compile.passes.inplace import as_copy
from hstu_compile.passes.norm import Norm, as_norm
from hstu_compile.passes.report import Misfit, Region, Report, source_line, spoken
from hstu_compile.passes.zero_one import is_zero_or_one

NAME = "output"

PROJECTIONS = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default}
ATTENTION = torch.ops.hstu_compile.hstu_attention.default
PRODUCTS = {aten.einsum.default, aten.bmm.default, aten.matmul.default, aten.baddbmm.default}


@dataclass
class Gate:
    """norm(x) * activation(u) and what follows it."""

    product: fx.Node  # norm(x) * activation(u), or x * activation(u), which is normalised
    norm: Norm
    x: fx.Node
    u: fx.Node
    activation: str
    between: list[fx.Node]  # of norm and product, what is between the two; with the product if it is normalised
    chain: list[fx.Node]  # the later of the two and what follows it, each the main input of the next
    concat: list[str] = field(default_factory=list)  # of "u", "x", "norm", in the order of the op
    width: int = 0  # of a row
    dropout_ratio: float = 0.0

    @property
    def gate_first(self) -> bool:
        return self.chain[0] is not self.product

    @property
    def end(self) -> fx.Node:
        return self.chain[-1]


def run(gm: fx.GraphModule, report: Report) -> int:
    """Rewrite every gate of the graph; returns how many."""
    fused, missed = 0, set()
    for find, what in ((_find, "norm * gate"), (_find_gate_first, "norm of a gated value")):
        for product in gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            try:
                gate = find(product)
                if gate is not None:
                    kernel = _rewrite(gm.graph, gate)
                    report.add(Region(NAME, _in_words(gate), source_line(product), kernel=kernel))
                    fused += 1
            except Misfit as misfit:
                missed.add(product)
                where = source_line(product)
                report.add(Region(NAME, what, where, misfit.reason, change=misfit.change, culprit=misfit.culprit))
    report.regions += unknown_norm.find(gm.graph, missed, NAME)
    return fused


def _find(product: fx.Node) -> Gate | None:
    """The gate around a product; None where nothing speaks for one, Misfit where something is in the way."""
    if not real_users(product) or len(product.args) != 2:
        return None
    for normed, other in (product.args, product.args[::-1]):
        if not (isinstance(normed, fx.Node) and is_tensor(normed)):
            continue
        between, node = _path(normed, narrowing=True)
        norm = as_norm(node)
        if norm is None or not isinstance(other, fx.Node) or not is_tensor(other) or not shape(other):
            continue
        if _is_vector(other, product):
            continue  # the norm's own weight
        if same(shape(other)[-1], 1) and is_zero_or_one(other):
            continue  # clears padded rows
        if not (same_shape(shape(other), shape(product)) and same_shape(shape(normed), shape(product))):
            change = "a gate of the normalised value's shape"
            raise Misfit(f"the gate has shape {_sizes(other)}, the normalised value {_sizes(normed)}", change)
        x = _path(norm.x)[1]
        activation, u = _activation(other)
        gate = Gate(product, norm, x, u, activation, between, [product])
        _check_origin(gate)
        _grow(gate)
        _check_region(gate)
        return gate
    return None


def _is_vector(operand: fx.Node, product: fx.Node) -> bool:
    """Whether it is the same in each row; of a product of one row, a weight is."""
    if not all(same(n, 1) for n in shape(operand)[:-1]) or not same(shape(operand)[-1], shape(product)[-1]):
        return False
    return is_parameter(_path(operand)[1]) or not same_shape(shape(operand), shape(product))


def _find_gate_first(product: fx.Node) -> Gate | None:
    """The norm of a product of an attention's output and a gate, after everything that is norm * gate."""
    if len(product.args) != 2 or not real_users(product):
        return None
    for attended, other in (product.args, product.args[::-1]):
        if not all(isinstance(n, fx.Node) and is_tensor(n) for n in (attended, other)):
            return None
        x = _path(attended)[1]  # type: ignore[arg-type]
        if not _is_attended(x) or not same_shape(shape(other), shape(product)):  # type: ignore[arg-type]
            continue
        norm = _norm_of(product)
        if norm is None:
            return None
        activation, u = _activation(other)  # type: ignore[arg-type]
        between = [product, *_path(norm.x, narrowing=True)[0]]
        gate = Gate(product, norm, x, u, activation, between, [norm.node])
        _grow(gate)
        _check_region(gate)
        return gate
    return None


def _norm_of(value: fx.Node) -> Norm | None:
    """The norm of a value, with all of its affine."""
    near = [value]
    for node in near:
        if len(near) < 32:  # a norm written out has fewer calls
            near += [user for user in real_users(node) if is_tensor(user) and user not in near]
    norms = [norm for norm in map(as_norm, near) if norm and _path(norm.x, narrowing=True)[1] is value]
    return max(norms, key=lambda norm: len(norm.interior), default=None)


def _sizes(node: fx.Node) -> str:
    return str([str(n) for n in shape(node)]).replace("'", "")


def _path(node: fx.Node, *, narrowing: bool = False) -> tuple[list[fx.Node], fx.Node]:
    """The reshapes and casts that end in a node, and what they start from; casts that round only if `narrowing`."""
    path = []
    while is_call(node, *RESHAPES) or (is_cast(node) and (narrowing or _is_exact(node))):
        path.append(node)
        node = node.all_input_nodes[0]
    return path, node


def _is_exact(cast: fx.Node) -> bool:
    before, after = value(cast.all_input_nodes[0]).dtype, value(cast).dtype
    return torch.promote_types(before, after) == after


def _activation(operand: fx.Node) -> tuple[str, fx.Node]:
    """The gate's activation, if nobody else needs its result, and what it is applied to."""
    path, node = _path(operand)
    found = as_activation(node)
    if found is None or any(len(real_users(n)) != 1 for n in (*path, node)):
        return "none", node
    return found[0], _path(found[1])[1]


def _applies(node: fx.Node, activation: str, u: fx.Node) -> bool:
    found = as_activation(node)
    return found is not None and found[0] == activation and _path(found[1])[1] is u


def _check_origin(gate: Gate) -> None:
    """Inductor fuses a norm with pointwise calls before it, which our op would not; after attention it pays anyway."""
    x = gate.x
    if torch.Tag.pointwise not in getattr(x.target, "tags", ()) or _comes_from_attention(x):
        return
    raise Misfit(f"the norm's input is computed by {spoken(x)}, not by attention: Inductor fuses the two")


def _comes_from_attention(node: fx.Node) -> bool:
    """Following the main input from call to call leads to a product over the tokens."""
    return any((is_call(n, *PRODUCTS) and len(shape(n)) > 2) or is_call(n, ATTENTION) for n in _main_inputs(node))


def _is_attended(node: fx.Node) -> bool:
    """It leads to an attention without a projection between."""
    for n in _main_inputs(node):
        if is_call(n, ATTENTION, *PROJECTIONS):
            return is_call(n, ATTENTION)
    return False


def _main_inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The node, its main input, the main input of that."""
    for _ in range(32):
        yield node
        inputs = [n for n in node.all_input_nodes if is_tensor(n) or isinstance(value(n), (tuple, list))]
        if not inputs:
            return
        node = inputs[0]


def _grow(gate: Gate) -> None:
    """Forwards, as long as the value has one user."""
    while True:
        users = real_users(gate.end)
        user = users[0] if len(users) == 1 else None
        if user is None or not is_tensor(user):
            break
        if is_call(user, *RESHAPES) or (is_cast(user) and value(user).dtype != torch.float64):
            gate.chain.append(user)
        elif is_call(user, aten.dropout.default) and _takes_dropout(gate, user):
            gate.chain.append(user)
        elif is_call(user, aten.cat.default) and not gate.width and not gate.dropout_ratio:
            concat = _concat(gate, user)
            if concat is None:
                break
            gate.concat, gate.width = concat, int(shape(gate.end)[-1])
            gate.chain.append(user)
        else:
            break
    if not gate.width:
        gate.width = _row_width(gate)


def _takes_dropout(gate: Gate, call: fx.Node) -> bool:
    ratio, train = call.args[1:3]
    if not train or ratio == 0:
        return True
    # Under fallback_random the user wants eager's random numbers.
    if gate.dropout_ratio or torch._inductor.config.fallback_random or not isinstance(ratio, float) or ratio >= 1:
        return False
    gate.dropout_ratio = ratio
    return True


def _concat(gate: Gate, cat: fx.Node) -> list[str] | None:
    """Which of u, x and norm(x) stand before the product, if the op can write them so; else None."""
    pieces, dim = list(cat.args[0]), argument(cat, 1, "dim", 0)  # type: ignore[arg-type]
    width = shape(gate.end)[-1]
    if dim % len(shape(gate.end)) != len(shape(gate.end)) - 1 or pieces[-1] is not gate.end or not _fits(gate, width):
        return None
    names = []
    for piece in pieces[:-1]:
        origin = _path(piece)[1]
        if not same_shape(shape(piece), shape(gate.end)):
            return None
        if _applies(origin, gate.activation, gate.u):  # as in the product, by a call of its own
            gate.activation, gate.u = "none", origin
        if origin is gate.u:
            names.append("u")
        elif origin is gate.x:
            names.append("x")
        elif not gate.gate_first and _path(piece, narrowing=True)[1] is gate.norm.node:
            names.append("norm")
        else:
            return None
    return names if names == [n for n in ("u", "x", "norm") if n in names] else None


def _fits(gate: Gate, width) -> bool:
    """Whether rows of this width hold whole groups, and the affine is the same in each row."""
    norm = gate.norm
    if not isinstance(width, int) or width % norm.run:
        return False
    return not norm.has_affine or width == norm.period or (norm.period == norm.run)


def _row_width(gate: Gate) -> int:
    """Rows as u has them in memory, if the norm allows it: u is mostly a slice, to be read in place."""
    fitting, width = [], 1
    for size in reversed(shape(gate.product)[1:]):
        if not isinstance(size, int):
            break
        width *= size
        fitting += [width] * _fits(gate, width)
    if not fitting:
        change = "a norm over the features of a token, or over groups of them (another model)"
        raise Misfit(
            f"the norm runs over {gate.norm.run} elements, the gated value has shape {_sizes(gate.product)}", change
        )
    natural = [width for width in fitting if width in (_inner(gate.u, 1), _inner(gate.u, 2))]
    return max(natural, default=fitting[0])


def _inner(node: fx.Node, dims: int) -> int | None:
    """The product of the last sizes, after the first, where they are known."""
    sizes = [n for n in shape(node)[1:][-dims:] if isinstance(n, int)]
    return math.prod(sizes) if len(sizes) == dims else None


def _check_region(gate: Gate) -> None:
    inside = {*gate.norm.interior, *gate.between, *gate.chain}
    if "norm" in gate.concat:
        cat = next(n for n in gate.chain if is_call(n, aten.cat.default))
        for piece in cat.all_input_nodes:
            inside.update(_path(piece, narrowing=True)[0])
    for node in {*gate.norm.interior, *gate.between} - {*gate.chain}:
        for user in real_users(node):
            if user not in inside:
                change = "use it once; compute what is logged or returned in a call of its own (same numbers)"
                raise Misfit(f"the normalised value has a second use: {spoken(user)} at {source_line(user)}", change)
    dtypes = {value(gate.x).dtype, value(gate.u).dtype}
    if torch.float64 not in dtypes and any(value(n).dtype == torch.float64 for n in inside if is_tensor(n)):
        raise Misfit("computed in float64 from operands that are not", "leave out the cast to float64")
    nodes = list(gate.product.graph.nodes)
    last = nodes.index(gate.end)
    if any(n.target is torch._C._set_grad_enabled for n in nodes[min(map(nodes.index, inside)) : last]):
        raise Misfit("grad mode changes inside the region", "no_grad around all of it, or none")
    operands = {"the attention's result": gate.x, "u": gate.u, "weight": gate.norm.weight, "bias": gate.norm.bias}
    for name, operand in operands.items():
        if operand is None:
            continue
        for node in nodes[nodes.index(operand) + 1 : last]:  # the op reads its operands where the region ends
            if writes_to(node, operand):
                written = f"written in place by {spoken(node)} at {source_line(node)}"
                raise Misfit(f"{name}, or memory that it shares, is {written}", as_copy(node), culprit=node)


def _in_words(gate: Gate) -> str:
    u = "u" if gate.activation == "none" else f"{gate.activation}(u)"
    words = [f"{gate.norm.name} of a * {u}" if gate.gate_first else f"{gate.norm.name} * {u}"]
    if gate.concat:
        words.append(f"cat[{', '.join({'u': 'u', 'x': 'a', 'norm': 'norm(a)'}[n] for n in gate.concat)}, .]")
    if gate.dropout_ratio:
        words.append(f"dropout {gate.dropout_ratio:g}")
    return " -> ".join([*words, str(_out_dtype(gate)).removeprefix("torch.")])


def _out_dtype(gate: Gate) -> torch.dtype:
    """That of the region's last value; or that to which autocast rounds it, where only projections read it."""
    dtype, users = value(gate.end).dtype, list(gate.end.users)
    rounded = {value(user).dtype for user in users if is_call(user, *PROJECTIONS)}
    if dtype == torch.float32 and len(rounded) == 1 and all(is_call(user, *PROJECTIONS) for user in users):
        return rounded.pop()
    return dtype


def _rewrite(graph: fx.Graph, gate: Gate) -> str:
    """Put the op in the place of the region; returns which kernel will run."""
    end, norm, like = gate.end, gate.norm, gate.product
    fake = value(end).fake_mode

    def call(target, *args) -> fx.Node:
        with fake:
            return insert_call(graph, end, target, args, like=like)

    def as_rows(node: fx.Node) -> fx.Node:
        by_heads = _inner(node, 1) != gate.width and _inner(node, 2) == gate.width
        inner = shape(node)[-2:] if by_heads else (gate.width,)
        return node if same_shape(shape(node)[1:], inner) else call(aten.reshape.default, node, [-1, *inner])

    def affine(node: fx.Node | None) -> fx.Node | None:
        if node is None:
            return None
        node = _path(node)[1] if len(shape(_path(node)[1])) == 1 else node
        same_rank = len(norm.affine_shape) == 1 and len(shape(node)) == 1
        return node if same_rank else call(aten.reshape.default, node, list(norm.affine_shape))

    out_shape = _output_shape(gate, call)
    x, u, weight, bias = as_rows(gate.x), as_rows(gate.u), affine(norm.weight), affine(norm.bias)
    seed = None
    if gate.dropout_ratio:
        with fake, graph.inserting_before(end):
            # Made in the graph: it follows torch.manual_seed, and the generator of a CUDA graph.
            kwargs = {"dtype": torch.int64, "device": value(gate.x).device}
            seed = insert_call(graph, end, aten.randint.low, (0, 2**63 - 1, [1]), kwargs, like=like)
    named = {
        "norm_eps": norm.eps,
        "num_groups": gate.width // norm.run,
        "rms": norm.rms,
        "activation": gate.activation,
        "gate_first": gate.gate_first,
        "concat_u": "u" in gate.concat,
        "concat_activated": False,
        "concat_x": "x" in gate.concat,
        "concat_norm": "norm" in gate.concat,
        "dropout_ratio": gate.dropout_ratio,
        "out_dtype": _out_dtype(gate),
    }
    tensors = (x, u, weight, bias)
    op = torch.ops.hstu_compile.norm_gate_dropout.default
    out = call(op, *tensors, seed, *(named[name] for name in PARAMETERS))
    if len(shape(end)) != 2 or not same_shape(shape(end), shape(out)):
        out = call(aten.reshape.default, out, out_shape)
    end.replace_all_uses_with(out)
    inputs = [n for node in gate.chain for n in node.all_input_nodes if n not in gate.chain]
    for node in reversed(gate.chain):  # by hand: dropout counts as impure
        if not node.users:
            graph.erase_node(node)
    erase_dead(inputs)
    return runs_on(named, *(value(t) for t in tensors if t is not None))


def _output_shape(gate: Gate, call) -> list[int | fx.Node]:
    """The shape of the region's last value, its symbolic sizes read from operands that stay."""
    sizes: list[int | fx.Node] = []
    fixed = [size for size in shape(gate.end) if isinstance(size, int)]
    for size in shape(gate.end):
        if isinstance(size, int):
            sizes.append(size)
        elif len(fixed) == len(shape(gate.end)) - 1 and 0 not in fixed:
            sizes.append(-1)
        else:
            where = ((t, i) for t in (gate.x, gate.u) for i, n in enumerate(shape(t)) if same(n, size))
            found = next(where, None)
            if found is None:
                raise Misfit(f"the output's shape {_sizes(gate.end)} is not one of its operands' sizes")
            sizes.append(call(aten.sym_size.int, *found))
    return sizes
