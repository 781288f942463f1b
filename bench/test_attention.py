"""pytest-benchmark suite: attention kernels of this project, eager PyTorch and Inductor; a group per problem.

On a GPU: python -m pytest bench/test_attention.py --benchmark-json=bench/results/<gpu>/attention.json

`ms` and `tflops` (of live cells) are of one launch on an idle GPU, `sustained_*` of ten back to back; the stats that
pytest-benchmark adds are those of a launch with host time.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hstu_compile
from bench.attention_problem import DIRECTIONS, GIANT, Inputs, Problem, calls_of, compile_kernels, kernels
from bench.launches import Call, Launches, Recorder, Times, in_parallel, interleaved
from hstu_compile.ops import hstu_attention, kernel_table

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
HEAD_DIMS, SEQ_LENS = ((64, 128, 256), (1024, 2048, 4096, 8192)) if CUDA else ((32,), (64, 128))
MATERIALISED = 2048  # longest sequence of which eager's [B, H, N, N] fits
SETS = 2  # of inputs, each larger than the L2, used in turn
SECONDS = 0.2  # of launches, for each problem and direction
HOST_CALLS = 16  # in one compiled graph


def problems() -> Iterator[Problem]:
    if not CUDA:
        yield from (Problem(32, seq_len, width=64, batch=2) for seq_len in SEQ_LENS)
        return
    for seq_len, head_dim in itertools.product(SEQ_LENS, HEAD_DIMS):
        yield Problem(head_dim, seq_len)
        yield Problem(head_dim, seq_len, lengths="zipf")
        yield Problem(head_dim, seq_len, mask="targets")
        yield Problem(head_dim, seq_len, mask="window")
    yield from (Problem(head_dim, 4096) for head_dim in (32, 96, 192))
    yield from (Problem(head_dim, GIANT, lengths="giant") for head_dim in HEAD_DIMS)
    yield from (Problem(head_dim, 32, lengths="tiny") for head_dim in HEAD_DIMS)


def implementations(problem: Problem) -> list[str]:
    plain = problem.lengths == "full" and problem.mask == "causal" and problem.head_dim in HEAD_DIMS
    return [*kernels(), *(["eager", "inductor"] if plain and problem.seq_len <= MATERIALISED else [])]


CASES = [
    pytest.param(
        problem,
        direction,
        name,
        id=f"{problem.lengths}-{problem.mask}-{problem.head_dim}-{problem.seq_len}-{direction}-{name}",
    )
    for problem in problems()
    for direction in DIRECTIONS
    for name in implementations(problem)
]


def eager(q: Tensor, k: Tensor, v: Tensor, alpha: float) -> Tensor:
    """Causal HSTU attention of full-length sequences, [B, N, H, D]."""
    seq_len = q.size(1)
    causal = torch.ones(seq_len, seq_len, dtype=torch.bool, device=q.device).tril()
    weights = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) * alpha) / seq_len * causal
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def calls(name: str, problem: Problem, direction: str, sets: Sequence[Inputs]) -> list[Call]:
    """One for every set of inputs."""
    if name in kernels():
        return calls_of(kernels()[name], direction, sets)
    function = eager if name == "eager" else torch.compile(eager, dynamic=False)
    shape = (problem.batch, problem.seq_len)
    dense = [[t.unflatten(0, shape).detach() for t in one[:4]] for one in sets]
    alpha = problem.head_dim**-0.5
    if direction == "forward":
        return [functools.partial(function, q, k, v, alpha) for q, k, v, _ in dense]
    return [_gradients(function(*[t.requires_grad_() for t in qkv], alpha), qkv, dout) for *qkv, dout in dense]


def _gradients(out: Tensor, sources: Sequence[Tensor], dout: Tensor) -> Call:
    return lambda: torch.autograd.grad(out, sources, dout, retain_graph=True)


@functools.lru_cache(maxsize=1)
def measured(problem: Problem) -> dict[tuple[str, str], tuple[Times, Launches]]:
    """Every implementation and direction: they are interleaved, so the first test of a problem measures for all."""
    measured.cache_clear()  # what the last problem held
    torch._dynamo.reset()
    torch.manual_seed(0)
    sets = [problem.inputs(DEVICE, DTYPE) for _ in range(SETS)]
    recorder = Recorder(DEVICE)
    found = {}
    for direction in DIRECTIONS:
        launches = {
            name: recorder.launches(functools.partial(calls, name, problem, direction, sets))
            for name in implementations(problem)
        }
        times = interleaved(launches, DEVICE, SECONDS)
        found |= {(direction, name): (times[name], launches[name]) for name in launches}
    return found


@pytest.fixture(scope="module", autouse=True)
def compiled_kernels(request: pytest.FixtureRequest) -> None:
    """On every core first: one after the other they would take longer than what is measured."""
    if CUDA:
        wanted = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        variants = {(p["name"], p["problem"]._replace(seq_len=0, lengths="full")) for p in wanted if "problem" in p}
        in_parallel(compile_kernels, [variant for variant in variants if variant[0] in kernels()])


@pytest.mark.parametrize("problem, direction, name", CASES)
def test_attention(benchmark, problem: Problem, direction: str, name: str) -> None:
    times, launches = measured(problem)[direction, name]
    flops = problem.flops(direction)
    benchmark.group = f"attention {direction} D={problem.head_dim} N={problem.seq_len} {problem.lengths} {problem.mask}"
    benchmark.extra_info.update(
        implementation=name,
        direction=direction,
        dtype=str(DTYPE).removeprefix("torch."),
        head_dim=problem.head_dim,
        seq_len=problem.seq_len,
        batch=len(problem.histories()),
        num_heads=problem.num_heads,
        lengths=problem.lengths,
        mask=problem.mask,
        ms=times.ms,
        tflops=flops / times.ms / 1e9,
        sustained_ms=times.sustained_ms,
        sustained_tflops=flops / times.sustained_ms / 1e9,
        torch=torch.__version__,
    )
    benchmark.pedantic(_and_wait(launches.single[0]), rounds=3)


def _and_wait(call: Call) -> Callable[[], None]:
    def run() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("caller", ["compiled", "op"])
def test_host_cost(benchmark, caller: str) -> None:
    """The host's time for one forward call, as one of many in a graph, on a problem that keeps no GPU busy."""
    torch._dynamo.reset()
    problem = Problem(64, 64, width=128, batch=2)
    q, k, v, _, arguments = problem.inputs(DEVICE, DTYPE)
    where = {"seq_offsets": arguments["seq_offsets"], "max_seq_len": problem.seq_len}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(HOST_CALLS):
            v = hstu_attention(q, k, v, **where, alpha=0.125, scaling_seq_len=64.0)
        return v

    called = torch.compile(function, backend=hstu_compile.backend) if caller == "compiled" else function

    def enqueue() -> float:
        began = time.perf_counter()
        called(q, k, v)
        return (time.perf_counter() - began) / HOST_CALLS

    rounds = []
    with torch.no_grad():
        for _ in range(50 if CUDA else 5):
            rounds.append(enqueue())
            _and_wait(lambda: None)()
        benchmark.pedantic(called, args=(q, k, v), rounds=10)
    kernel = kernel_table.choose_attention(DEVICE, DTYPE, 64, 64, has_mask=False, has_bias=False).name
    benchmark.group = "attention host cost"
    benchmark.extra_info.update(
        implementation={kernel_table.PORTABLE: "portable", kernel_table.ATTENTION[9]: "sm90"}.get(kernel, "reference"),
        direction="forward",
        caller=caller,
        host_us=1e6 * sorted(rounds)[len(rounds) // 2],
        torch=torch.__version__,
    )
