"""GELU with the bias before it."""

from maect_fast.kernels.gelu.api import gelu, gelu_int8

__all__ = ["gelu", "gelu_int8"]
