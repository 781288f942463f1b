"""The lookup in a tiny table: its op, the gradient kernel in Triton's interpreter and compiled, and the pass."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from hstu_compile.ops.table_lookup import table_grad, table_grad_reference, table_lookup
from hstu_compile.passes import table_lookup as table_lookup_pass
from hstu_compile.passes.report import Report
from tests.error_budget import BACKWARD, assert_within_budget

ops = torch.ops.hstu_compile

# (index shape, table size, channels, gradient dtype, index dtype, how the index is distributed)
CASES = [
    ((0,), 5, None, torch.float32, torch.int64, "random"),
    ((1,), 1, None, torch.float32, torch.int32, "random"),
    ((3, 0), 129, 4, torch.float32, torch.int64, "random"),
    ((40, 30), 129, None, torch.float32, torch.int16, "random"),
    ((700,), 129, None, torch.float32, torch.int16, "sorted"),
    ((257,), 129, None, torch.bfloat16, torch.int32, "one"),
    ((513,), 4096, None, torch.float32, torch.int64, "random"),
    ((300,), 129, 4, torch.bfloat16, torch.int16, "sorted"),
    ((100,), 700, 3, torch.float32, torch.int32, "random"),
    ((33,), 7, 40, torch.float16, torch.int64, "random"),
    ((3,), 2, 1025, torch.float32, torch.int64, "random"),
    ((65,), 7, 1, torch.float64, torch.int64, "random"),
]


def make(shape, size, channels, dtype, index_dtype, distribution, device="cpu"):
    """grad with a third of it zero, and index."""
    index = torch.randint(0, size, shape, device=device)
    if distribution == "one":
        index = index.zero_() + size - 1
    elif distribution == "sorted":
        index = index.flatten().sort().values.view(shape)
    grad = torch.randn(*shape, *([] if channels is None else [channels]), device=device, dtype=dtype)
    grad[torch.rand_like(grad) < 1 / 3] = 0
    return grad, index.to(index_dtype)


def eager_grad(grad, index, size):
    """What ATen's own backward gives."""
    table = grad.new_zeros(size, *grad.shape[index.dim() :]).requires_grad_()
    table[index.long()].backward(grad)
    return table.grad


def check_grad(actual, grad, index, size):
    reference = table_grad_reference(grad.double(), index, size)
    assert_within_budget(actual, eager_grad(grad, index, size), reference, BACKWARD, "table.grad")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_within_budget(case):
    grad, index = make(*case)
    check_grad(table_grad(grad, index, case[1]), grad, index, case[1])


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_within_budget_on_gpu(case):
    grad, index = make(*case, device="cuda")
    check_grad(table_grad(grad, index, case[1]), grad, index, case[1])


@pytest.mark.cuda
def test_gradient_of_many_lookups_on_gpu():
    for distribution in ("random", "sorted"):
        grad, index = make((4, 1000, 1003), 129, None, torch.float32, torch.int16, distribution, "cuda")
        first = table_grad(grad, index, 129)
        check_grad(first, grad, index, 129)
        assert torch.equal(first, table_grad(grad, index, 129))


