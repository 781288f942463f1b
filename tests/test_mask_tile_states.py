"""The states of a mask tensor's tiles: what they are, that layers share them, and never those of another mask."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hstu_compile
from hstu_compile.ops import hstu_attention, mask_tile_states
from hstu_compile.ops.mask_tile_states import GRAIN
from tests.models.cases import Stack
from tests.models.dense_padded import RelativeBias
from tests.tracing import traced
from tests.without_codegen import Compiled, inductor_without_codegen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STATES = torch.ops.hstu_compile.mask_tile_states.default
FORWARD = torch.ops.hstu_compile.hstu_attention_forward.default
BACKWARD = torch.ops.hstu_compile.hstu_attention_backward.default
PACKED_BACKWARD = torch.ops.hstu_compile.silu_attention_backward.default


def tile_by_tile(mask: Tensor) -> Tensor:
    batches, heads, N, _ = mask.shape
    tiles = (N + GRAIN - 1) // GRAIN
    states = torch.empty(batches, heads, tiles, tiles, dtype=torch.uint8)
    for index in torch.cartesian_prod(*map(torch.arange, states.shape)).tolist():
        b, h, row, col = index
        tile = mask[b, h, row * GRAIN :, col * GRAIN :][:GRAIN, :GRAIN]
        states[b, h, row, col] = 0 if (tile == 0).all() else 2 if (tile == 1).all() else 1
    return states.to(mask.device)


def masks(N: int) -> dict[str, Tensor]:
    whole = torch.randint(0, 3, (2, 3, N // GRAIN + 1, N // GRAIN + 1), device=DEVICE)
    cells = whole.repeat_interleave(GRAIN, 2).repeat_interleave(GRAIN, 3)[:, :, :N, :N]
    some = torch.where(cells == 2, torch.rand(cells.shape, device=DEVICE) < 0.999, cells == 1)
    return {
        "bool": some,
        "integers": some * torch.randint(1, 3, (2, 3, 1, 1), device=DEVICE),
        "float": some.float() * torch.where(torch.rand(cells.shape, device=DEVICE) < 0.999, 1.0, 0.5),
        "NaN": torch.where(torch.rand(cells.shape, device=DEVICE) < 0.001, float("nan"), some.float()),
        "negative zero": torch.where(some, 1.0, -0.0),
        "transposed": some.mT,
        "expanded": some[:1, :1].expand(2, 3, N, N),
        "sliced": torch.ones(2, 3, N + 1, N + 2, device=DEVICE)[:, :, 1:, 2:] * some,
    }


@pytest.mark.parametrize("N", [0, 1, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN + 7])
def test_states(N: int) -> None:
    for name, mask in masks(N).items():
        states = mask_tile_states(mask)
        assert states.dtype == torch.uint8 and states.is_contiguous()
        assert torch.equal(states, tile_by_tile(mask)), name
    empty = mask_tile_states(torch.ones(0, 1, N, N, device=DEVICE))
    assert empty.shape == (0, 1, -(-N // GRAIN), -(-N // GRAIN))


def test_opcheck() -> None:
    for name, mask in masks(GRAIN + 1).items():
        torch.library.opcheck(STATES, (mask,)), name


@pytest.mark.parametrize("shape", [(6, 6), (1, 6, 6), (1, 1, 6, 5)], ids=str)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="mask_tile_states: the shape of attn_mask is .*, expected"):
        mask_tile_states(torch.ones(shape, device=DEVICE))


CALL = {"max_seq_len": 40, "alpha": 0.5, "scaling_seq_len": 40.0, "causal": False}
REST = [None] * 4, [40, 0.5, 40.0, False, 0, 1, 0, 0, False]


def qkv(batch: int = 2, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> list[Tensor]:
    return [torch.randn(batch, 40, 2, 4, device=DEVICE, dtype=dtype, requires_grad=requires_grad) for _ in range(3)]


def sparse_mask(batch: int = 1, heads: int = 1, dtype: torch.dtype = torch.bool) -> Tensor:
    mask = torch.rand(batch, heads, 40, 40, device=DEVICE) < 0.5
    mask[..., :GRAIN, GRAIN:] = False
    return mask.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("expanded", [False, True])
def test_gradients_by_differences(dtype: torch.dtype, expanded: bool) -> None:
    mask = sparse_mask(dtype=dtype)
    mask = mask.expand(2, 2, 40, 40) if expanded else mask

    def few_rows(*qkv: Tensor) -> Tensor:
        return hstu_attention(*qkv, attn_mask=mask, **CALL)[:, ::13]

    torch.autograd.gradcheck(few_rows, qkv(), fast_mode=True)


def test_opcheck_of_attention_with_a_mask() -> None:
    mask = sparse_mask()
    inputs, (first, rest) = qkv(dtype=torch.float32), REST
    attention = torch.ops.hstu_compile.hstu_attention.default
    for given in (mask, mask.expand(2, 2, 40, 40)):
        torch.library.opcheck(attention, (*inputs, *first, given, None, None, *rest))
        torch.library.opcheck(attention, (*inputs, *first, given, None, mask_tile_states(given), *rest))
    inputs = qkv(dtype=torch.float32, requires_grad=False)
    arguments = (*inputs, *first, mask, None, mask_tile_states(mask), *rest)
    torch.library.opcheck(FORWARD, arguments)
    torch.library.opcheck(BACKWARD, (torch.randn_like(inputs[2]), *arguments, False))


@pytest.mark.parametrize(
    "mask, states, message",
    [
        (sparse_mask(), None, "mask_tile_states is missing, expected both"),
        (None, mask_tile_states(sparse_mask()), "mask_tile_states is given, expected both"),
        (sparse_mask(), mask_tile_states(sparse_mask()).int(), "dtype of mask_tile_states is torch.int32"),
        (sparse_mask(), mask_tile_states(sparse_mask())[0], "shape of mask_tile_states is"),
        (sparse_mask(2), mask_tile_states(sparse_mask()), "shape of mask_tile_states is"),
        (sparse_mask().double().requires_grad_(), mask_tile_states(sparse_mask()), "attn_mask.requires_grad"),
    ],
)
def test_what_does_not_fit_is_named(mask: Tensor | None, states: Tensor | None, message: str) -> None:
    first, rest = REST
    with pytest.raises((ValueError, RuntimeError), match=message):
        FORWARD(*qkv(requires_grad=False), *first, mask, None, states, *rest)


def test_states_of_another_mask_are_refused_where_values_are_checked() -> None:
    mask, (first, rest) = sparse_mask(), REST
    with hstu_compile.ops.validation.values_checked():
        FORWARD(*qkv(requires_grad=False), *first, mask, None, mask_tile_states(mask), *rest)
        with pytest.raises(ValueError, match="mask_tile_states is of another mask"):
            FORWARD(*qkv(requires_grad=False), *first, mask, None, mask_tile_states(~mask), *rest)


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    torch._dynamo.reset()
    yield from inductor_without_codegen(monkeypatch)


def count(inductor: Compiled, target: Any) -> list[int]:
    """How often each forward and backward graph calls it."""
    return [len(gm.graph.find_nodes(op="call_function", target=target)) for gm in inductor.aot_graphs]


class Own(nn.Module):
    """A layer that makes the mask it needs of what it is given, as every other layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = RelativeBias(max_len=40)

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        return self.inner(x, mask * (mask.sum(-1, keepdim=True) > 3), lengths)


