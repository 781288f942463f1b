"""Launches done again hand the same to Triton's launcher in C as the public way does, whatever changes between calls.

Without a GPU, that launcher and the encoding of descriptors are stand-ins that record; on a Hopper GPU, the results.
"""

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import compile_only
import pytest
import torch
import triton
from test_sm90_compiles import NOTHING, on_hopper

from hstu_compile.ops.hstu_attention import PARAMETERS, attention_features
from hstu_compile.ops.kernels import attention_sm90, attention_triton, mask_occupancy, table_grad
from hstu_compile.ops.kernels import norm_gate_dropout as gate
from hstu_compile.ops.kernels.launch import PIECE
from hstu_compile.ops.kernels.mask_occupancy import TiledMask
from hstu_compile.ops.mask_tile_states import GRAIN, mask_tile_states_reference
from hstu_compile.ops.norm_gate_dropout import _features as gate_features
from hstu_compile.ops.norm_gate_dropout import norm_gate_dropout

H = 2
EMPTY = torch.empty
passed: list[tuple] = []  # to C


@dataclass(frozen=True)
class Descriptor:
    pointer: int
    shape: str


class Utilities:
    """Of Triton's driver."""

    def fill_tma_descriptor(self, pointer: int, *shape: Any) -> Descriptor:
        return Descriptor(pointer, str(shape))

    fill_tma_descriptor_tiled = fill_tma_descriptor


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything up to the launcher in C is Triton's own."""
    from triton.backends.nvidia import driver

    def init_handles(self) -> None:
        self.function = id(self)
        self._run = run = object.__new__(driver.CudaLauncher)
        descriptors = self.metadata.tensordesc_meta
        run.launch = driver.wrap_handle_tensordesc(lambda *a: passed.append(a), self.src.signature, descriptors)
        run.num_ctas, run.launch_cooperative_grid, run.launch_pdl, run.gsan_enabled = 1, False, False, False
        run.global_scratch_size = run.profile_scratch_size = run.global_scratch_align = run.profile_scratch_align = 0
        if not triton.__version__.startswith("3.6."):
            run.arg_annotations, run.kernel_signature = [], b""

    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", init_handles)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # that of CPU tensors
    for module in (attention_sm90, gate):
        monkeypatch.setattr(module, "processors", lambda device: 132)
    with compile_only.target(90):
        triton.runtime.driver.active.utils = Utilities()
        yield


def resolved(x: Any) -> Any:
    """As C sees it; hooks, of which there are none, aside."""
    if isinstance(x, (list, tuple)):
        return tuple(map(resolved, x))
    return x.data_ptr() if isinstance(x, torch.Tensor) else x


def without_hooks(arguments: tuple) -> tuple:
    for_hooks = (triton.knobs.HookChain, triton.compiler.compiler.LazyDict, type(None))
    return tuple(x for x in resolved(arguments) if not isinstance(x, for_hooks))


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


