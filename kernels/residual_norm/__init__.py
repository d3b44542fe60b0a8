"""The residual sum of a transformer block, with the layer norm that reads it."""

from maect_fast.kernels.residual_norm.api import residual_norm, residual_norm_int8

__all__ = ["residual_norm", "residual_norm_int8"]
