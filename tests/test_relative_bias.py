"""The relative bias of the attention op on whatever device is there: against the dense bias that it stands for."""

import pytest
import torch
from eager_attention import dense_bias, eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget
from relative_bias_problem import TIMES, relative_bias
from test_hstu_attention import DEVICE, MASKS, H, offsets_of, op_arguments, slices, tensors

from hstu_compile.ops import hstu_attention
from hstu_compile.ops.hstu_attention_reference import hstu_attention_reference

LENGTHS = [33, 0, 70, 1, 64]
B, N = len(LENGTHS), 71
TABLES = ("position_bias", "time_bias")


def jagged() -> dict:
    return {"seq_offsets": offsets_of(LENGTHS), "max_seq_len": N, "alpha": 0.2, "scaling_seq_len": N}


def bias(**given) -> dict:
    return relative_bias(B, H, N, device=DEVICE, **given)


def run(attend, q, k, v, dout, arguments: dict, tables: dict) -> dict:
    """Output and gradients by name; `attend` gets the tables as leaves."""
    leaves = {"q": q, "k": k, "v": v, **tables}
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    out = attend(**leaves, **arguments)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    return {"out": out, **{f"d {name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def exact(q, k, v, position_bias=None, time_bias=None, attn_bias=None, **arguments):
    """The reference, which gets the dense bias that the tables stand for."""
    names = ("row_times", "col_times", "time_boundaries", "time_symmetric")
    times = {name: arguments.pop(name) for name in names}
    near = dense_bias(position_bias=position_bias, time_bias=time_bias, **times, N=arguments["max_seq_len"])
    return hstu_attention_reference(q, k, v, attn_bias=near if attn_bias is None else attn_bias + near, **arguments)


def check(q, k, v, arguments: dict, relative: dict, attn_bias=None) -> dict:
    dout = torch.randn(*q.shape[:-1], v.shape[-1], device=DEVICE).to(q.dtype)
    tables = {name: relative[name] for name in TABLES if relative[name] is not None}
    tables |= {} if attn_bias is None else {"attn_bias": attn_bias}
    times = {name: t for name, t in relative.items() if name not in TABLES}
    arguments = {**arguments, **times}
    double = {name: t.double() if name == "attn_mask" else t for name, t in arguments.items()}
    wide = {name: t.double() for name, t in tables.items()}
    want = run(exact, *(t.double() for t in (q, k, v, dout)), double, wide)
    eager = run(eager_attention, q, k, v, dout, arguments, tables)
    ours = run(hstu_attention, q, k, v, dout, arguments, tables)
    for name, reference in want.items():
        assert_within_budget(ours[name], eager[name], reference, FORWARD if name == "out" else BACKWARD, name)
    return ours


@pytest.mark.parametrize("dtype", TIMES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_jagged(dtype, symmetric, shared):
    torch.manual_seed(0)
    q, k, v = slices(sum(LENGTHS), 32, 32, torch.bfloat16, "packed")
    check(q, k, v, jagged(), bias(dtype=dtype, symmetric=symmetric, shared=shared))


@pytest.mark.parametrize("mask", ["full", "window", "targets"])
@pytest.mark.parametrize("absent", [("position_bias",), ("time_bias", "row_times", "col_times", "time_boundaries")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_of_the_two(mask, absent, dtype):
    torch.manual_seed(1)
    q, k, v = slices(sum(LENGTHS), 32, 64, dtype, "interleaved")
    targets = {"num_targets": [3, 0, 20, 1, 0]} if mask == "targets" else {}
    check(q, k, v, jagged() | tensors(MASKS[mask] | targets), bias() | dict.fromkeys(absent))


@pytest.mark.parametrize("lengths", [None, [0, 1, 64, 100]])
@pytest.mark.parametrize("one_sequence", [False, True])
def test_dense(lengths, one_sequence):
    """Beside a mask tensor and a bias; strides of all kinds, one for all sequences or each its own."""
    torch.manual_seed(2)
    N = 100
    q, k, v = (torch.randn(4, H, N, 64, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    relative = relative_bias(4, H, N, device=DEVICE, one_sequence=one_sequence, symmetric=True)
    relative |= {name: relative[name].t().contiguous().t() for name in (*TABLES, "row_times")}
    relative["time_boundaries"] = relative["time_boundaries"].repeat_interleave(2)[::2]
    mask = (torch.rand(4, 1, N, N, device=DEVICE) < 0.5).float()
    arguments = {"seq_lengths": None if lengths is None else torch.tensor(lengths, device=DEVICE), "causal": False}
    arguments |= {"max_seq_len": N, "alpha": 0.125, "scaling_seq_len": N, "attn_mask": mask}
    check(q, k, v, arguments, relative, torch.randn(1, H, N, N, device=DEVICE))


@pytest.mark.parametrize("dtype", TIMES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_times_of_all_kinds(dtype, symmetric):
    """Not sorted, equal, negative; differences that wrap around, infinities and NaN; boundaries that are met."""
    torch.manual_seed(3)
    q, k, v = slices(sum(LENGTHS), 32, 32, torch.float32, "packed")
    relative = bias(dtype=dtype, symmetric=symmetric)
    for name in ("row_times", "col_times"):
        times = torch.randint(-9, 10, (B, N), device=DEVICE).to(dtype)
        if dtype.is_floating_point:
            special = torch.tensor([0.1, float("inf"), -float("inf"), float("nan")], device=DEVICE, dtype=dtype)
        else:
            least, greatest = torch.iinfo(dtype).min, torch.iinfo(dtype).max
            special = torch.tensor([least, least + 1, greatest, greatest - 1], device=DEVICE, dtype=dtype)
        times[:, ::11], times[:, 3::13] = special[0], special[1]
        times[:, 5::17], times[:, 8::19] = special[2], special[3]
        relative[name] = times
    bounds = [-18, -5, -1, 0, 0, 1, 2, 17, 18, 19]
    if not dtype.is_floating_point:
        bounds = [torch.iinfo(dtype).min, *bounds, torch.iinfo(dtype).max]
    relative["time_boundaries"] = torch.tensor(bounds, device=DEVICE, dtype=dtype)
    relative["time_bias"] = torch.randn(H, len(bounds) + 1, device=DEVICE)
    check(q, k, v, jagged() | {"causal": False}, relative)


@pytest.mark.parametrize("count", [0, 1, 300])
def test_few_and_many_boundaries(count):
    torch.manual_seed(4)
    q, k, v = slices(sum(LENGTHS), 32, 32, torch.float32, "packed")
    check(q, k, v, jagged(), bias(num_boundaries=count, dtype=torch.float32))


def test_nothing_beyond_a_sequence_is_read():
    torch.manual_seed(5)
    lengths = [5, 40, 0]
    q, k, v = slices(60, 32, 32, torch.bfloat16, "packed")
    for t in (q, k, v):
        t[45:] = float("nan")
    relative = relative_bias(3, H, 64, torch.float32, device=DEVICE)
    clean = dict(relative)
    for name in ("row_times", "col_times"):
        relative[name] = relative[name].clone()
        for b, length in enumerate(lengths):
            relative[name][b, length:] = float("nan")
    relative["position_bias"] = relative["position_bias"].clone()
    relative["position_bias"][:, : 63 - 40 + 1] = relative["position_bias"][:, 63 + 40 :] = float("nan")
    arguments = {"seq_offsets": offsets_of(lengths), "max_seq_len": 64, "alpha": 0.1, "scaling_seq_len": 64}
    dout = torch.randn(60, H, 32, device=DEVICE, dtype=torch.bfloat16)
    dout[45:] = float("nan")
    results = []
    for given in (relative, clean):
        tables = {name: given.pop(name) for name in TABLES}
        results.append(run(hstu_attention, q, k, v, dout, {**arguments, **given}, tables))
    for name, t in results[0].items():
        assert torch.isfinite(t).all(), name
        assert torch.equal(t, results[1][name]), name


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_no_tokens(lengths):
    q, k, v = slices(0, 32, 32, torch.float32, "packed")
    relative = relative_bias(len(lengths), H, 16, device=DEVICE)
    arguments = {"seq_offsets": offsets_of(lengths), "max_seq_len": 16, "alpha": 1.0, "scaling_seq_len": 16}
    ours = check(q, k, v, arguments, relative)
    assert not ours["d position_bias"].any() and not ours["d time_bias"].any()


def test_tables_of_16_bits_and_same_bits_on_every_run():
    torch.manual_seed(6)
    q, k, v = slices(sum(LENGTHS), 32, 32, torch.bfloat16, "packed")
    relative = bias(shared=True)
    tables = {name: relative.pop(name).bfloat16() for name in TABLES}
    dout = torch.randn(sum(LENGTHS), H, 32, device=DEVICE, dtype=torch.bfloat16)
    first, second = (run(hstu_attention, q, k, v, dout, jagged() | relative, tables) for _ in range(2))
    for name, t in first.items():
        assert t.dtype == torch.bfloat16 and torch.equal(t, second[name])


@pytest.mark.parametrize("needed", TABLES)
def test_gradients_only_of_what_is_asked_for(needed):
    q, k, v = slices(sum(LENGTHS), 16, 16, torch.float32, "packed")
    relative = bias()
    relative[needed].requires_grad_()
    out = hstu_attention(q, k, v, **jagged(), **relative)
    out.sum().backward()
    assert relative[needed].grad.shape == relative[needed].shape and q.grad is None


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_opcheck(dtype):
    relative = relative_bias(3, H, 6, dtype, device=DEVICE, num_boundaries=4)
    for name in TABLES:
        relative[name].requires_grad_()
    arguments = op_arguments([3, 0, 5], torch.float32, "packed", relative)
    torch.library.opcheck(torch.ops.hstu_compile.hstu_attention.default, arguments)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        call = (torch.randn(8, H, 16, device=DEVICE), *detached, *needs)
        torch.library.opcheck(torch.ops.hstu_compile.hstu_attention_backward.default, call)


GOOD = relative_bias(2, H, 6, num_boundaries=4)
BAD = [
    ({"position_bias": torch.ones(H, 10)}, r"shape of position_bias is \(2, 10\), expected \[H\|1, 2N - 1\]"),
    ({"position_bias": torch.ones(3, 11)}, "shape of position_bias"),
    ({"position_bias": torch.ones(H, 11, dtype=torch.int64)}, "dtype of position_bias"),
    ({"time_bias": torch.ones(H, 4)}, r"shape of time_bias is \(2, 4\), expected \[H\|1, K \+ 1\] = \[2\|1, 5\]"),
    ({"time_bias": None}, "time_bias is None, expected a tensor"),
    ({"row_times": None}, "row_times is None, expected a tensor"),
    ({"time_boundaries": None}, "time_boundaries is None, expected a tensor"),
    ({"row_times": torch.ones(2, 5, dtype=torch.int64)}, "shape of row_times"),
    ({"col_times": torch.ones(3, 6, dtype=torch.int64)}, r"shape of col_times is \(3, 6\), expected \[B\|1, N\]"),
    ({"col_times": torch.ones(2, 6)}, "dtype of col_times is torch.float32, expected that of row_times"),
    ({"row_times": torch.ones(2, 6).half()}, "dtype of row_times"),
    ({"time_boundaries": torch.ones(4, 1, dtype=torch.int64)}, "shape of time_boundaries"),
]
BAD_VALUES = [
    ({"time_boundaries": torch.tensor([1, 3, 2, 4])}, "time_boundaries is .1, 3, 2, 4., expected no decrease")
]


@pytest.mark.parametrize("change, message", BAD + (BAD_VALUES if DEVICE == "cpu" else []), ids=lambda x: str(x)[:40])
def test_bad_input_names_the_argument(change, message):
    q, k, v = slices(8, 16, 16, torch.float32, "packed")
    arguments = {"seq_offsets": offsets_of([3, 5]), "max_seq_len": 6, "alpha": 1.0, "scaling_seq_len": 6}
    on_device = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in (GOOD | change).items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        hstu_attention(q, k, v, **arguments, **on_device)