@pytest.fixture
def same_addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Allocations come at the same addresses after each call of it; one of several pieces where the pieces would."""
    pool, taken = EMPTY(1 << 26, dtype=torch.uint8), [0]

    def from_pool(*size: Any, **keywords: Any) -> torch.Tensor:
        shape = torch.Size(size if isinstance(size[0], int) else size[0])
        start, count = taken[0], shape.numel() * keywords["dtype"].itemsize
        taken[0] += -(-count // PIECE) * PIECE
        return pool[start : start + count].view(keywords["dtype"]).view(shape)

    def restart() -> None:
        taken[0] = 0
        monkeypatch.setattr(torch, "empty", from_pool)
        monkeypatch.setattr(torch, "empty_like", lambda t, memory_format=None: from_pool(t.shape, dtype=t.dtype))

    return restart


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


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_c_gets_the_same_for_a_packed_gradient(
    recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, dim: int
) -> None:
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", LONG)
    memory: dict = {}
    columns = {f"{name}_at": i * H * dim for i, name in enumerate("uvqk")}

    def launched(memory: dict | None, tensors: list[torch.Tensor], call: dict[str, Any]) -> list[tuple]:
        same_addresses()
        passed.clear()
        attention_sm90.silu_backward(*tensors, columns=columns, memory=memory, **call)
        return list(map(without_hooks, passed))

    for lengths in STEPS:
        (v, q, k, dout), call = inputs(lengths, dim)
        x, du, dx = (EMPTY(len(q), width * H * dim, dtype=torch.bfloat16) for width in (4, 1, 4))
        again, public = (launched(each, [dout, du, x, q, k, v, dx], call) for each in (memory, None))
        in_one = dim == 64 and sum(lengths) // len(lengths) >= LONG
        assert len(again) == 2 + (1 if in_one else 2)
        assert again == public
    assert [len(plan.relaunches) for plan in memory.values()] == ([3, 4] if dim == 64 else [4])


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched the public way from now on."""
    names, run = [], triton.runtime.JITFunction.run

    def count(self, *args: Any, **keywords: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **keywords)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", count)
    return names


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


WIDTH = 64
# Affine shape (None: none), and what differs from a layer norm.
GATES: dict[str, tuple[tuple[int, ...] | None, dict[str, Any]]] = {
    "layer norm, dropout": ((WIDTH,), {"dropout_ratio": 0.2}),
    "no affine": (None, {"activation": "silu"}),
    "group norm, concat": ((4, 1), {"num_groups": 4, "concat_u": True, "concat_x": True}),
    "rms norm of heads": ((16,), {"num_groups": 4, "rms": True, "dropout_ratio": 0.5}),
}


def gate_inputs(rows: int, variant: str, device: str = "cpu", shift: int = 0) -> tuple[list, dict[str, Any]]:
    """dy, a, u, weight, bias, seed; u is a slice of a packed buffer."""
    shape, change = GATES[variant]
    call = {
        "norm_eps": 1e-6,
        "num_groups": 1,
        "rms": False,
        "activation": "none",
        "gate_first": False,
        "dropout_ratio": 0.0,
    }
    call |= {name: False for name in ("concat_u", "concat_x", "concat_norm")}
    call |= {"out_dtype": torch.bfloat16, **change}
    pieces = 1 + sum(call[name] for name in ("concat_u", "concat_x", "concat_norm"))
    packed = torch.randn(rows * 4 * WIDTH + shift, device=device).bfloat16()[shift:].view(rows, 4 * WIDTH)
    dy, a = (torch.randn(rows, n * WIDTH, device=device).bfloat16() for n in (pieces, 1))
    affine = [None if shape is None else torch.randn(shape, device=device) for _ in range(2)]
    seed = torch.tensor([2**62 + 5], device=device) if call["dropout_ratio"] else None
    return [dy, a, packed[:, WIDTH : 2 * WIDTH], *affine, seed], call


def gate_both(tensors: list, call: dict[str, Any], memory: dict | None) -> list[torch.Tensor]:
    """The output and the gradients; in `passed`, what C gets."""
    dy, *rest = tensors
    passed.clear()
    out = torch.empty(dy.shape, dtype=call["out_dtype"], device=dy.device)
    gate.forward(*rest, out, memory=memory, **call)
    return [out, *(t for t in gate.backward(*tensors, memory=memory, **call) if t is not None)]


