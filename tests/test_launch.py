"""Launches done again hand the same to Triton's launcher in C as the public way does, whatever changes between calls.

Without a GPU, that launcher and the encoding of descriptors are stand-ins that record; on a Hopper GPU, the results.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import compile_only
import pytest
import torch
import triton
from test_sm90_compiles import NOTHING, on_hopper

from hstu_compile.ops.hstu_attention import PARAMETERS, attention_features
from hstu_compile.ops.kernels import attention_sm90
from hstu_compile.ops.kernels import norm_gate_dropout as gate
from hstu_compile.ops.norm_gate_dropout import _features as gate_features
from hstu_compile.ops.norm_gate_dropout import norm_gate_dropout
from hstu_compile.ops.packed_slices import Slice

H = 2
EMPTY = torch.empty
passed: list[tuple] = []  # to C


class Utilities:
    """Of Triton's driver."""

    def fill_tma_descriptor(self, pointer: int, *shape: Any) -> tuple:
        return ("descriptor", pointer, *map(str, shape))

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


def both(tensors: list[torch.Tensor], call: dict[str, Any], memory: dict | None) -> list[tuple]:
    """What C gets for a forward and a backward."""
    q, k, v, dout = tensors
    passed.clear()
    attention_sm90.forward(q, k, v, memory=memory, **call)
    attention_sm90.backward(dout, q, k, v, memory=memory, needs_bias_grad=False, **call)
    return list(passed)


