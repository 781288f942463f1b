"""mode="reduce-overhead": one CUDA graph a size, no parameter copied at a replay, the bits of a run without graphs."""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import CUDAGraphNode, CUDAGraphTreeManager, get_manager

import hstu_compile
from bench.native_layer import HSTUStack
from hstu_compile import TokenBuckets
from tests.models.cases import Stack
from tests.models.meta_stu import MetaSTU

DEVICE = "cuda"
LAYERS, EMBEDDING, HEADS, DIM, MAX_SEQ_LEN, SEQUENCES = 2, 64, 2, 64, 256, 8
PAD = TokenBuckets([448, 704, 1152], batch_size=SEQUENCES)
ROUNDS = 4  # through all sizes: one warms up, one records, two replay


def random(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def tokens(*shape: int) -> Tensor:
    """Drawn on the CPU, whose generator no graph advances."""
    return torch.randn(*shape, EMBEDDING).to(DEVICE, torch.bfloat16)


def jagged() -> nn.Module:
    return Stack(*(MetaSTU(EMBEDDING, HEADS, DIM, DIM, contextual=2) for _ in range(LAYERS)))


def jagged_batches() -> Iterator[tuple]:
    """x [T, E], offsets, max_seq_len, targets: numbers of tokens and of sequences change at every step."""
    for _ in range(ROUNDS):
        for size in PAD.sizes:
            total, sequences = size - int(random(0, 100)), SEQUENCES - int(random(0, 3))
            offsets = torch.arange(sequences + 1) * total // sequences
            offsets[1:-1] += random(0, 10, sequences - 1)
            targets = PAD.pad_sequences(random(0, 3, sequences).to(DEVICE))
            yield tokens(total), PAD.pad_offsets(offsets.to(DEVICE)), MAX_SEQ_LEN, targets


def dense() -> nn.Module:
    return HSTUStack(LAYERS, EMBEDDING, HEADS, DIM, dropout_ratio=0.2)


def dense_batches() -> Iterator[tuple]:
    """x [B, N, E], lengths"""
    for _ in range(ROUNDS):
        yield tokens(SEQUENCES, MAX_SEQ_LEN), random(1, MAX_SEQ_LEN + 1, SEQUENCES).to(DEVICE)


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    batches: Callable[[], Iterator[tuple]]
    pad: Callable[[Tensor], Tensor]
    sizes: int


CASES = {
    "jagged": Case(jagged, jagged_batches, PAD.pad_tokens, sizes=len(PAD.sizes)),
    "dense": Case(dense, dense_batches, lambda x: x, sizes=1),
}


@dataclass
class Run:
    values: list[Tensor] = field(default_factory=list)  # in the order they came
    shapes: set[tuple[int, ...]] = field(default_factory=set)  # of what the model was called with


def compiled(model: nn.Module, mode: str | None) -> Callable[..., Tensor]:
    """deterministic: with and without graphs Inductor makes the same kernels."""
    options = {"strict": True, "expect": LAYERS, "deterministic": True}
    return torch.compile(model, backend=functools.partial(hstu_compile.backend, options=options), mode=mode)


def run(case: Case, model: nn.Module, mode: str | None, train: bool) -> Run:
    """Calls, or steps of training, one after the other; what a graph returns is copied before its next replay."""
    call, done = compiled(model.train(train), mode), Run()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    for step, (x, *others) in enumerate(case.batches()):
        x.requires_grad_(train)
        padded = case.pad(x)
        done.shapes |= {tuple(t.shape) for t in (padded, *others) if isinstance(t, Tensor)}
        state = torch.random.get_rng_state()
        torch.manual_seed(step)  # of dropout
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(train):
            out = call(padded, *others)[: x.shape[0]]
        torch.random.set_rng_state(state)
        done.values.append(out.detach().clone())
        if train:
            out.float().square().mean().backward()
            assert x.grad is not None
            done.values.append(x.grad.clone())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    done.values += [p.detach() for p in model.parameters()]
    return done


def recorded() -> list[CUDAGraphNode]:
    """Every graph of this device, those that start a path (the forwards) first."""
    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    nodes = [] if manager is None else list(manager.get_roots())
    for node in nodes:
        nodes.extend(child for children in node.children.values() for child in children)
    return nodes


def copied(node: CUDAGraphNode) -> set[tuple[int, ...]]:
    """Shapes of the tensors that a replay copies into the graph's memory."""
    inputs = [node.reconstructed_inputs[i] for i in node.non_static_input_idx]
    return {tuple(t.shape) for t in inputs if isinstance(t, Tensor)}


def test_what_is_read_of_torch() -> None:
    """Private to torch, as in 2.11 and 2.13, and used here alone: `recorded` and `copied` go by it."""
    assert list(inspect.signature(get_manager).parameters) == ["device_index", "create_if_none_exists"]
    assert callable(CUDAGraphTreeManager.get_roots)
    fields = inspect.getsource(CUDAGraphNode.__init__)
    for name in ("children", "reconstructed_inputs", "non_static_input_idx", "static_input_data_ptrs"):
        assert f"self.{name}:" in fields
    assert '"cudagraph_skips"' in inspect.getsource(torch._inductor.cudagraph_utils)


@pytest.mark.cuda
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_graphs(name: str, train: bool) -> None:
    case = CASES[name]
    model = case.model().to(DEVICE, torch.bfloat16)
    plain_model, first = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    hstu_compile.backend.reset()  # type: ignore[attr-defined]
    plain = run(case, plain_model, None, train)
    assert not recorded()
    counters.clear()
    graphs = run(case, model, "reduce-overhead", train)

    nodes = recorded()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(nodes) == case.sizes * (2 if train else 1)
    parameters = list(model.parameters())
    assert not graphs.shapes & {tuple(p.shape) for p in parameters}  # else the next line would not see a copy
    assert all(copied(node) <= graphs.shapes for node in nodes)
    addresses = {p.data_ptr() for p in parameters}
    assert all(addresses <= set(node.static_input_data_ptrs) for node in nodes[: case.sizes])

    assert all(torch.equal(a, b) for a, b in zip(graphs.values, plain.values, strict=True))
    assert train != all(torch.equal(p, before) for p, before in zip(parameters, first, strict=True))
