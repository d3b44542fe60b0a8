"""A linear layer on int8 operands with scales of their rows."""

from maect_fast.kernels._common.int8 import quantize_rows
from maect_fast.kernels.int8_linear.api import int8_linear

__all__ = ["int8_linear", "quantize_rows"]
