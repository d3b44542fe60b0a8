"""GELU with the bias before it."""

from maect_fast.kernels.gelu.api import gelu

__all__ = ["gelu"]
