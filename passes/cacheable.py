"""Whether keys and values of old tokens stay what they are while a history grows: else no cache may keep them.

They do if a token attends to nothing behind it, and all else that they are computed from is the token's own, or never
changes. The first is read from the attention, the second followed from keys and values up: through calls that work row
by row, to integers (ids, positions, times), which are computed for made-up batches, before and after histories grow.

What a caller may not change is not seen here: ids, times and other inputs of tokens that are cached.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hstu_compile.passes.batch_sizes import BatchSizes, expression
from hstu_compile.passes.evaluate import ancestors, evaluate
from hstu_compile.passes.graph import is_call, is_floating, is_tensor, shape, value
from hstu_compile.passes.index_space import arguments, is_scalar, op_name, symbols_of
from hstu_compile.passes.paged_attention import APPEND, INPUTS, PAGED, geometry
from hstu_compile.passes.report import source_line
from hstu_compile.passes.row_wise import handler
from hstu_compile.passes.selection import CHOSEN


class NotCacheable(Exception):
    """Old keys and values would change; the message names the call, the user's line and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        self.node = node
        super().__init__(f"{op_name(node) or node.name} {reason}, at {source_line(node)}")


def check_attention(layers: Sequence[fx.Node], sizes: BatchSizes) -> set[fx.Node]:
    """Before the rewriting: masks and divisors. Returns the numbers of the caller's that must always be the same.

    Raises:
        NotCacheable
    """
    fixed: set[fx.Node] = set()
    first = arguments(layers[0])
    for node in layers:
        a = arguments(node)
        for condition, reason in (
            (a["seq_offsets"] is None, "is dense, [B, N]; expected jagged sequences with offsets"),
            (a["attn_mask"] is not None, "has a mask tensor, and over pages there are only masks in closed form"),
            (a["attn_bias"] is not None, "has a bias, which attention over pages does not take"),
            (not a["causal"], "is not causal: old tokens attend to new ones"),
            (
                a["num_contextuals"] is not None or a["contextual_seq_len"] != 0,
                "has contextual tokens, which attend to all of the history: also to what is new",
            ),
            (
                a["max_attn_len"] != 0 and a["min_full_attn_seq_len"] != 0,
                "has a window that the last tokens of the history are exempt from: others later",
            ),
            (
                any(a[name] is not first[name] for name in ("seq_offsets", "num_targets")),
                "has other sequences or candidates than the first layer's",
            ),
            (geometry(node) != geometry(layers[0]), f"has {geometry(node)}, the first layer {geometry(layers[0])}"),
            (geometry(node)[1] != geometry(node)[2], "has keys and values of different widths"),
        ):
            if condition:
                raise NotCacheable(node, reason)
        for name in ("scaling_seq_len", "max_attn_len", "target_group_size"):
            fixed |= _numbers(node, a[name], sizes, f"the {name} of the attention")
    return fixed


def _numbers(node: fx.Node, number: Any, sizes: BatchSizes, what: str) -> set[fx.Node]:
    """The caller's numbers that a number is computed from."""
    symbols = symbols_of(value(number)) if isinstance(number, fx.Node) else symbols_of(number)
    found = {n for n, known in sizes.numbers.items() if known.free_symbols & symbols}
    known: set = set().union(*(sizes.numbers[n].free_symbols for n in found))
    if symbols - known:
        raise NotCacheable(node, f"depends on a size of the batch: {what} is {value(number)}")
    return found


def check_rows(gm: fx.GraphModule, sizes: BatchSizes, offsets: fx.Node, targets: fx.Node | None) -> set[fx.Node]:
    """After the rewriting: everything that keys and values are computed from. Returns as `check_attention`.

    Raises:
        NotCacheable
    """
    walk = _Walk(sizes)
    for append in gm.graph.find_nodes(op="call_function", target=APPEND):
        walk.visit(append.args[1:3])
    trial = _Trial(gm, sizes, offsets, targets, walk.features)
    return walk.fixed | trial.check(list(walk.ends))