@pytest.fixture
def same_addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Allocations come in the same order at the same addresses after each call of it."""
    pool, taken = [], [0]

    def from_pool(*size: Any, **keywords: Any) -> torch.Tensor:
        if taken[0] == len(pool):
            pool.append(EMPTY(1 << 20, dtype=torch.int64))
        buffer = pool[taken[0]].view(keywords["dtype"])
        taken[0] += 1
        size = size[0] if not isinstance(size[0], int) else size
        return buffer[: torch.Size(size).numel()].view(*size)

    def restart() -> None:
        taken[0] = 0
        monkeypatch.setattr(torch, "empty", from_pool)
        monkeypatch.setattr(torch, "empty_like", lambda t, memory_format=None: from_pool(t.shape, dtype=t.dtype))

    return restart


STEPS = [[100, 37], [100, 37], [5, 260], [1, 1, 1], [129, 64, 7], [16] * 16, [5, 9]]
LONG = 60  # rows a sequence, on the average: some of the steps
WITH_BIAS = [[100, 37], [100, 37], [5, 260], [260, 1], [0, 0]]  # B and max_seq_len are those of the bias


@pytest.mark.parametrize("mask", [{}, {"num_targets": [1, 0, 1], "max_attn_len": 5}, {"attn_bias": None}])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_c_gets_the_same(recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, dim: int, mask: dict) -> None:
    """With other lengths, numbers of sequences and addresses; fails where this triton has moved what is used of it."""
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", LONG)
    memory: dict = {}
    has_bias = "attn_bias" in mask
    for lengths in WITH_BIAS if has_bias else STEPS:
        counts = {name: torch.ones(len(lengths)) if isinstance(x, list) else x for name, x in mask.items()}
        if has_bias:
            counts = {"attn_bias": torch.randn(2, 1, 260, 260).bfloat16(), "max_seq_len": 260}
        tensors, call = inputs(lengths, dim, **counts)
        same_addresses()
        again = both(tensors, call, memory)
        same_addresses()
        public = both(tensors, call, None)
        in_one = dim == 64 and not has_bias and sum(lengths) // len(lengths) >= LONG
        assert len(again) == len(public) == 2 + (2 if in_one else 3)
        assert list(map(without_hooks, again)) == list(map(without_hooks, public))
    in_either = dim == 64 and not has_bias
    assert [len(relaunches) for relaunches in memory.values()] == ([2, 2, 3] if in_either else [2, 3])


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_c_gets_the_same_for_a_packed_gradient(
    recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, dim: int, by_head: bool
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
        attention_sm90.silu_backward(dout, q, k, v, of_attention, of_u, memory=memory, needs_bias_grad=False, **call)
        return list(map(without_hooks, passed))

    for lengths in STEPS:
        (v, q, k, dout), call = inputs(lengths, dim)
        x, dx = (EMPTY(len(q), 4 * H * dim, dtype=torch.bfloat16) for _ in range(2))
        du = EMPTY(len(q), H, dim, dtype=torch.bfloat16)
        again, public = (launched(each, [dout, du, x, q, k, v, dx], call) for each in (memory, None))
        in_one = dim == 64 and sum(lengths) // len(lengths) >= LONG
        assert len(again) == 2 + (1 if in_one else 2)
        assert again == public
    assert [len(relaunches) for relaunches in memory.values()] == ([3, 4] if dim == 64 else [4])


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
    assert len(names) == 20, "the offsets are not at an aligned address"
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
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5), mask_tile_states=torch.ones(1, 1, 1, 1)),
        features(x, x, x, attn_mask=torch.ones(1, 1, 5, 5), mask_tile_states=torch.ones(2, 1, 1, 1)),
        features(x, x, x, attn_bias=torch.ones(1, 1, 5, 5), max_seq_len=6),
        features(x, x, x, attn_bias=torch.ones(1, 1, 5, 5), seq_offsets=torch.tensor([0, 8])),
        features(x[:1], x[:1], x[:1]),
    ]
    assert len({kind, *others}) == 1 + len(others)
    bias = torch.ones(1, 1, 5, 5)
    same = [features(y, y, y, attn_bias=bias, seq_offsets=torch.tensor([0, 4, len(y)])) for y in (x, longer)]
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
    call |= {name: False for name in ("concat_u", "concat_activated", "concat_x", "concat_norm")}
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
    """Any number of rows is one kind, and one compiled kernel each."""
    kernels = 2 if GATES[variant][0] is None else 3
    memory: dict = {}
    functions = set()
    for rows in (40, 40, 37, 1, 5000, 0, 64):
        tensors, call = gate_inputs(rows, variant)
        same_addresses()
        gate_both(tensors, call, memory)
        again = list(passed)
        same_addresses()
        gate_both(tensors, call, None)
        assert len(again) == len(passed) == (kernels if rows else kernels - 2)
        assert list(map(without_hooks, again)) == list(map(without_hooks, passed))
        functions |= {arguments[4] for arguments in passed}
    assert len(functions) == kernels
    assert [len(relaunches) for relaunches in memory.values()] == [1, kernels - 1]
    names = counted(monkeypatch)
    gate_both(*gate_inputs(99, variant), memory)
    assert not names, "no launch is Triton's"


@pytest.mark.parametrize("change", ["dy", "u", "shift"])
def test_copies_and_unaligned_gates_take_the_public_way(recorded, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    memory: dict = {}
    names = counted(monkeypatch)
    for _ in range(3):
        tensors, call = gate_inputs(40, "layer norm, dropout", shift=4 if change == "shift" else 0)
        if change != "shift":
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
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_results_are_those_of_the_public_way(monkeypatch: pytest.MonkeyPatch, dim: int, bias: bool) -> None:
    monkeypatch.setattr(attention_sm90, "ONE_KERNEL_FROM", LONG)
    memory: dict = {}
    of_bias = {"attn_bias": torch.randn(2, H, 260, 260, device="cuda"), "max_seq_len": 260} if bias else {}
    aligned = WITH_BIAS if bias else [*STEPS, [300] * 40]
    for lengths, shift in [*((lengths, 0) for lengths in aligned), ([5, 260], 4), ([100, 37], 0)]:
        (q, k, v, dout), call = inputs(lengths, dim, shift, "cuda", **of_bias)
        results = []
        for remembered in (memory, None):
            out = attention_sm90.forward(q, k, v, memory=remembered, **call)
            grads = attention_sm90.backward(dout, q, k, v, memory=remembered, needs_bias_grad=False, **call)
            results.append([out, *grads[:3]])
        for ours, public in zip(*results, strict=True):
            assert torch.equal(ours, public) and not ours.isnan().any()
            assert (ours[sum(lengths) :] == 0).all()
    assert len(memory) == (3 if dim == 64 and not bias else 2) and all(memory.values())


@on_hopper
def test_another_stream_and_a_graph() -> None:
    (q, k, v, _), call = inputs([100, 37], 128, 0, "cuda")
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
