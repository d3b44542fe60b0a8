"""The NNCLR InfoNCE loss without a logits matrix, forward and backward."""

from maect_fast.kernels.info_nce.api import info_nce

__all__ = ["info_nce"]
