"""Attention with a bias and a mask tensor, as Meta's research layer has them: the Hopper kernels and the portable ones.

python -m bench.attention_pairs      # ms a kernel, median of one launch at a time
"""

import functools
from typing import Any

import torch
from triton.testing import do_bench

from hstu_compile.ops.kernels import attention_sm90, attention_triton

B, N, H = 32, 2048, 4


def problem(dim: int, *, bias: bool, mask: bool) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """q, k, v, dout and the keywords of the kernel modules."""
    tensors = [torch.randn(B * N, H, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    call: dict[str, Any] = dict.fromkeys(("seq_lengths", "num_targets", "num_contextuals", "attn_bias", "attn_mask"))
    call |= {
        "seq_offsets": torch.arange(B + 1, device="cuda") * N,
        "max_seq_len": N,
        "alpha": dim**-0.5,
        "scale": 1 / N,
    }
    call |= {"causal": True, "contextual_seq_len": 0, "target_group_size": 1, "max_attn_len": 0}
    call |= {"min_full_attn_seq_len": 0, "targets_share_position": False}
    if bias:
        call["attn_bias"] = torch.randn(B, 1, N, N, device="cuda", dtype=torch.bfloat16)
    if mask:
        call["attn_mask"] = torch.ones(1, 1, N, N, device="cuda").tril()
    return tensors, call


def hopper(tensors: list[torch.Tensor], call: dict[str, Any]) -> dict[str, Any]:
    """Without what finds the occupied tiles. Where one kernel makes the whole backward, the forward alone."""
    q, k, v, dout = tensors
    out, dq, dk, dv = (torch.empty_like(x) for x in (v, q, k, v))
    sms = attention_sm90.processors(q.device)
    launches = {"forward": attention_sm90.forward_launches(q, k, v, out, sms, **call)[0]}
    backward = attention_sm90.backward_launches(dout, q, k, v, dq, dk, dv, sms, **call)
    if len(backward) == 2:
        launches |= {"dk, dv": backward[0], "dq": backward[1]}

    def again(launch: attention_sm90.Launch) -> None:
        launch.arguments[-5].zero_()  # the counter of tickets
        launch()

    return {name: functools.partial(again, launch) for name, launch in launches.items()}


def portable(tensors: list[torch.Tensor], call: dict[str, Any]) -> dict[str, Any]:
    q, k, v, dout = tensors
    made = attention_triton.Call(q, k, v, **call)
    out, dq, dk, dv = (torch.empty_like(x) for x in (v, q, k, v))
    factor = call["alpha"] * call["scale"]
    runs = {"forward": lambda: made.product(made.tiles.forward, out, call["scale"], x=q, y=k, z=v)}
    runs["dq"] = lambda: made.product(made.tiles.dq, dq, factor, x=q, y=k, dx=dout, dy=v)
    if made.tiles.dk_dv is not None:
        runs["dk, dv"] = lambda: made.dk_dv(made.tiles.dk_dv, dout, dk, dv)
    return runs


if __name__ == "__main__":
    print(torch.cuda.get_device_name())
    for dim in (64, 128, 256):
        for bias, mask in ((False, False), (True, False), (False, True), (True, True)):
            tensors, call = problem(dim, bias=bias, mask=mask)
            for name, runs in (("sm90", hopper(tensors, call)), ("portable", portable(tensors, call))):
                times = {what: round(do_bench(run, return_mode="median"), 3) for what, run in runs.items()}
                print(f"D={dim} bias {bias} mask {mask} {name}: {times}", flush=True)