def arguments(batch: int = 3) -> tuple[Tensor, ...]:
    mask = (torch.rand(batch, 40, 40) < 0.5).float().tril()
    return torch.randn(batch, 40, 16, requires_grad=True), mask, mask.sum(-1).amax(-1)


LAYERS: dict[str, Callable[[], nn.Module]] = {"given": lambda: RelativeBias(max_len=40), "made": Own}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_layers_share_the_states(layer: str, dynamic: bool, inductor: Compiled) -> None:
    """One call of three layers, in training as in inference; the backward gets it from the forward."""
    model = Stack(*(LAYERS[layer]() for _ in range(3)))
    options = {"strict": True, "expect": 3}
    compiled = torch.compile(model, backend=hstu_compile.backend, options=options, dynamic=dynamic)
    given = arguments()
    compiled(*given).sum().backward()
    assert count(inductor, FORWARD) == [3, 0] and count(inductor, PACKED_BACKWARD) == [0, 3]
    assert count(inductor, STATES) == [1, 0]
    _, backward = inductor.aot_graphs
    saved = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder")]
    (states,) = [x for x in saved if isinstance(x, Tensor) and x.dtype == torch.uint8]
    assert states.shape[1:] == (1, 2, 2)

    inductor.aot_graphs.clear()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*given), model(*given))
    assert count(inductor, FORWARD) == [3] and count(inductor, STATES) == [1]


def test_checkpointed_layers_share_them_too(inductor: Compiled) -> None:
    """The backward runs their attention again, but does not look at the mask again."""
    model = nn.ModuleList(RelativeBias(max_len=40) for _ in range(3))

    def run(x: Tensor, *others: Tensor) -> Tensor:
        for layer in model:
            x = checkpoint(layer, x, *others, use_reentrant=False)
        return x

    torch.compile(run, backend=hstu_compile.backend, options={"expect": 3})(*arguments()).sum().backward()
    assert count(inductor, FORWARD) == [3, 3] and count(inductor, STATES) == [1, 0]


