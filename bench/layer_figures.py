"""What a layer's training step is measured against: by name, values by sequence length.

One H200, bf16, B = 32, E = 1024, H = 4, D = 256, causal, full length, dropout 0.2, one layer. `public native` is an
unfused PyTorch layer with public Triton attention, `public CUTLASS fused` the best public fused layer; the floor is
FLOPs at 790 TFLOP/s.
"""

SHAPE = {"num_layers": 1, "batch": 32, "num_heads": 4, "head_dim": 256, "dtype": "bfloat16", "dropout": 0.2}
SEQ_LENS = (1024, 2048, 4096, 8192)
Figures = dict[str, dict[int, float]]

NATIVE, FUSED, TARGET = "public native", "public CUTLASS fused", "target"
BOTH = "norm and silu recomputed"


def _at_every_length(*values: float) -> dict[int, float]:
    return dict(zip(SEQ_LENS, values, strict=True))


STEP_MS: Figures = {
    NATIVE: _at_every_length(5.25, 12.99, 36.07, 114.8),
    FUSED: _at_every_length(3.13, 7.56, 19.18, 55.56),
    f"{FUSED}, {BOTH}": _at_every_length(3.68, 7.91, 19.74, 57.75),
    TARGET: _at_every_length(2.5, 6.0, 15.8, 46.5),
    f"{TARGET}, {BOTH}": _at_every_length(2.6, 6.2, 16.2, 47.5),
    "floor": _at_every_length(1.6, 3.8, 10.1, 29.9),
}
HELD_MIB: Figures = {  # after the forward
    NATIVE: {4096: 4482},
    FUSED: {4096: 3074},
    f"{FUSED}, {BOTH}": {4096: 1794},
    f"{TARGET}, {BOTH}": {4096: 1794},
    f"{TARGET}, uvqk recomputed": {4096: 800},
}
PEAK_MIB: Figures = {  # over the inputs of the step
    NATIVE: {4096: 5636},
    FUSED: {4096: 5388},
    f"{FUSED}, {BOTH}": {4096: 5388},
    TARGET: {4096: 3600},
}
