"""The attention op on whatever device is there: against float64, gradients, opcheck, what it says to bad input."""

import pytest
import torch
import torch.nn.functional as F
from eager_attention import eager_attention
from error_budget import BACKWARD, FORWARD, assert_within_budget

from hstu_compile.ops import hstu_attention
from hstu_compile.ops.hstu_attention import PARAMETERS
from hstu_compile.ops.hstu_attention_reference import hstu_attention_reference, live_cells

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H = 2

# name -> arguments, for sequences of the lengths below
LENGTHS = [0, 1, 7, 64, 65, 130, 0]
MAX_SEQ_LEN = 131
TARGETS = [0, 1, 2, 5, 17, 32, 0]
CONTEXTUALS = [0, 0, 3, 1, 0, 4, 0]
MASKS: dict[str, dict] = {
    "causal": {},
    "full": {"causal": False},
    "targets": {"num_targets": TARGETS},
    "target groups": {"num_targets": TARGETS, "target_group_size": 3},
    "contextual rows": {"num_contextuals": CONTEXTUALS, "num_targets": TARGETS},
    "one contextual count": {"contextual_seq_len": 5},
    "window": {"max_attn_len": 9},
    "window, Meta's targets": {"max_attn_len": 9, "num_targets": TARGETS, "targets_share_position": True},
    "window, NVIDIA's targets": {"max_attn_len": 9, "num_targets": TARGETS, "target_group_size": 2},
    "min full": {
        "max_attn_len": 5,
        "min_full_attn_seq_len": 20,
        "num_targets": TARGETS,
        "targets_share_position": True,
    },
    "full, window": {"causal": False, "max_attn_len": 12, "num_targets": TARGETS, "contextual_seq_len": 0},
    "everything": {
        "num_targets": TARGETS,
        "target_group_size": 4,
        "num_contextuals": CONTEXTUALS,
        "max_attn_len": 16,
        "min_full_attn_seq_len": 11,
        "targets_share_position": True,
    },
}


def tensors(arguments: dict) -> dict:
    return {
        n: torch.tensor(x, device=DEVICE, dtype=torch.int64) if isinstance(x, list) else x for n, x in arguments.items()
    }


