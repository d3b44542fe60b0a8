"""Definition of GELU with its bias in plain PyTorch, any float dtype up to fp64.

Legend: M tokens, any number of leading dimensions; D features.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from maect_fast.kernels._common.int8 import quantize_rows

__all__ = ["gelu", "gelu_backward", "gelu_int8"]


def gelu(h: Tensor, bias: Tensor | None) -> Tensor:
    """GELU, x Phi(x), of x = h + bias, [..., D] in the dtype of h; the sum is not rounded to it."""
    if bias is None:
        return F.gelu(h)
    x = _sum(h, bias)
    torch.ops.aten.gelu_(x)
    return x.to(h.dtype)


def gelu_int8(h: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """GELU [..., D] in int8, and its rows' scales [...] fp32; g is rounded to nothing else."""
    return quantize_rows(gelu(h.to(_wide(h)), bias))


def gelu_backward(
    h: Tensor, bias: Tensor | None, dg: Tensor, need_g: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of h in its dtype; g again if needed; the bias's gradient [D], in at least fp32.

    What is not there is empty.
    """
    g = gelu(h, bias) if need_g else h.new_empty((0,))
    if bias is None:
        dh = torch.ops.aten.gelu_backward(dg.to(h.dtype), h)
        return dh, g, h.new_empty((0,), dtype=_wide(h))
    # In the place of the sum: on a CPU fresh memory costs as much as a pass.
    x = _sum(h, bias)
    dx = torch.ops.aten.gelu_backward.grad_input(dg.to(x.dtype), x, grad_input=x)
    return dx.to(h.dtype), g, dx.reshape(-1, dx.shape[-1]).sum(0)


def _sum(h: Tensor, bias: Tensor) -> Tensor:
    """A new tensor."""
    return h + bias.to(_wide(h))


def _wide(h: Tensor) -> torch.dtype:
    return torch.promote_types(h.dtype, torch.float32)
