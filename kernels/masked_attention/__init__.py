"""Short-sequence attention for (masked) ViTs: `masked_attention` and `attention`."""

from maect_fast.kernels.masked_attention.api import attention, masked_attention

__all__ = ["attention", "masked_attention"]
