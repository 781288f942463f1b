"""Variants of the table gradient kernel, timed on the sizes of a relative time bias: which one ops/kernels keeps.

python bench/table_grad_variants.py
"""

import torch
import triton
import triton.language as tl

from hstu_compile.ops.kernels import table_grad as product


@triton.jit
def columns(
    grad, index, partial, n, table_size, steps,
    UNROLL: tl.constexpr, RUNS: tl.constexpr, EARLY: tl.constexpr, BARRIER: tl.constexpr,
):  # fmt: skip
    """The product's kernel, one channel and one slice, with its ideas as switches."""
    program = tl.program_id(0).to(tl.int64)
    thread = tl.arange(0, 32)
    own = partial + program * table_size * 32 + thread
    row = tl.zeros((32,), tl.int32)
    total = tl.zeros((32,), tl.float32)
    for step in range(steps):
        rows, values = (), ()
        for u in tl.static_range(UNROLL):
            k = ((program * steps + step) * UNROLL + u) * 32 + thread
            rows = rows + (tl.load(index + k, mask=k < n, other=-1).to(tl.int32),)
        for u in tl.static_range(UNROLL):
            k = ((program * steps + step) * UNROLL + u) * 32 + thread
            inside = (rows[u] >= 0) & (rows[u] < table_size)
            if EARLY:
                g = tl.load(grad + k, mask=k < n, other=0.0).to(tl.float32)
                values = values + (tl.where(inside, g, 0.0),)
            else:
                values = values + (tl.load(grad + k, mask=inside, other=0.0).to(tl.float32),)
        for u in tl.static_range(UNROLL):
            if RUNS:
                changed = (rows[u] != row) & (values[u] != 0)
                so_far = tl.load(own + row * 32, mask=changed, other=0.0)
                tl.store(own + row * 32, so_far + total, mask=changed)
                total = tl.where(changed, 0.0, total) + values[u]
                row = tl.where(changed, rows[u], row)
            else:
                some = values[u] != 0
                so_far = tl.load(own + rows[u] * 32, mask=some, other=0.0)
                tl.store(own + rows[u] * 32, so_far + values[u], mask=some)
            if BARRIER:
                tl.debug_barrier()
    tl.store(own + row * 32, tl.load(own + row * 32) + total)


