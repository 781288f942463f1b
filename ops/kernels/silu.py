"""silu and its derivative in Triton, from half the argument: silu(x) = h + h * tanh(h), h = x / 2."""

import triton
import triton.language as tl


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
def silu_and_grad(half, FAST: tl.constexpr):
    """silu(x) and silu'(x) = sigmoid(x) + silu(x) * (1 - sigmoid(x)) at x = 2 * half."""
    if FAST:
        t = tanh_approx(half)
        s = half + half * t
        return s, (0.5 + 0.5 * t) + s * (0.5 - 0.5 * t)
    else:
        denominator = 1.0 + exp(-2.0 * half)
        sigmoid = tl.div_rn(tl.full(half.shape, 1.0, tl.float32), denominator)
        s = 2.0 * half * sigmoid
        return s, sigmoid + s * (1.0 - sigmoid)


@triton.jit
def tanh_two(x):
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 pair;
        .reg .b16 low, high;
        cvt.rn.f16x2.f32 pair, $3, $2;
        tanh.approx.f16x2 pair, pair;
        mov.b32 {low, high}, pair;
        cvt.f32.f16 $0, low;
        cvt.f32.f16 $1, high;
        }
        """,
        "=f,=f,f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def silu_packed(half, PACKED: tl.constexpr):
    if PACKED:
        return half + half * tanh_two(half)
    else:
        return half + half * tanh_approx(half)