class _Walk:
    """From keys and values up through what is computed row by row, to what is tried out."""

    def __init__(self, sizes: BatchSizes) -> None:
        self._sizes = sizes
        self.ends: dict[fx.Node, None] = {}
        self.features: set[fx.Node] = set()  # computed user by user
        self.fixed: set[fx.Node] = set()

    def visit(self, nodes: Iterable[Any]) -> None:
        seen: set[fx.Node] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if is_call(node, PAGED):
                todo += node.args[:3]
            elif not is_floating(node) and is_tensor(node):
                self.ends[node] = None
            elif not node.meta.get(CHOSEN):
                self._expect_constant(node)
            elif op_name(node) in ("index", "select") and _inputs([source := node.all_input_nodes[0]]):
                self._expect_feature(source)
                self.ends[node] = None
            else:
                self._check_numbers(node)
                todo += [n for n in node.all_input_nodes if not is_scalar(n)]

    def _expect_feature(self, node: fx.Node) -> None:
        """Rows are picked of an input, or of what is computed for each user from inputs of that user."""
        if node.op == "placeholder":
            return
        read = _inputs([node])
        by_user = all(self._sizes.kind(shape(n)[0]) == "sequences" for n in [node, *read] if is_tensor(n) and shape(n))
        calls = [n for n in ancestors([node]) if n.op == "call_function" and is_tensor(n)]
        if not by_user or any(handler(n) is None for n in calls):
            self._expect_constant(node)
        self.features.add(node)

    def _expect_constant(self, node: fx.Node) -> None:
        if read := _inputs([node]):
            raise NotCacheable(node, f"is computed from the whole batch ({', '.join(n.name for n in read)})")

    def _check_numbers(self, node: fx.Node) -> None:
        """Numbers that are computed with, not those of shapes."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return
        named = arguments(node)
        for parameter in node.target._schema.arguments:
            given = named[parameter.name]
            if "int" not in str(parameter.type).lower() and isinstance(given, fx.Node) and is_scalar(given):
                self.fixed |= _numbers(node, given, self._sizes, f"its {parameter.name}")


def _inputs(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in ancestors(nodes) if n.op == "placeholder"]


@dataclass(frozen=True)
class _Batch:
    users: tuple[int, ...]
    history: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor(self.history) + torch.tensor(self.targets)

    @property
    def offsets(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])


_BEFORE = _Batch((0, 1, 2, 3, 4), (3, 1, 4, 2, 5), (2, 0, 1, 3, 0))
# Longer, elsewhere in the batch, with other candidates.
_AFTER = _Batch((2, 5, 4, 0, 3, 1), (5, 2, 6, 3, 6, 4), (0, 2, 1, 3, 0, 1))
_LONGEST, _OTHER = 8, 16
_WIDE, _NARROW = 1 << 20, 2  # what integers of inputs are below: the second where they are indices


class _Trial:
    """Values of a graph's integers for made-up batches."""

    def __init__(
        self,
        gm: fx.GraphModule,
        sizes: BatchSizes,
        offsets: fx.Node,
        targets: fx.Node | None,
        features: Iterable[fx.Node],
    ) -> None:
        self._sizes, self._offsets, self._targets, self._features = sizes, offsets, targets, list(features)
        self._placeholders = list(gm.graph.find_nodes(op="placeholder"))
        self._numbers = {n: max(int(value(n).node.hint), _OTHER) for n in sizes.numbers}
        counts = [n for n in _inputs([offsets]) if is_tensor(n)]
        self._lengths = {n for n in counts if self._kinds(n) == ["sequences"]}
        self._below: dict[fx.Node, int] = {}
        others = [] if targets is None else [n for n in _inputs([targets]) if is_tensor(n) and n not in counts]
        self._counts = {n for n in others if self._kinds(n) == ["sequences"]}

    def _kinds(self, node: fx.Node) -> list[str | None]:
        return [self._sizes.kind(size) for size in shape(node)]

    def check(self, ends: list[fx.Node]) -> set[fx.Node]:
        """Raises NotCacheable where a value of an old token changes; returns the numbers that change some."""
        expected = [self._offsets] + ([] if self._targets is None else [self._targets])
        for batch in (_BEFORE, _AFTER):
            found = self._values(expected, batch, {})
            wanted = [batch.offsets, torch.tensor(batch.targets)]
            for node, known, own in zip(expected, found, wanted, strict=False):
                if known.shape != own.shape or not torch.equal(known.long(), own):
                    raise NotCacheable(node, "does not follow from lengths, offsets and counts among the inputs")
        self._find_ranges(ends)
        before = self._values(ends, _BEFORE, {})
        for node, first, then in zip(ends, before, self._values(ends, _AFTER, {}), strict=True):
            if not all(torch.equal(first[i], then[j]) for i, j in _same_tokens()):
                raise NotCacheable(node, "changes for an old token when its history grows or the batch is another")
        return {n for n in self._numbers if self._matters(n, ends, before)}

    def _find_ranges(self, ends: list[fx.Node]) -> None:
        """Integers are as large as they may be, so that what is made of them (buckets of times) differs."""
        for node in [n for n in self._placeholders if is_tensor(n)]:
            self._below[node] = _WIDE
            try:
                self._values([end for end in ends if node in ancestors([end])], _BEFORE, {})
            except NotCacheable:
                self._below[node] = _NARROW

    def _matters(self, number: fx.Node, ends: list[fx.Node], before: list[Any]) -> bool:
        depending = [k for k, node in enumerate(ends) if number in ancestors([node])]
        try:
            after = self._values([ends[k] for k in depending], _BEFORE, {number: self._numbers[number] + 3})
        except NotCacheable:
            return True
        rows = [i for i, _ in _same_tokens()]
        return not all(torch.equal(before[k][rows], new[rows]) for k, new in zip(depending, after, strict=True))

    def _values(self, nodes: list[fx.Node], batch: _Batch, numbers: dict[fx.Node, int]) -> list[Any]:
        given = {n: self._given(k, n, batch, numbers) for k, n in enumerate(self._placeholders)}
        for k, n in enumerate(self._features):  # no weights, which may be 0 or equal
            rest = self._dims(n, batch)[1:]
            given[n] = torch.stack([_random(user, rest, value(n).dtype, -1 - k) for user in batch.users])
        found = []
        for node in nodes:
            try:
                found += evaluate([node], given)
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                raise NotCacheable(node, f"could not be tried out ({error})") from error
        return found

    def _given(self, k: int, node: fx.Node, batch: _Batch, numbers: dict[fx.Node, int]) -> Any:
        if is_scalar(node):
            known = self._numbers | numbers
            return known[node] if node in known else self._size(value(node), batch)
        if node.name.removeprefix("hstu_compile_") in INPUTS:
            return {"rows": torch.arange(int(batch.offsets[-1])), "row_offsets": batch.offsets}.get(
                node.name.removeprefix("hstu_compile_"), torch.zeros(self._dims(node, batch), dtype=torch.int32)
            )
        dtype, kind = value(node).dtype, (self._kinds(node) or [None])[0]
        if kind == "offsets" and not dtype.is_floating_point:
            return batch.offsets.to(dtype)
        if node in self._lengths:
            return batch.lengths.to(dtype)
        if node in self._counts:
            return torch.tensor(batch.targets, dtype=dtype)
        rest, below = self._dims(node, batch)[1:], self._below.get(node, _NARROW)
        if kind == "tokens":
            return torch.cat([_tokens(batch, b, (*rest,), dtype, k, below) for b in range(len(batch.users))])
        if kind == "sequences":
            return torch.stack([_random(user, rest, dtype, k, below) for user in batch.users])
        return _random(-1, self._dims(node, batch), dtype, k, below)

    def _dims(self, node: fx.Node, batch: _Batch) -> list[int]:
        return [self._size(size, batch) for size in shape(node)]

    def _size(self, size: Any, batch: _Batch) -> int:
        known = {"tokens": int(batch.offsets[-1]), "sequences": len(batch.users), "offsets": len(batch.users) + 1}
        if isinstance(size, int) or not expression(size).free_symbols:
            return int(size)
        return known.get(self._sizes.kind(size), _OTHER)  # type: ignore[arg-type]


def _random(user: int, dims: Sequence[int], dtype: torch.dtype, k: int, below: int = _NARROW) -> Tensor:
    """A user's own values of the k-th input."""
    generator = torch.Generator().manual_seed(1000 * (user + 2) + k)
    if dtype.is_floating_point:
        return torch.randn(list(dims), generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else below, list(dims), generator=generator).to(dtype)


def _tokens(batch: _Batch, b: int, rest: tuple[int, ...], dtype: torch.dtype, k: int, below: int) -> Tensor:
    user, history = batch.users[b], batch.history[b]
    candidates = _random(100 + user + len(batch.users), (batch.targets[b], *rest), dtype, k, below)
    return torch.cat([_random(user, (_LONGEST, *rest), dtype, k, below)[:history], candidates])


def _same_tokens() -> list[tuple[int, int]]:
    """The rows of history tokens that are in both batches."""
    found = []
    for b, (user, history) in enumerate(zip(_BEFORE.users, _BEFORE.history, strict=True)):
        begin, later = int(_BEFORE.offsets[b]), int(_AFTER.offsets[_AFTER.users.index(user)])
        found += [(begin + i, later + i) for i in range(history)]
    return found
