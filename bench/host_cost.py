"""The host's time for one call of an op, as one of many, on sizes that keep no GPU busy: python -m bench.host_cost

Microseconds, the least mean of a round (what other processes add is not the op's), by the op itself: no autograd, no
compiled graph around it.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator

import torch

from bench.attention_problem import inputs
from bench.show import table
from hstu_compile.ops import kernel_table

CALLS, ROUNDS = 50, 40  # in a round of calls the GPU falls behind, but does not fill its queue
LENGTHS, HEADS, TABLE = [128, 28], 2, 129
CELLS = ["", "bias", "mask tensor", "bias, mask tensor"]
ops = torch.ops.hstu_compile

Call = Callable[[], object]


def microseconds(call: Call) -> float:
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - began) / CALLS)
    torch.cuda.synchronize()
    return 1e6 * min(rounds[ROUNDS // 4 :])


def attention(cells: str, head_dim: int) -> tuple[Call, Call]:
    """Forward, and backward with the gradient of the bias if there is one."""
    device, longest = torch.device("cuda"), max(LENGTHS)
    q, k, v, dout, call = inputs(LENGTHS, HEADS, head_dim, device, torch.bfloat16)
    bias = torch.randn(len(LENGTHS), 1, longest, longest, device=device).bfloat16() if "bias" in cells else None
    mask = torch.ones(1, 1, longest, longest, device=device).tril() if "mask" in cells else None
    states = None if mask is None else ops.mask_tile_states(mask)
    sizes = (longest, call["alpha"], float(longest), mask is None, 0, 1, 0, 0, False)
    arguments = (q, k, v, call["seq_offsets"], None, None, None, mask, bias, states, *sizes)
    backward = ops.hstu_attention_backward
    return (
        lambda: ops.hstu_attention_forward(*arguments),
        lambda: backward(dout, *arguments, bias is not None),
    )


def others() -> Iterator[tuple[str, Call]]:
    mask = torch.ones(1, 1, 256, 256, device="cuda").tril()
    grad, index = torch.randn(4096, 4, device="cuda"), torch.randint(0, TABLE, (4096,), device="cuda").short()
    yield "mask_tile_states", lambda: ops.mask_tile_states(mask)
    yield "table_grad", lambda: ops.table_grad(grad, index, TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dim", type=int, default=64)
    head_dim = parser.parse_args().head_dim
    body = []
    with torch.no_grad():
        for name, cells in itertools.product((kernel_table.ATTENTION[9], kernel_table.PORTABLE), CELLS):
            with kernel_table.force(name):
                forward, backward = attention(cells, head_dim)
                body.append([name, cells or "-", f"{microseconds(forward):.1f}", f"{microseconds(backward):.1f}"])
        for name, call in others():
            body.append([name, "-", f"{microseconds(call):.1f}", "-"])
    print(torch.cuda.get_device_name(), torch.__version__)
    print(table(["op", "with", "forward, us", "backward, us"], body))


if __name__ == "__main__":
    main()
