"""Launches done again hand the same to Triton's launcher in C as the public way does, whatever changes between calls.

Without a GPU, that launcher and the encoding of descriptors are stand-ins that record; on a Hopper GPU, the results.
"""

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from recorded_launches import EMPTY, Descriptor, counted, passed, recording, same_addresses_again, without_hooks
from test_sm90_compiles import NOTHING, on_hopper

from hstu_compile.ops.hstu_attention import PARAMETERS, attention_features
from hstu_compile.ops.kernels import attention_sm90, attention_triton, mask_occupancy, table_grad
from hstu_compile.ops.kernels.mask_occupancy import TiledMask
from hstu_compile.ops.mask_tile_states import GRAIN, mask_tile_states_reference
from hstu_compile.ops.packed_slices import Slice

H = 2


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from recording(monkeypatch)


@pytest.fixture
def same_addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return same_addresses_again(monkeypatch)


def inputs(
    lengths: list[int], dim: int, shift: int = 0, device: str = "cpu", **call: Any
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v, dout and the keywords of a call; `shift` elements from an aligned address."""
    T = sum(lengths) + 3
    packed = torch.randn(T * 4 * H * dim + shift, device=device).bfloat16()[shift:].view(T, 4 * H * dim)
    tensors = [x.view(T, H, dim) for x in packed.chunk(4, 1)[1:]]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    call = {**NOTHING, "seq_offsets": offsets, "max_seq_len": max(lengths), "alpha": 0.5, "scale": 0.1} | call
    return [*tensors, torch.randn(T, H, dim, device=device).bfloat16()], call


def both(
    tensors: list[torch.Tensor], call: dict[str, Any], memory: dict | None, kernels: Any = attention_sm90
) -> list[tuple]:
    """What C gets for a forward and a backward."""
    q, k, v, dout = tensors
    passed.clear()
    kernels.forward(q, k, v, memory=memory, **call)
    needs_bias_grad = call["attn_bias"] is not None
    kernels.backward(dout, q, k, v, memory=memory, needs_bias_grad=needs_bias_grad, **call)
    return list(passed)


STEPS = [[100, 37], [100, 37], [5, 260], [1, 1, 1], [129, 64, 7], [16] * 16, [5, 9]]
LONG = 60  # rows a sequence, on the average: some of the steps
# B and max_seq_len are those of the bias or mask tensor.
OF_SIZE = [[100, 37], [100, 37], [5, 260], [260, 1], [0, 0], [9, 7]]


def cells(name: str, device: str = "cpu") -> dict[str, Any]:
    """A bias, a mask tensor, or both."""
    given: dict[str, Any] = {"max_seq_len": 264}
    if "bias" in name:
        given["attn_bias"] = torch.randn(2, 1, 264, 264, device=device).bfloat16()
    if name != "bias":
        mask = (torch.rand(1, H, 264, 264, device=device) < 0.5).tril()
        mask[:, :, 128:, :128] = False
        states = mask_tile_states_reference(mask)
        given["attn_mask"] = TiledMask(mask if "bool" in name else mask.float(), states, GRAIN)
    return given


MASKS: list[dict | str] = [{}, {"num_targets": [1, 0, 1], "max_attn_len": 5}, "bias", "bool", "number", "bias, bool"]


@pytest.mark.parametrize(
    "dim, mask", [*((128, mask) for mask in MASKS), *((dim, MASKS[i]) for dim in (64, 256) for i in (1, 5))], ids=str
)
def test_c_gets_the_same(recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, dim: int, mask: dict | str) -> None:
    """With other lengths, numbers of sequences and addresses; fails where this triton has moved what is used of it."""
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", LONG)
    memory: dict = {}
    of_size = isinstance(mask, str)
    lists = of_size and "bool" in mask or mask == "number"
    dbias = of_size and "bias" in mask
    for lengths in OF_SIZE if of_size else STEPS:
        if isinstance(mask, str):
            counts = cells(mask)
        else:
            counts = {name: torch.ones(len(lengths)) if isinstance(x, list) else x for name, x in mask.items()}
        tensors, call = inputs(lengths, dim, **counts)
        same_addresses()
        again = both(tensors, call, memory)
        same_addresses()
        public = both(tensors, call, None)
        in_one = dim == 64 and not of_size and sum(lengths) // len(lengths) >= LONG
        assert len(again) == len(public) == 2 + (2 if in_one else 3) + 3 * lists + (2 + lists) * dbias
        assert list(map(without_hooks, again)) == list(map(without_hooks, public))
    in_either = dim == 64 and not of_size
    launches = [2, 2, 3] if in_either else [2 + lists, 3 + 2 * lists, *([2 + lists] if dbias else [])]
    assert [len(plan.relaunches) for plan in memory.values()] == launches
    names = counted(monkeypatch)
    both(tensors, call, memory)
    assert not names, "no launch is Triton's"


def test_a_bias_that_is_copied_or_not_has_its_own_strides(recorded) -> None:
    """TMA reads it where it is, or, of the same strides at an address that is not aligned, a copy of other strides."""

    def shapes(x: Any) -> list[str]:
        if isinstance(x, Descriptor):
            return [x.shape]
        return [shape for item in x for shape in shapes(item)] if isinstance(x, (list, tuple)) else []

    memory: dict = {}
    for shift in (0, 0, 0, 1, 1, 1):
        bias = torch.zeros(2 * 264 * 272 + 1).bfloat16()[shift:][: 2 * 264 * 272].view(2, 1, 264, 272)[..., :264]
        tensors, call = inputs([100, 37], 64, attn_bias=bias, max_seq_len=264)
        again, public = (shapes(both(tensors, call, each)) for each in (memory, None))
        assert again == public


@pytest.mark.parametrize("dim, mask", [(64, MASKS[1]), (64, "bias, bool"), (256, "number")], ids=str)
def test_c_gets_the_same_of_portable_kernels(
    recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, dim: int, mask: dict | str
) -> None:
    """The same; without aligned addresses too, which are other kernels of Triton's."""
    memory: dict = {}
    functions = set()
    for shift in (0, 4):
        for lengths in OF_SIZE if isinstance(mask, str) else STEPS:
            if isinstance(mask, str):
                counts = cells(mask)
            else:
                counts = {name: torch.ones(len(lengths)) if isinstance(x, list) else x for name, x in mask.items()}
            tensors, call = inputs(lengths, dim, shift, **counts)
            same_addresses()
            again = both(tensors, call, memory, attention_triton)
            same_addresses()
            public = both(tensors, call, None, attention_triton)
            assert list(map(without_hooks, again)) == list(map(without_hooks, public))
            functions |= {(shift, arguments[4]) for arguments in public}
        with monkeypatch.context() as patch:
            names = counted(patch)
            both(tensors, call, memory, attention_triton)
            assert not names, "no launch is Triton's"
    assert len(memory) == 4
    aligned, unaligned = ({function for at, function in functions if at == shift} for shift in (0, 4))
    assert aligned != unaligned


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    "kernels, dim, counts",  # of launches: with dq, dk and dv in one kernel, and without
    [(attention_sm90, 64, [3, 4]), *((attention_sm90, dim, [4]) for dim in (128, 256)), (attention_triton, 64, [6])],
)
def test_c_gets_the_same_for_a_packed_gradient(
    recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, kernels: Any, dim: int, counts: list[int], by_head: bool
) -> None:
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", LONG)
    memory: dict = {}
    places = {
        name: Slice(*(i * dim, 4 * dim) if by_head else (i * H * dim, dim), True) for i, name in enumerate("uvqk")
    }

    def launched(memory: dict | None, tensors: list[torch.Tensor], call: dict[str, Any]) -> list[tuple]:
        same_addresses()
        passed.clear()
        dout, du, x, q, k, v, dx = tensors
        into = {name: (place.of(dx, H, dim), place.of(x, H, dim)) for name, place in places.items()}
        of_attention = [into["q"], (into["k"][0], None), into["v"]]
        of_u = du, into["u"]
        kernels.silu_backward(dout, q, k, v, of_attention, of_u, memory=memory, needs_bias_grad=False, **call)
        return list(map(without_hooks, passed))

    for lengths in STEPS:
        (v, q, k, dout), call = inputs(lengths, dim)
        x, dx = (EMPTY(len(q), 4 * H * dim, dtype=torch.bfloat16) for _ in range(2))
        du = EMPTY(len(q), H, dim, dtype=torch.bfloat16)
        again, public = (launched(each, [dout, du, x, q, k, v, dx], call) for each in (memory, None))
        assert again == public
        assert len(again) == counts[0 if sum(lengths) // len(lengths) >= LONG else -1]
    assert [len(plan.relaunches) for plan in memory.values()] == counts


def test_what_takes_the_public_way(recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: dict = {}
    names = counted(monkeypatch)
    aligned, call = inputs([100, 37], 128)
    both(aligned, call, memory)
    both(aligned, call, memory)
    assert len(names) == 10
    both(aligned, call, memory)
    assert len(names) == 10, "the third time, no launch is Triton's"
    both(*inputs([100, 37], 128, shift=4), memory)
    assert len(names) == 15, "other kernels may be compiled for unaligned addresses"
    both(aligned, {**call, "seq_offsets": torch.tensor([9, 0, 100, 137])[1:]}, memory)
    assert len(names) == 20, "nor has it been seen that only the offsets are not aligned"
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", lambda metadata: None)
    both(aligned, call, memory)
    assert len(names) == 25, "a profiler wants to hear of launches"
    monkeypatch.undo()


def test_one_tensor_in_two_roles_is_not_remembered(recorded) -> None:
    (q, _, v, dout), call = inputs([100, 37], 128)
    memory: dict = {}
    for _ in range(3):
        both([q, q, v, dout], call, memory)
    assert not memory


def test_no_tensor_is_kept(recorded) -> None:
    tensors, call = inputs([100, 37], 128)
    memory: dict = {}
    for _ in range(3):
        both(tensors, call, memory)
    alive = [weakref.ref(t) for t in (*tensors, call["seq_offsets"])]
    del tensors, call
    passed.clear()
    gc.collect()
    assert all(memory.values()) and not any(ref() is not None for ref in alive)


def test_c_gets_the_same_of_other_launches(recorded, same_addresses) -> None:
    """The states of a mask's tiles, and the gradient of a table of any number of lookups, in slices and not."""
    calls: list[Callable[[dict | None], Any]] = []
    for lookups in (100, 100, 1600, 7, 50_000):
        calls.append(functools.partial(of_table, lookups, 129))
    calls += [functools.partial(of_table, 100, 1300)] * 2
    calls += [functools.partial(of_mask, torch.rand(1, 1, 70, 70) < 0.5) for _ in range(3)]
    memories: dict[Any, dict] = {}
    for call in calls:
        memory = memories.setdefault((call.func, *map(str, call.args[1:])), {})
        results = []
        for each in (memory, None):
            passed.clear()
            same_addresses()
            call(each)
            results.append(list(map(without_hooks, passed)))
        assert results[0] == results[1] and len(results[0]) == 1
    assert all(plan for memory in memories.values() for plan in memory.values())


def of_table(lookups: int, size: int, memory: dict | None) -> None:
    grad, index = torch.empty((lookups, 4), dtype=torch.float32), torch.empty((lookups,), dtype=torch.int16)
    with mock.patch.object(torch.Tensor, "new_zeros", lambda like, shape, dtype: torch.empty(shape, dtype=dtype)):
        table_grad.table_grad(grad, index, size, memory)


def of_mask(mask: torch.Tensor, memory: dict | None) -> None:
    mask_occupancy.tile_states(mask, GRAIN, memory)


ARGUMENTS = {"seq_offsets": torch.tensor([0, 5, 8]), "max_seq_len": 5, "alpha": 0.5, "scaling_seq_len": 8.0}
ARGUMENTS |= {"mask_tile_states": None}


def features(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **change: Any) -> Any:
    call = {**NOTHING, **ARGUMENTS, **change}
    return attention_features(q, k, v, tuple(call[name] for name in PARAMETERS))


def test_the_kind_of_a_call() -> None:
    x, longer = torch.empty(8, H, 16), torch.empty(9, H, 16)
    kind = features(x, x, x)
    assert features(longer, longer, longer, max_seq_len=7, seq_offsets=torch.tensor([0, 2, 5, 9])) == kind
    others = [
        features(x, x, longer),
        features(x, x, x.double()),
        features(x, x, torch.empty(8, H, 32)[..., :16]),
        features(x, x, torch.empty(8, H, 24)),
        features(x, x, x, max_seq_len=-1),
        features(x, x, x, alpha=0.25),
        features(x, x, x, causal=False),
        features(x, x, x, num_targets=torch.ones(2)),
        features(x, x, x, num_targets=torch.ones(3)),
        features(x, x, x, seq_offsets=torch.tensor([0, 5, 8], dtype=torch.int32)),
        features(x, x, x, seq_offsets=torch.tensor([0, 0, 5, 0, 8])[::2]),
        features(x, x, x, attn_bias=torch.ones(1, 1, 5, 5)),
        features(x, x, x, attn_bias=torch.ones(1, 2, 5, 5)),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5)),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5).bool()),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 10)[..., ::2]),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5), max_seq_len=6),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5), seq_offsets=torch.tensor([0, 8])),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5), mask_tile_states=torch.ones(1, 1, 1, 1)),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5), mask_tile_states=torch.ones(2, 1, 1, 1)),
        features(x, x, x, attn_bias=torch.ones(1, 1, 5, 5), max_seq_len=6),
        features(x, x, x, attn_bias=torch.ones(1, 1, 5, 5), seq_offsets=torch.tensor([0, 8])),
        features(x[:1], x[:1], x[:1]),
    ]
    assert len({kind, *others}) == 1 + len(others)
    for name in ("attn_bias", "attn_mask"):
        plane = {name: torch.ones(1, 1, 5, 5)}
        same = [features(y, y, y, **plane, seq_offsets=torch.tensor([0, 4, len(y)])) for y in (x, longer)]
        assert same[0] == same[1]


