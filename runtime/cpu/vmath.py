"""Elementary functions on float32 vectors, the same on every instruction-set level."""

from __future__ import annotations

from .simd import as_f32, fma, round_to_i32, shl, splat_f32, splat_i32, to_f32, vabs, vdiv, vmax, vmin, where_less
from .weights import inline

ACTIVATIONS = ("silu", "gelu", "gelu_erf", "relu", "relu2", "drelu")


@inline
def exp(x, n):
    """e**x for n lanes, relative error below 2e-7; clamped to the normal range.

    Cody-Waite reduction by ln 2 in two parts, then a degree-6 Taylor polynomial on |r| <= ln(2) / 2.
    """
    x = vmax(vmin(x, splat_f32(88.0, n)), splat_f32(-87.0, n))
    k = round_to_i32(x * splat_f32(1.4426950408889634, n))
    kf = to_f32(k)
    r = fma(kf, splat_f32(-0.693359375, n), x)
    r = fma(kf, splat_f32(2.12194440e-4, n), r)
    p = splat_f32(1.0 / 720, n)
    p = fma(p, r, splat_f32(1.0 / 120, n))
    p = fma(p, r, splat_f32(1.0 / 24, n))
    p = fma(p, r, splat_f32(1.0 / 6, n))
    p = fma(p, r, splat_f32(0.5, n))
    p = fma(p, r, splat_f32(1.0, n))
    p = fma(p, r, splat_f32(1.0, n))
    return p * as_f32(shl(k + splat_i32(127, n), 23))


@inline
def silu(x, n):
    """x / (1 + e**-x)."""
    one = splat_f32(1.0, n)
    return vdiv(x, one + exp(splat_f32(0.0, n) - x, n))


@inline
def relu(x, n):
    """max(x, 0)."""
    return vmax(x, splat_f32(0.0, n))


@inline
def relu2(x, n):
    """max(x, 0)**2."""
    y = relu(x, n)
    return y * y


@inline
def gelu(x, n):
    """GELU's tanh form, x * sigmoid(2 z) with z = sqrt(2 / pi) (x + 0.044715 x**3) (arXiv:1606.08415, section 2)."""
    cubic = fma(x * x, splat_f32(0.044715, n), splat_f32(1.0, n))
    z2 = x * cubic * splat_f32(1.5957691216057308, n)
    return vdiv(x, splat_f32(1.0, n) + exp(splat_f32(0.0, n) - z2, n))


@inline
def tanh(x, n):
    """Hyperbolic tangent, 1 - 2 / (e**2x + 1); absolute error below 3e-7."""
    one, two = splat_f32(1.0, n), splat_f32(2.0, n)
    return one - vdiv(two, exp(x + x, n) + one)


# ln(erfc(z)) + z**2 - ln(t) as a polynomial of t = 1 / (1 + z / 2), fitted at Chebyshev nodes for z from 0 to 9.
_ERFC = (
    -1.26541507, 0.997978302, 0.39215495, 0.00868708455, 0.0763455192,
    -0.219760443, -0.529553268, 1.03276993, -0.628631684, 0.135424719,
)  # fmt: skip


@inline
def gelu_erf(x, n):
    """GELU as defined, x * Phi(x) (arXiv:1606.08415, section 1); relative error of the tails below 5e-6."""
    zero, one = splat_f32(0.0, n), splat_f32(1.0, n)
    z = vmin(vabs(x) * splat_f32(0.7071067811865476, n), splat_f32(9.0, n))
    t = vdiv(one, fma(z, splat_f32(0.5, n), one))
    p = splat_f32(_ERFC[9], n)
    for i in range(8, -1, -1):
        p = fma(p, t, splat_f32(_ERFC[i], n))
    tail = t * exp(p - z * z, n) * splat_f32(0.5, n)  # Phi(-|x|)
    return x * where_less(x, zero, tail, one - tail)


def gate(name):
    """(x, n) -> act(x) of an activation; drelu rectifies gate and up alike."""
    found = {"silu": silu, "gelu": gelu, "gelu_erf": gelu_erf, "relu": relu, "relu2": relu2, "drelu": relu}
    return found[name]
