"""silu and its derivative in Triton, from half the argument: silu(x) = h + h * tanh(h), h = x / 2."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def tanh_approx(x):
    """One instruction of the special function unit (sm_75 and later), relative error 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp(x):
    """e^x to two units in the last place; tl.exp alone rounds x * log2(e), which costs it as many units as |x| has."""
    x = tl.minimum(tl.maximum(x, -110.0), 110.0)  # 0 and inf in fp32
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4  # x - n ln 2, ln 2 in two parts of which the first loses nothing
    return tl.exp(rest) * tl.exp2(n)


@triton.jit
def silu(half, FAST: tl.constexpr):
    """silu(2 * half); FAST (16-bit data on NVIDIA) takes one approximate tanh, else exp to fp32 accuracy."""
    if FAST:
        return half + half * tanh_approx(half)
    else:
        return tl.div_rn(2.0 * half, 1.0 + exp(-2.0 * half))


@triton.jit
def silu_of_torch(x, LIBDEVICE: tl.constexpr):
    """silu(x) to fp32 accuracy; LIBDEVICE (on NVIDIA) takes the exp that CUDA has, which gives the bits of `F.silu`."""
    if LIBDEVICE:
        return tl.div_rn(x, 1.0 + libdevice.exp(-x))
    else:
        return silu(0.5 * x, False)


@triton.jit
def sigmoid(half):
    """sigmoid(2 * half) to fp32 accuracy."""
    return tl.div_rn(tl.full(half.shape, 1.0, tl.float32), 1.0 + exp(-2.0 * half))


@triton.jit
def silu_and_grad(half, FAST: tl.constexpr):
    """silu(x) and silu'(x) = sigmoid(x) + silu(x) * (1 - sigmoid(x)) at x = 2 * half."""
    if FAST:
        t = tanh_approx(half)
        s = half + half * t
        return s, (0.5 + 0.5 * t) + s * (0.5 - 0.5 * t)
    else:
        t = sigmoid(half)
        s = 2.0 * half * t
        return s, t + s * (1.0 - t)


@triton.jit
def silu_and_grad_packed(half, dtype: tl.constexpr):
    """silu in 16 bits and its derivative in fp16 (as precise as the tanh), in as few registers as there are results."""
    type: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    x, g = tl.inline_asm_elementwise(
        """{
        .reg .f32 t<2>, x<2>, a<2>, b<2>;
        tanh.approx.f32 t0, $2;
        tanh.approx.f32 t1, $3;
        fma.rn.f32 x0, $2, t0, $2;
        fma.rn.f32 x1, $3, t1, $3;
        fma.rn.f32 a0, t0, 0.5, 0.5;
        fma.rn.f32 a1, t1, 0.5, 0.5;
        sub.f32 b0, 1.0, a0;
        sub.f32 b1, 1.0, a1;
        fma.rn.f32 a0, x0, b0, a0;
        fma.rn.f32 a1, x1, b1, a1;
        cvt.rn."""
        + type
        + """.f32 $0, x1, x0;
        cvt.rn.f16x2.f32 $1, a1, a0;
        }""",
        "=r,=r,f,f",
        [half],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
    return x.to(dtype, bitcast=True), g


@triton.jit
def times_packed(g, dy, dtype: tl.constexpr):
    """g * dy in 16 bits: g from `silu_and_grad_packed`, dy in fp32."""
    type: tl.constexpr = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    dx = tl.inline_asm_elementwise(
        """{
        .reg .f16 h<2>;
        .reg .f32 g<2>;
        mov.b32 {h0, h1}, $1;
        cvt.f32.f16 g0, h0;
        cvt.f32.f16 g1, h1;
        mul.f32 g0, g0, $2;
        mul.f32 g1, g1, $3;
        cvt.rn."""
        + type
        + """.f32 $0, g1, g0;
        }""",
        "=r,r,f,f",
        [g, dy],
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )
    return dx.to(dtype, bitcast=True)