@on_hopper
@pytest.mark.parametrize("kernels", [attention_sm90, attention_triton])
@pytest.mark.parametrize("mask", ["", "bias", "bool", "number", "bias, bool", "bias, number"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_results_are_those_of_the_public_way(
    monkeypatch: pytest.MonkeyPatch, dim: int, mask: str, kernels: Any
) -> None:
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", LONG)
    memory: dict = {}
    given = cells(mask, "cuda") if mask else {}
    aligned = OF_SIZE if mask else [*STEPS, [300] * 40]
    for lengths, shift in [*((lengths, 0) for lengths in aligned), ([5, 260], 4), ([100, 37], 0)]:
        (q, k, v, dout), call = inputs(lengths, dim, shift, "cuda", **given)
        results = []
        for remembered in (memory, None):
            out = kernels.forward(q, k, v, memory=remembered, **call)
            grads = kernels.backward(
                dout, q, k, v, memory=remembered, needs_bias_grad=call["attn_bias"] is not None, **call
            )
            results.append([out, *grads])
        for i, (ours, public) in enumerate(zip(*results, strict=True)):
            if public is None:
                continue
            assert torch.equal(ours, public) and not ours.isnan().any()
            assert i == 4 or (ours[sum(lengths) :] == 0).all()
    assert sum(map(bool, memory.values())) == (3 if dim == 64 and not mask and kernels is attention_sm90 else 2) + (
        "bias" in mask and kernels is attention_sm90
    )


@on_hopper
@pytest.mark.parametrize("mask", ["", "bias, bool"])
def test_another_stream_and_a_graph(mask: str) -> None:
    (q, k, v, _), call = inputs([100, 37], 128, 0, "cuda", **(cells(mask, "cuda") if mask else {}))
    memory: dict = {}
    for _ in range(3):
        want = attention_sm90.forward(q, k, v, memory=memory, **call)
    assert all(memory.values())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        q.neg_()  # seen only by what is launched on this stream
        there = attention_sm90.forward(q, k, v, memory=memory, **call)
        q.neg_()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = attention_sm90.forward(q, k, v, memory=memory, **call)
    for _ in range(2):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, want)
    assert torch.equal(there, attention_sm90.forward(q.neg(), k, v, **call))
