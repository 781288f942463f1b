"""A few small launches of every attention kernel, for NVIDIA's checkers. Once without them, it compiles:

    python -m bench.sanitize
compute-sanitizer --tool memcheck python -m bench.sanitize
compute-sanitizer --tool racecheck python -m bench.sanitize
"""

import os

import torch

from bench.attention_problem import inputs, kernels, run_once

LENGTHS, TARGETS = [200, 0, 1, 130], [70, 0, 1, 3]


def main(device: torch.device, head_dims: tuple[int, ...], dtype: torch.dtype) -> None:
    for head_dim in head_dims:
        targets = torch.tensor(TARGETS, device=device)
        given = inputs(LENGTHS, 2, head_dim, device, dtype, num_targets=targets, max_attn_len=60)
        for name, kernel in kernels().items():
            results = run_once(kernel, given)
            finite = all(result.isfinite().all().item() for result in results)
            print(f"D={head_dim} {name}: {'finite' if finite else 'NOT FINITE'}", flush=True)


if __name__ == "__main__":
    # Every tensor an allocation, so that what is read beyond it is seen. (torch reads this at its first.)
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    main(torch.device("cuda"), (64, 128, 256), torch.bfloat16)
