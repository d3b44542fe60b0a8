"""Rows in int8 with a scale each: what the quantised ops write and `int8_linear` multiplies."""

import torch
from torch import Tensor

__all__ = ["LEVELS", "SMALLEST", "quantize_rows"]

# Steps on either side of zero; -128 is not used.
LEVELS = 127
# Stands for the largest magnitude of a row without one: 127 over it is no infinity.
SMALLEST = 1e-30


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with a scale per row, ``x ~ q * scale``, ``scale = max |x| / 127``.

    A number is off by half a step at most. A row with infinity or NaN gets a scale that is none.

    Args:
        x: [..., K] floats, K at least 1.

    Returns:
        q [..., K] int8 in -127 .. 127; scale [...] fp32; contiguous.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (x.abs().amax(-1).clamp(min=SMALLEST) / LEVELS).float()
    return (x / scale[..., None]).round().to(torch.int8).contiguous(), scale.contiguous()