def test_kernel_in_the_interpreter():
    """The Triton kernel, run on the CPU: the same cases, strides, indices out of range, and NaN where it belongs."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    code = "from tests.test_table_lookup import run_in_interpreter as run; run()"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_in_interpreter():
    import tests.triton_interpreter  # noqa: F401
    from hstu_compile.ops.kernels.table_grad import table_grad as kernel

    for case in CASES:
        torch.manual_seed(0)
        grad, index = make(*case)
        check_grad(kernel(grad, index, case[1]), grad, index, case[1])
        if index.dim() == 2:
            grad, index = grad.transpose(0, 1), index.transpose(0, 1)
            check_grad(kernel(grad, index, case[1]), grad, index, case[1])

    index = torch.tensor([0, -1, 5, 2**32 + 1, -(2**40), 2, 4, 4])
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, float("nan"), 64.0])
    out = kernel(grad, index, 5)
    assert torch.equal(out[:4], torch.tensor([1.0, 0.0, 32.0, 0.0])) and out[4].isnan()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("channels, threads", [(1, 32), (4, 32), (64, 64)])
def test_compiled_kernel_keeps_threads_to_their_columns(capability, channels, threads):
    """It has no barriers because no value changes threads: one layout, no conversion, nothing in shared memory."""
    from hstu_compile.ops.kernels.table_grad import UNROLL, accumulate
    from tests.compile_only import resources, target

    with target(capability):
        compiled = accumulate.warmup(
            torch.float32, torch.int16, torch.float32, 1 << 20, channels, 129, 1, 129, 16,
            CHANNELS=channels, THREADS=threads, UNROLL=UNROLL, num_warps=threads // 32, grid=(1,),
        )  # fmt: skip
    ttgir = compiled.asm["ttgir"]
    layouts = re.findall(r"= #ttg\.(\w+<.*>)", ttgir)
    assert len(layouts) == 1 and "convert_layout" not in ttgir, layouts
    usage = resources(compiled)
    assert usage.shared == 0 and usage.spilled == 0


@pytest.mark.parametrize("columns", [None, 3])
def test_opcheck(columns):
    shape = (129,) if columns is None else (129, columns)
    index = torch.randint(0, 129, (4, 5))
    for i in (index.int(), index.t(), index[:0]):
        torch.library.opcheck(ops.table_lookup.default, (torch.randn(shape, requires_grad=True), i))
        torch.library.opcheck(ops.table_grad.default, (torch.randn(*i.shape, *shape[1:]), i.short(), 129))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lookup_is_the_gather(dtype):
    table, index = torch.randn(9, 2, dtype=dtype, requires_grad=True), torch.randint(0, 9, (6, 7))
    out = table_lookup(table, index)
    assert torch.equal(out, table[index]) and out.is_contiguous()
    grad = torch.randn(2, 6, 7, dtype=dtype).permute(1, 2, 0)  # heads first, as a bias added to scores has it
    out.backward(grad)
    check_grad(table.grad, grad, index, 9)
    with torch.inference_mode():
        assert torch.equal(table_lookup(table, index), table[index])


@pytest.mark.parametrize("bad", [9, -1])
def test_out_of_range_raises(bad):
    with pytest.raises(IndexError):
        table_lookup(torch.randn(9, requires_grad=True), torch.tensor([0, bad]))


def test_bad_arguments():
    with pytest.raises(ValueError, match="table: expected floating point"):
        table_lookup(torch.arange(4), torch.tensor([0]))
    with pytest.raises(ValueError, match="index: expected int32 or int64, got torch.float32"):
        table_lookup(torch.randn(4), torch.tensor([0.0]))
    with pytest.raises(ValueError, match=r"grad: .* index's shape \[3\].* got torch.float32 \[2\]"):
        table_grad(torch.randn(2), torch.zeros(3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="index: expected int16, int32 or int64"):
        table_grad(torch.randn(2), torch.zeros(2), 4)


def time_bias(table, times, scores):
    apart = (times[:, :, None] - times[:, None, :]).abs().clamp(min=1)
    bucket = (apart.float().log() / 0.301).long().clamp(0, table.shape[0] - 1)
    return (table_lookup(table, bucket) + scores).sin()


def test_under_aot_autograd_only_the_gradient_is_an_op():
    """The gather is ATen's, below autograd; the backward recomputes a narrow index from the timestamps."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(gm, inputs):
        graphs.append([node.target for node in gm.graph.nodes])
        return make_boxed_func(gm)

    backend = aot_autograd(fw_compiler=keep, inference_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    table, scores = torch.randn(129, requires_grad=True), torch.randn(2, 16, 16, requires_grad=True)
    times = torch.randint(0, 10**6, (2, 16))
    compiled = torch.compile(time_bias, backend=backend, fullgraph=True)
    compiled(table, times, scores).sum().backward()
    compiled_grad, table.grad = table.grad, None
    time_bias(table, times, scores).sum().backward()
    assert torch.equal(compiled_grad, table.grad)

    gather, gradient = torch.ops.aten.index_select.default, ops.table_grad.default
    forward, backward = graphs
    assert gather in forward and ops.table_lookup.default not in forward
    assert gradient in backward and torch.ops.aten.log.default in backward
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        with mode():
            compiled(table, times, scores)
        assert gather in graphs[-1] and ops.table_lookup.default not in graphs[-1]


# The pass


def capture(f, *args):
    """The IR of the passes; Dynamo keeps on each placeholder whether it requires a gradient."""
    gm = make_fx(f, tracing_mode="fake", pre_dispatch=True)(*args)
    for node, arg in zip(gm.graph.find_nodes(op="placeholder"), args, strict=True):
        node.meta["example_value"] = arg
    return gm


def table_of(*shape):
    return torch.randn(*shape, requires_grad=True)


def many(size, *shape, dtype=torch.int64):
    return torch.randint(0, size, shape or (70 * size,)).to(dtype)


FITS = {
    "index_select": (lambda t, i: t.index_select(0, i), table_of(9), many(9)),
    "index_select along dim 1": (lambda t, i: t.index_select(-1, i).view(2, 9, 70), table_of(2, 9), many(9)),
    "index": (lambda t, i: t[i], table_of(9), many(9, 3, 300, dtype=torch.int32)),
    "index from the end": (lambda t, i: t[i - 9], table_of(9), many(9, 3, 300)),
    "index along dim 1": (lambda t, i: t[:, i], table_of(4, 9), many(9, 3, 300)),
    "index, per head": (lambda t, i: t[i].permute(2, 0, 1), table_of(9, 4), many(9, 30, 30)),
    "embedding": (lambda t, i: torch.nn.functional.embedding(i, t), table_of(9, 1), many(9, 30, 30)),
    "slice of a parameter": (lambda t, i: t[:9][i], table_of(15), many(9, 30, 30)),
}


@pytest.mark.parametrize("name", FITS)
def test_pass_rewrites(name):
    f, table, index = FITS[name]
    gm, report = capture(f, table, index), Report()
    assert table_lookup_pass.run(gm, report) == 1 == len(report.fused("table_lookup"))
    gm.recompile()
    gm.graph.lint()
    targets = [node.target for node in gm.graph.nodes]
    assert ops.table_lookup.default in targets
    assert not {table_lookup_pass.aten.index.Tensor, table_lookup_pass.aten.embedding.default} & set(targets)
    assert table_lookup_pass.aten.index_select.default not in targets

    expected, table.grad = f(table, index), None
    out = gm(table, index)
    assert torch.equal(out, expected) and out.stride() == expected.stride()
    grad = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, table, grad)
    (eager,) = torch.autograd.grad(expected, table, grad)
    double = table.detach().double().requires_grad_()
    (reference,) = torch.autograd.grad(f(double, index), double, grad.double())
    assert_within_budget(ours, eager, reference, BACKWARD, "table.grad")
    assert table_lookup_pass.run(gm, Report()) == 0


