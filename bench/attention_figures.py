"""What the attention kernels are measured against: TFLOP/s (forward, backward) by head dim and sequence length.

One H200, bf16, causal, full length, B = 32, H * D = 1024, q, k and v as slices of the packed buffer, one launch at a
time by CUDA-graph replay; how the public figures were measured is in docs/kernels.md.
"""

SEQ_LENS = (1024, 2048, 4096, 8192)
Figures = dict[int, dict[int, tuple[int, int]]]


def _figures(**by_head_dim: tuple[tuple[int, int], ...]) -> Figures:
    return {
        int(name.removeprefix("D")): dict(zip(SEQ_LENS, values, strict=True)) for name, values in by_head_dim.items()
    }


TARGETS = _figures(
    D64=((290, 300), (410, 370), (460, 420), (500, 440)),
    D128=((420, 350), (530, 440), (560, 490), (580, 515)),
    D256=((480, 310), (610, 380), (670, 420), (670, 440)),
)
CUTLASS = _figures(
    D64=((253, 271), (365, 338), (412, 383), (455, 402)),
    D128=((373, 320), (483, 401), (502, 442), (525, 469)),
    D256=((422, 280), (538, 325), (620, 359), (574, 376)),
)
TRITON = _figures(D256=((298, 124), (423, 135), (506, 140), (505, 143)))

REFERENCE_LINES: dict[str, Figures] = {"target": TARGETS, "public CUTLASS": CUTLASS, "public Triton": TRITON}