@triton.jit
def one_hot_dot(grad, index, partial, n, steps, HI: tl.constexpr, BLOCK: tl.constexpr):
    """Two thin one-hot matrices; gradients as three bf16 terms, exact; one warp, so nothing is built twice."""
    program = tl.program_id(0).to(tl.int64)
    acc = tl.zeros((HI, 16), tl.float32)
    for step in range(steps):
        k = (program * steps + step) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad + k, mask=k < n, other=0.0).to(tl.float32)
        i = tl.load(index + k, mask=k < n, other=0).to(tl.int32)
        hi = (i // 16)[None, :] == tl.arange(0, HI)[:, None]
        lo = ((i % 16)[:, None] == tl.arange(0, 16)[None, :]).to(tl.bfloat16)
        for _ in tl.static_range(3):
            term = g.to(tl.bfloat16)
            g = g - term.to(tl.float32)
            acc = tl.dot(tl.where(hi, term[None, :], 0.0), lo, acc)
    tl.store(partial + program * HI * 16 + tl.arange(0, HI)[:, None] * 16 + tl.arange(0, 16)[None, :], acc)


def run_columns(grad, index, size, unroll, programs, runs=True, early=True, barrier=False):
    n = grad.numel()
    partial = torch.zeros(programs, size, 32, device=grad.device)
    steps = triton.cdiv(n, 32 * unroll * programs)
    columns[(programs,)](grad, index, partial, n, size, steps, unroll, runs, early, barrier, num_warps=1)
    return partial.sum((0, 2))


def run_dot(grad, index, size, block, programs):
    n, hi = grad.numel(), max(16, triton.next_power_of_2(triton.cdiv(size, 16)))
    partial = torch.empty(programs, hi * 16, device=grad.device)
    one_hot_dot[(programs,)](grad, index, partial, n, triton.cdiv(n, block * programs), hi, block, num_warps=1)
    return partial.sum(0)[:size]


def inputs(batch=32, length=2048, size=129, seed=0):
    """name -> (grad, index): random buckets, the worst case; buckets of log time differences, all and causal half."""
    generator = torch.Generator("cuda").manual_seed(seed)
    grad = torch.randn(batch, length, length, device="cuda", generator=generator)
    uniform = torch.randint(0, size, grad.shape, device="cuda", generator=generator, dtype=torch.int16)
    gaps = torch.empty(batch, length, device="cuda", dtype=torch.float64).exponential_(1 / 36000, generator=generator)
    times = gaps.cumsum(1)
    index = torch.empty_like(uniform)
    for b in range(batch):
        apart = (times[b, :, None] - times[b, None, :]).abs().clamp(min=1)
        index[b] = (apart.log() / 0.301).long().clamp(0, size - 1)
    return {"random": (grad, uniform), "time": (grad, index), "causal": (grad.tril(), index)}


def median_ms(f, *args, repeats=7):
    f(*args)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(), f(*args), end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def main():
    size, sms = 129, torch.cuda.get_device_properties(0).multi_processor_count
    variants = {"product": lambda g, i: product.table_grad(g, i, size)}
    for warps in (8, 16, 32):
        for unroll in (4, 8, 16):
            variants[f"runs, {warps} a SM, unroll {unroll}"] = (
                lambda g, i, w=warps, u=unroll: run_columns(g, i, size, u, w * sms)
            )  # fmt: skip
    variants["runs, 32, 8, grad after index"] = lambda g, i: run_columns(g, i, size, 8, 32 * sms, early=False)
    variants["runs, 32, 8, barriers"] = lambda g, i: run_columns(g, i, size, 8, 32 * sms, barrier=True)
    variants["no runs, 16, 8"] = lambda g, i: run_columns(g, i, size, 8, 16 * sms, runs=False)
    variants["no runs, 32, 8"] = lambda g, i: run_columns(g, i, size, 8, 32 * sms, runs=False)
    for block in (64, 128):
        variants[f"one-hot dot, block {block}"] = lambda g, i, b=block: run_dot(g, i, size, b, 32 * sms)

    data = inputs()
    exact, eager = {}, {}
    for name, (g, i) in data.items():
        flat = i.flatten().long()
        exact[name] = torch.zeros(size, device="cuda", dtype=torch.float64).index_add_(0, flat, g.flatten().double())
        eager[name] = torch.zeros(size, device="cuda").index_add_(0, flat, g.flatten())
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}; ms (error / eager's)"
    )
    print(f"{'':32}" + "".join(f"{name:>18}" for name in data), f"{'causal bf16':>18}", flush=True)
    half = data["causal"][0].bfloat16()
    for variant, f in variants.items():
        cells = []
        for name, (g, i) in data.items():
            error, budget = ((x - exact[name]).abs().max().item() for x in (f(g, i), eager[name]))
            cells.append(f"{median_ms(f, g, i):.3f} ({error / budget:.2f})")
        cells.append(f"{median_ms(f, half, data['causal'][1]):.3f}")
        print(f"{variant:32}" + "".join(f"{cell:>18}" for cell in cells), flush=True)

    grad = torch.randn(2048, 2048, device="cuda")
    index = torch.arange(2048, device="cuda")[:, None] - torch.arange(2048, device="cuda")[None, :] + 2047
    heads = torch.randn(8, 2048, 2048, 8, device="cuda")
    for name, g, i, rows in (
        ("position table [4095], [N, N] lookups", grad, index, 4095),
        ("position table [4095], [32, N, N] lookups", data["time"][0], index.expand(32, -1, -1), 4095),
        ("time table [129, 8], [8, N, N] lookups", heads, data["time"][1][:8], 129),
    ):
        i = i.to(torch.int16).contiguous()
        flat = i.flatten().long()
        table = torch.zeros(rows, *g.shape[i.dim() :], device="cuda")
        source = g.reshape(-1, *table.shape[1:])
        ours = median_ms(product.table_grad, g, i, rows, repeats=3)
        aten = median_ms(table.index_add_, 0, flat, source, repeats=3)
        print(f"{name:44}{ours:.3f} ms, index_add_ {aten:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