NEAR_MISSES = {
    "100 columns": (lambda t, i: t[i], table_of(9, 100), many(9)),
    "3 dimensions": (lambda t, i: t[i], table_of(9, 2, 2), many(9)),
    "padding_idx": (lambda t, i: torch.nn.functional.embedding(i, t, padding_idx=0), table_of(9, 2), many(9)),
    "scale_grad": (lambda t, i: torch.nn.functional.embedding(i, t, scale_grad_by_freq=True), table_of(9, 2), many(9)),
    "sparse": (lambda t, i: torch.nn.functional.embedding(i, t, sparse=True), table_of(9, 2), many(9)),
}


@pytest.mark.parametrize("reason", NEAR_MISSES)
def test_pass_explains_a_near_miss(reason):
    f, table, index = NEAR_MISSES[reason]
    gm, report = capture(f, table, index), Report()
    before = [node.target for node in gm.graph.nodes]
    assert table_lookup_pass.run(gm, report) == 0
    assert [node.target for node in gm.graph.nodes] == before
    (region,) = report.missed("table_lookup")
    assert reason in region.reason


@pytest.mark.parametrize(
    "f, table, index",
    [
        (lambda t, i: t[i], table_of(5000), many(5000, 400, 1000)),  # items
        (lambda t, i: t[i], table_of(9), many(9, 100)),  # few lookups
        (lambda t, i: t[i], torch.randn(9), many(9)),  # no gradient
        (lambda t, i: t[i], torch.arange(9), many(9)),
        (lambda t, i: t[i, i], table_of(9, 9), many(9)),
        (lambda t, i: t.detach()[i], table_of(9), many(9)),
    ],
)
def test_pass_is_silent_about_other_lookups(f, table, index):
    gm, report = capture(f, table, index), Report()
    assert table_lookup_pass.run(gm, report) == 0 and not report.regions


def test_lookups_that_vary_in_number_are_rewritten():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    table = mode.from_tensor(table_of(9), static_shapes=True)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC])
    index = mode.from_tensor(many(9), symbolic_context=context)
    with mode:
        gm = make_fx(lambda t, i: t[i], pre_dispatch=True)(table, index)
    next(iter(gm.graph.nodes)).meta["example_value"] = table
    guards = len(mode.shape_env.guards)
    assert table_lookup_pass.run(gm, Report()) == 1
    assert len(mode.shape_env.guards) == guards
