"""Functions of the fused kernel per element: accurate expm1 and log1p, and the terms of each divergence (formulas: ``slopes``).

They avoid libdevice, which Triton's interpreter lacks.
"""

import triton
import triton.language as tl

FORWARD, REVERSE, SYMMETRIC, ADAPTIVE, JSD, SKEW_FORWARD, SKEW_REVERSE, VARIATION = range(8)
_REVERSE = tl.constexpr(REVERSE)
_JSD = tl.constexpr(JSD)
_SKEW_FORWARD = tl.constexpr(SKEW_FORWARD)
_SKEW_REVERSE = tl.constexpr(SKEW_REVERSE)
_VARIATION = tl.constexpr(VARIATION)
# The bound of ``mixtures``; a kernel reads only those globals that are constexpr.
MAX_LOG_RATIO = tl.constexpr(80.0)


@triton.jit
def expm1(x):
    """exp(x) - 1 in fp32: the series to x^9 where |x| < 1/2 (next term below 3e-10 of the result), else exp(x) - 1 itself."""
    # Horner's scheme, from the last term of x (1 + x/2 (1 + x/3 (...))) inwards
    y = 1.0 + x * (1.0 / 9.0)
    y = 1.0 + x * (1.0 / 8.0) * y
    y = 1.0 + x * (1.0 / 7.0) * y
    y = 1.0 + x * (1.0 / 6.0) * y
    y = 1.0 + x * (1.0 / 5.0) * y
    y = 1.0 + x * (1.0 / 4.0) * y
    y = 1.0 + x * (1.0 / 3.0) * y
    y = 1.0 + x * (1.0 / 2.0) * y
    return tl.where(tl.abs(x) < 0.5, x * y, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) in fp32: log(w) corrected for the rounding of w = 1 + x (Goldberg 1991, theorem 4)."""
    w = 1.0 + x
    # what is left of x after rounding 1 + x; 0 where x was rounded away, and log(1 + x) is x itself
    lost = w - 1.0
    exact = lost == 0.0
    return tl.where(exact, x, tl.log(tl.where(exact, 1.0, w)) * tl.math.div_rn(x, tl.where(exact, 1.0, lost)))


@triton.jit
def slope_g(p, q, d, dial, KIND: tl.constexpr):
    """g of ``slopes``: T times the gradient is q (g - sum q g). Forward KL and the mixtures of both KLs do not use it."""
    # E of ``slopes`` is expm1(d)
    if KIND == _REVERSE:
        g = -d
    elif KIND == _JSD:
        g = -log1p(dial * expm1(d)) / dial
    elif KIND == _SKEW_FORWARD:
        e = expm1(d)
        g = -(1.0 - dial) * (1.0 - dial) * tl.math.div_rn(e, 1.0 + dial * e)
    elif KIND == _SKEW_REVERSE:
        u = log1p((1.0 - dial) * expm1(d))
        g = -u - dial * expm1(-u)
    else:
        g = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0))
    return g


@triton.jit
def value(p, q, d, g, dial, KIND: tl.constexpr):
    """Terms whose sum is the divergence; for the mixtures of both KLs the sum is forward KL."""
    if KIND == _REVERSE:
        v = -q * d
    elif KIND == _JSD:
        v = q * g - p * log1p((1.0 - dial) * expm1(-d)) / (1.0 - dial)
    elif KIND == _SKEW_FORWARD:
        v = -p * log1p((1.0 - dial) * expm1(-d))
    elif KIND == _SKEW_REVERSE:
        v = -q * log1p((1.0 - dial) * expm1(d))
    elif KIND == _VARIATION:
        v = tl.abs(p - q) * 0.5
    else:
        v = p * d
    return v
