"""Rows in int8 with a scale each, on the device: what the quantised kernels end in.

Imported by files that need Triton themselves, and by no other.
"""

import triton
import triton.language as tl

from maect_fast.kernels._common import int8

__all__ = ["larger", "quantized", "row_scale"]

LEVELS = tl.constexpr(int8.LEVELS)
SMALLEST = tl.constexpr(int8.SMALLEST)
# 1.5 * 2^23: the sum with a number below 2^22 is rounded to an integer, half to even, which stands
# in its low bits; a conversion takes a slower pipe.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def larger(largest, x):
    """max(largest, |x|), where NaN stays."""
    return tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_scale(largest):
    """Of magnitudes [M, D] fp32 each row's step [M], NaN where one is."""
    # Bits of magnitudes are in the order of their numbers, NaN above infinity.
    bits = tl.max(largest.to(tl.int32, bitcast=True), axis=1)
    maximum = larger(tl.full(bits.shape, SMALLEST, tl.float32), bits.to(tl.float32, bitcast=True))
    return maximum / LEVELS


@triton.jit
def quantized(x, scale):
    """X [M, D] fp32 in steps of scale [M], int8; half-way it may go to either side."""
    steps = x * (1.0 / scale)[:, None] + ROUNDER
    return steps.to(tl.int32, bitcast=True).to(tl.int8)