def offsets_of(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return F.pad(torch.tensor(lengths, device=DEVICE).cumsum(0), (1, 0)).to(dtype)


def slices(total: int, attn_dim: int, hidden_dim: int, dtype: torch.dtype, layout: str) -> list[torch.Tensor]:
    """q, k, v as [T, H, D] views of one packed buffer [T, H * (2 attn_dim + 2 hidden_dim)], as models have them."""
    widths = [hidden_dim, hidden_dim, attn_dim, attn_dim]  # u, v, q, k
    packed = torch.randn(total, H * sum(widths), device=DEVICE, dtype=torch.float32).to(dtype)
    if layout == "packed":
        _, v, q, k = packed.split([H * w for w in widths], dim=1)
        return [q.view(total, H, attn_dim), k.view(total, H, attn_dim), v.view(total, H, hidden_dim)]
    if layout == "interleaved":  # heads outermost in the row
        _, v, q, k = packed.view(total, H, sum(widths)).split(widths, dim=2)
        return [q, k, v]
    _, v, q, k = packed.view(total, H, sum(widths)).split(widths, dim=2)
    return [t.contiguous() for t in (q, k, v)]


def run(function, q, k, v, dout, arguments, bias):
    """Output and gradients of one implementation: (out, dq, dk, dv[, dbias])."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)] + (
        [bias.detach().requires_grad_()] if bias is not None else []
    )
    out = function(*leaves[:3], **arguments, **({"attn_bias": leaves[3]} if bias is not None else {}))
    return out, *torch.autograd.grad(out, leaves, dout)


def check(q, k, v, arguments: dict, bias: torch.Tensor | None = None) -> None:
    dout = torch.randn(*q.shape[:-1], v.shape[-1], device=DEVICE).to(q.dtype)
    double = {n: t.double() if n == "attn_mask" else t for n, t in arguments.items()}
    reference = run(
        hstu_attention_reference,
        *(t.double() for t in (q, k, v, dout)),
        double,
        bias.double() if bias is not None else None,
    )
    eager = run(eager_attention, q, k, v, dout, arguments, bias)
    ours = run(hstu_attention, q, k, v, dout, arguments, bias)
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "dbias"), ours, eager, reference, strict=False):
        assert_within_budget(a, b, c, FORWARD if name == "out" else BACKWARD, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_jagged_masks(mask, dtype):
    torch.manual_seed(0)
    offsets = offsets_of(LENGTHS, torch.int32 if mask == "causal" else torch.int64)
    q, k, v = slices(sum(LENGTHS), 32, 32, dtype, "packed")
    check(
        q,
        k,
        v,
        {"seq_offsets": offsets, "max_seq_len": MAX_SEQ_LEN, "alpha": 0.3, "scaling_seq_len": 131}
        | tensors(MASKS[mask]),
    )


@pytest.mark.parametrize(
    "attn_dim, hidden_dim", [(16, 16), (64, 64), (32, 64), (96, 96), (128, 128), (192, 192), (256, 256), (128, 64)]
)
@pytest.mark.parametrize("layout", ["packed", "interleaved", "contiguous"])
def test_jagged_head_dims_and_strides(attn_dim, hidden_dim, layout):
    torch.manual_seed(1)
    q, k, v = slices(sum(LENGTHS), attn_dim, hidden_dim, torch.bfloat16, layout)
    arguments = {
        "seq_offsets": offsets_of(LENGTHS),
        "max_seq_len": MAX_SEQ_LEN,
        "alpha": attn_dim**-0.5,
        "scaling_seq_len": 64.5,
    }
    check(q, k, v, arguments | tensors(MASKS["targets"]))


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("lengths", [None, [0, 1, 64, 100]])
def test_dense(heads_first, lengths):
    torch.manual_seed(2)
    shape = (4, H, 100, 64) if heads_first else (4, 100, H, 64)
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    if heads_first:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    arguments = {"seq_lengths": None if lengths is None else torch.tensor(lengths, device=DEVICE)}
    check(q, k, v, arguments | {"max_seq_len": 100, "alpha": 0.125, "scaling_seq_len": 100})


@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, H), (4, H)], ids=str)
@pytest.mark.parametrize("jagged", [True, False])
def test_bias_and_mask_tensor(shape, jagged):
    torch.manual_seed(3)
    N = 70
    bias = torch.randn(*shape, N, N, device=DEVICE)
    mask = (torch.rand(*shape, N, N, device=DEVICE) < 0.5).tril().float()
    mask[..., :64, :] = 0  # whole tiles are dead
    if jagged:
        lengths = [70, 0, 33, 64]
        q, k, v = slices(sum(lengths), 64, 64, torch.bfloat16, "packed")
        arguments = {"seq_offsets": offsets_of(lengths)}
    else:
        q, k, v = (torch.randn(4, N, H, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        arguments = {"causal": False}
    check(q, k, v, arguments | {"attn_mask": mask, "max_seq_len": N, "alpha": 0.2, "scaling_seq_len": N}, bias)


def test_rows_outside_every_sequence_are_never_read_and_come_out_zero():
    torch.manual_seed(4)
    lengths, total = [5, 40, 0], 60
    q, k, v = slices(total, 64, 64, torch.bfloat16, "packed")
    for t in (q, k, v):
        t[45:] = float("nan")
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    dout = torch.randn(total, H, 64, device=DEVICE, dtype=torch.bfloat16)
    dout[45:] = float("nan")
    out = hstu_attention(*leaves, seq_offsets=offsets_of(lengths), max_seq_len=64, alpha=0.1, scaling_seq_len=64)
    for t in (out, *torch.autograd.grad(out, leaves, dout)):
        assert torch.isfinite(t).all()
        assert (t[45:] == 0).all()


def test_a_nan_in_one_sequence_stays_there():
    torch.manual_seed(5)
    q, k, v = slices(80, 64, 64, torch.bfloat16, "packed")
    for t in (q, k, v):
        t[30:60] = float("nan")  # the second of three sequences
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = hstu_attention(*leaves, seq_offsets=offsets_of([30, 30, 20]), max_seq_len=64, alpha=0.1, scaling_seq_len=64)
    for t in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
        assert torch.isfinite(t[:30]).all() and torch.isfinite(t[60:]).all()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
def test_nothing_or_one_token(lengths):
    q, k, v = slices(sum(lengths), 32, 32, torch.float32, "packed")
    check(q, k, v, {"seq_offsets": offsets_of(lengths), "max_seq_len": 16, "alpha": 1.0, "scaling_seq_len": 16})


def test_same_bits_on_every_run():
    torch.manual_seed(6)
    q, k, v = slices(sum(LENGTHS), 64, 64, torch.bfloat16, "packed")
    dout = torch.randn(sum(LENGTHS), H, 64, device=DEVICE, dtype=torch.bfloat16)
    arguments = {"seq_offsets": offsets_of(LENGTHS), "max_seq_len": MAX_SEQ_LEN, "alpha": 0.1, "scaling_seq_len": 131}
    first, second = (run(hstu_attention, q, k, v, dout, arguments, None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_contextual_rows_see_the_whole_history():
    live = live_cells(torch.tensor([6]), 6, contextual_seq_len=2, num_targets=torch.tensor([1]))[0].int().tolist()
    assert live == [
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1],
    ]


def op_arguments(lengths, dtype, layout, mask, requires_grad=True):
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in slices(sum(lengths), 16, 16, dtype, layout))
    N = max(lengths, default=0) + 1
    named = dict.fromkeys(PARAMETERS) | {
        "seq_offsets": offsets_of(lengths),
        "max_seq_len": N,
        "alpha": 0.25,
        "scaling_seq_len": N,
    }
    named |= {
        "causal": True,
        "contextual_seq_len": 0,
        "target_group_size": 1,
        "max_attn_len": 0,
        "min_full_attn_seq_len": 0,
    }
    named |= {"targets_share_position": False} | mask
    return q, k, v, *(named[p] for p in PARAMETERS)


# opcheck itself cannot clone an empty view with gaps, hence no empty interleaved case.
@pytest.mark.parametrize(
    "lengths, layout", [([3, 0, 5], "packed"), ([3, 0, 5], "interleaved"), ([0, 0], "packed")], ids=str
)
@pytest.mark.parametrize("mask", ["causal", "targets and window", "bias"])
def test_opcheck(layout, lengths, mask):
    extra: dict = {}
    if mask == "targets and window":
        extra = {"num_targets": torch.tensor([min(1, n) for n in lengths], device=DEVICE), "max_attn_len": 2}
    elif mask == "bias":
        N = max(lengths) + 1
        extra = {"attn_bias": torch.randn(1, 1, N, N, device=DEVICE, requires_grad=True)}
    torch.library.opcheck(
        torch.ops.hstu_compile.hstu_attention.default, op_arguments(lengths, torch.float32, layout, extra)
    )


def test_opcheck_backward():
    q, k, v, *rest = op_arguments([3, 0, 5], torch.float32, "packed", {}, requires_grad=False)
    op = torch.ops.hstu_compile.hstu_attention_backward.default
    torch.library.opcheck(op, (torch.randn(8, H, 16, device=DEVICE), q, k, v, *rest, False))


GOOD = {"seq_offsets": [0, 3, 8], "max_seq_len": 6, "alpha": 1.0, "scaling_seq_len": 6}
BAD_VALUES = [
    ({"seq_offsets": [1, 3, 8]}, r"seq_offsets\[0\] is 1"),
    ({"seq_offsets": [0, 5, 3]}, r"seq_offsets\[2\].*decrease"),
    ({"seq_offsets": [0, 3, 9]}, r"seq_offsets\[-1\] is 9, expected at most T = 8"),
    ({"max_seq_len": 4}, "max_seq_len is 4, expected at least the longest sequence, 5"),
    ({"num_targets": [1, 6]}, "num_targets"),
    ({"num_targets": [-1, 0]}, "num_targets"),
]
BAD_ARGUMENTS = [
    ({"num_targets": [1]}, r"shape of num_targets is \(1,\)"),
    ({"seq_lengths": [3, 5]}, "seq_lengths"),
    ({"scaling_seq_len": 0}, "scaling_seq_len is 0"),
    ({"max_attn_len": -1}, "max_attn_len is -1"),
    ({"target_group_size": 0}, "target_group_size is 0"),
    ({"attn_mask": torch.ones(6, 6)}, "shape of attn_mask"),
    ({"attn_bias": torch.ones(1, 1, 5, 5)}, "shape of attn_bias"),
    ({"attn_bias": torch.ones(1, 1, 6, 6, dtype=torch.int64)}, "dtype of attn_bias"),
    ({"seq_offsets": torch.empty(0, dtype=torch.int64)}, r"shape of seq_offsets is \(0,\), expected \[B \+ 1\]"),
    ({"seq_offsets": None}, r"shape of q is \(8, 2, 16\), expected \[B, N, H, D\]"),
]


@pytest.mark.parametrize(
    "change, message", BAD_ARGUMENTS + (BAD_VALUES if DEVICE == "cpu" else []), ids=lambda x: str(x)[:40]
)
def test_bad_input_names_the_argument(change, message):
    q, k, v = slices(8, 16, 16, torch.float32, "packed")
    change = {n: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for n, x in change.items()}
    hstu_attention(q, k, v, **tensors(GOOD))  # what is remembered of it lets nothing pass
    with pytest.raises((ValueError, RuntimeError), match=message):
        hstu_attention(q, k, v, **tensors(GOOD | change))


def test_mixed_dtypes_ranks_and_shapes():
    q, k, v = slices(8, 16, 16, torch.float32, "packed")
    hstu_attention(q, k, v, **tensors(GOOD))
    for bad, message in (
        ((q, k.half(), v), "dtype of k is torch.float16, expected that of q"),
        ((q, k, v[:7]), "shape of v"),
        ((q, k[..., :8], v), "shape of k"),
        ((q.long(), k, v), "dtype of q is torch.int64"),
        ((q[:, 0], k, v), "shape of q"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            hstu_attention(*bad, **tensors(GOOD))
