"""Launches of norm * gate * dropout that are done again: see test_launch.py."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_launches import counted, passed, recording, same_addresses_again, without_hooks

from hstu_compile.ops.kernels import norm_gate_dropout as gate
from hstu_compile.ops.kernels import paged_attention_sm90
from hstu_compile.ops.norm_gate_dropout import gate_features, norm_gate_dropout


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from recording(monkeypatch)


@pytest.fixture
def same_addresses(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return same_addresses_again(monkeypatch)


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


def attention_inputs(rows: int) -> tuple[list, dict[str, Any], dict[str, Any]]:
    """What an attention over pages takes, and the gate behind it."""
    packed = torch.randn(rows, 4, 4, 16).bfloat16()
    _, _, _, *affine, _ = gate_inputs(rows, "rms norm of heads")[0]
    _, gate = gate_inputs(rows, "rms norm of heads")
    out = torch.zeros(rows, WIDTH, dtype=torch.bfloat16)
    gate |= {"dropout_ratio": 0.0, "u": packed[:, 0].flatten(1), "weight": affine[0], "bias": affine[1]}
    paging = torch.zeros(2, 9, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    tensors = [*packed.unbind(1)[1:], torch.zeros(4, 2, 32, 4, 16, dtype=torch.bfloat16), *paging]
    call: dict[str, Any] = {"seq_offsets": torch.zeros(3, dtype=torch.int64), "num_targets": None}
    call |= {"num_contextuals": None, "max_seq_len": 4096, "alpha": 0.5, "scale": 0.1, "causal": True}
    call |= {"contextual_seq_len": 0, "target_group_size": 1, "max_attn_len": 0, "min_full_attn_seq_len": 0}
    return tensors, call | {"targets_share_position": False}, gate | {"seed": None, "out": out}


@pytest.mark.parametrize("processors", [1, 132])
def test_c_gets_the_same_of_a_gated_attention(
    recorded, same_addresses, monkeypatch: pytest.MonkeyPatch, processors: int
) -> None:
    """Whole, and in parts that the gate adds: their number is another with other numbers of rows."""
    monkeypatch.setattr(paged_attention_sm90, "processors", lambda device: processors)
    memory: dict = {}
    for rows in (40, 40, 37, 2, 3000, 3000, 64):
        tensors, call, given = attention_inputs(rows)
        done = []
        for remembered in (memory, None):
            same_addresses()
            passed.clear()
            paged_attention_sm90.forward(*tensors, memory=remembered, gate=given, **call)
            done.append(list(map(without_hooks, passed)))
        assert done[0] == done[1] and len(done[0]) == (3 if processors == 1 or rows == 3000 else 2)
    names = counted(monkeypatch)
    tensors, call, given = attention_inputs(99)
    paged_attention_sm90.forward(*tensors, memory=memory, gate=given, **call)
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