class Direct(nn.Module):
    """The op itself, three times."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(3):
            x = hstu_attention(x, x, x, attn_mask=mask, **CALL)
        return x


def test_calls_of_the_op_share_the_states_in_training(inductor: Compiled) -> None:
    """Without a pass of ours: AOTAutograd merges equal calls of a training graph, also through Inductor alone."""
    mask = sparse_mask(dtype=torch.float32).expand(2, 2, 40, 40)
    x = torch.randn(2, 40, 2, 4, device=DEVICE, requires_grad=True)
    torch.compile(Direct(), backend="inductor")(x, mask).sum().backward()
    assert count(inductor, STATES) == [1, 0]
    (states,) = inductor.aot_graphs[0].graph.find_nodes(op="call_function", target=STATES)
    assert states.meta["val"].shape == (1, 1, 2, 2)  # of an expanded mask, once


class Writes(nn.Module):
    """Three layers; `write` changes the mask before the second."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(RelativeBias(max_len=40) for _ in range(3))
        self.write = write

    def forward(self, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            mask = self.write(mask) if i == 1 else mask
            x = layer(x, mask, lengths)
        return x


def written_in_place(mask: Tensor) -> Tensor:
    return mask.mul_(torch.ones_like(mask).triu(-5))


def written_through_a_view(mask: Tensor) -> Tensor:
    mask[:, :, :GRAIN].zero_()
    return mask


def one_cell_written(mask: Tensor) -> Tensor:
    mask[:, 0, 0] = 0.5
    return mask


@pytest.mark.parametrize("write", [written_in_place, written_through_a_view, one_cell_written])
@pytest.mark.parametrize("training", [False, True])
def test_a_mask_that_is_written_between_layers(
    write: Callable, training: bool, inductor: Compiled, monkeypatch
) -> None:
    """Every layer gets the states of the very mask that it gets: that is what checked values are checked for."""
    op, seen = sys.modules["hstu_compile.ops.hstu_attention"], []
    check = op.check_attention_values
    monkeypatch.setattr(op, "check_attention_values", lambda q, **named: seen.append(named) or check(q, **named))
    # Eager autograd wants what it saved unwritten.
    model = Writes((lambda mask: write(mask.clone())) if training else write)
    options = {"strict": True, "expect": 3, "debug_checks": True}
    compiled = torch.compile(model, backend=hstu_compile.backend, options=options)
    x, mask, lengths = arguments()
    mask[:, :GRAIN, :GRAIN].fill_(1)
    with torch.set_grad_enabled(training):
        ours, eager = (call(x, mask.clone(), lengths) for call in (compiled, model))
    first, second, third = (named["mask_tile_states"] for named in seen)
    assert not torch.equal(first, second) and torch.equal(second, third)
    torch.testing.assert_close(ours, eager)
    if training:
        given = [x, *model.parameters()]
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), given) for out in (ours, eager)))
    assert count(inductor, STATES) == ([2, 0] if training else [2])


def equal_calls(function: Callable, *args: Tensor) -> bool:
    """Whether the last two calls of `mask_tile_states` in a function's graph are seen as one."""
    from hstu_compile.passes.mask_tile_states import first_equals

    gm = traced(function, list(args))
    *_, one, other = gm.graph.find_nodes(op="call_function", target=STATES)
    return first_equals(other) is first_equals(one)


def twice(make: Callable[[Tensor], Tensor], between: Callable[[Tensor, Tensor], Any] = lambda *_: None) -> Callable:
    def function(mask: Tensor) -> tuple[Tensor, ...]:
        one = make(mask)
        other = make(mask)
        between(mask, one)
        return STATES(one), STATES(other)

    return function


def masked(mask: Tensor) -> Tensor:
    return (mask * 2).masked_fill(mask > 1, 0.0)


@pytest.mark.parametrize(
    "function, expected",
    [
        (twice(lambda mask: mask), True),
        (twice(masked), True),
        (twice(lambda mask: mask.expand(mask.shape)[: mask.shape[0]]), True),
        (lambda mask: (STATES(mask * 1), STATES(mask * 1.0)), False),
        (lambda mask: (STATES(mask + 1), STATES(mask * 1)), False),
        (twice(torch.rand_like), False),
        (twice(torch.zeros_like, lambda mask, one: one[0].fill_(1)), False),  # of two zeros one is written
        (twice(masked, lambda mask, one: one[0].fill_(1)), False),
        (twice(masked, lambda mask, one: mask[0].fill_(1)), False),
    ],
)
def test_what_counts_as_the_same_mask(function: Callable, expected: bool) -> None:
    assert equal_calls(function, torch.randn(2, 1, 5, 5)) == expected