@pytest.mark.parametrize("variant", GATES)
def test_c_gets_the_same_of_a_gate(recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Any number of rows is one kind, and one compiled kernel each; one where u is not aligned is another."""
    kernels = 2 if GATES[variant][0] is None else 3
    memory: dict = {}
    functions = set()
    for rows, shift in (*((rows, 0) for rows in (40, 40, 37, 1, 5000, 0, 64)), (40, 4), (40, 4), (37, 4)):
        tensors, call = gate_inputs(rows, variant, shift=shift)
        same_addresses()
        gate_both(tensors, call, memory)
        again = list(passed)
        same_addresses()
        gate_both(tensors, call, None)
        assert len(again) == len(passed) == (kernels if rows else kernels - 2)
        assert list(map(without_hooks, again)) == list(map(without_hooks, passed))
        functions |= {arguments[4] for arguments in passed}
    assert len(functions) == kernels + 2
    assert [len(plan.relaunches) for plan in memory.values()] == [1, kernels - 1] * 2
    names = counted(monkeypatch)
    for shift in (0, 4):
        gate_both(*gate_inputs(99, variant, shift=shift), memory)
    assert not names, "no launch is Triton's"


@pytest.mark.parametrize("change", ["dy", "u"])
def test_copies_of_a_gate_take_the_public_way(recorded, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    memory: dict = {}
    names = counted(monkeypatch)
    for _ in range(3):
        tensors, call = gate_inputs(40, "layer norm, dropout")
        i = ["dy", "a", "u"].index(change)
        tensors[i] = tensors[i].t().contiguous().t()
        gate_both(tensors, call, memory)
    assert names.count("backward_kernel") == names.count("sum_shares_kernel") == 3


def test_no_tensor_of_a_gate_is_kept(recorded) -> None:
    tensors, call = gate_inputs(40, "layer norm, dropout")
    memory: dict = {}
    for _ in range(3):
        gate_both(tensors, call, memory)
    alive = [weakref.ref(t) for t in tensors]
    del tensors
    passed.clear()
    gc.collect()
    assert all(memory.values()) and not any(ref() is not None for ref in alive)


def test_the_kind_of_a_gate() -> None:
    def kind(rows: int = 8, **change: Any) -> Any:
        (_, a, u, weight, bias, seed), call = gate_inputs(rows, "layer norm, dropout")
        given = {"a": a, "u": u, "weight": weight, "bias": bias, "seed": seed} | call | change
        a, u, *others = (given.pop(name) for name in ("a", "u", "weight", "bias", "seed"))
        return gate_features(a, u, tuple(others), tuple(given.values()))

    x = torch.empty(8, WIDTH, dtype=torch.bfloat16)
    assert kind() == kind(9)
    others = [
        kind(u=x),
        kind(a=x.float()),
        kind(a=x[:7]),
        kind(a=x.view(8, 2, 32)),
        kind(a=torch.empty(8, 2 * WIDTH, dtype=torch.bfloat16)[:, WIDTH:]),
        kind(weight=None),
        kind(bias=torch.empty(1, WIDTH)),
        kind(weight=torch.empty(WIDTH, 2)[:, 0]),
        kind(weight=torch.empty(WIDTH).half()),
        kind(seed=None),
        kind(seed=torch.tensor([1, 2])),
        kind(norm_eps=1e-5),
        kind(dropout_ratio=0.3),
        kind(activation="silu"),
        kind(out_dtype=torch.float32),
    ]
    assert len({kind(), *others}) == 1 + len(others)


@pytest.mark.cuda
@pytest.mark.parametrize("variant", GATES)
def test_results_of_a_gate_are_those_of_the_public_way(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """The op, for any number of rows, with and without aligned addresses."""
    for rows, shift in ((40, 0), (40, 0), (37, 0), (5000, 0), (1, 0), (64, 4), (300, 0)):
        tensors, call = gate_inputs(rows, variant, "cuda", shift)
        dy, *leaves, seed = tensors
        leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
        with monkeypatch.context() as patch:
            names = counted(patch)
            out = norm_gate_dropout(*leaves, seed=seed, **call)
            ours = [out, *torch.autograd.grad(out, [t for t in leaves if t is not None], dy)]
        assert not names or rows in (40, 64)  # the first of their kind, unaligned
        with torch.no_grad():
            public = gate_both(tensors, call, None)
        for one, other in zip(ours, public, strict=True):
            assert torch.equal(one, other) and not one.isnan().any()


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
