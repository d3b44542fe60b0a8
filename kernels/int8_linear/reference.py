"""Definition of a linear layer on int8 operands in plain PyTorch.

Legend: M rows (tokens), any number of leading dimensions; K features in, N features out.
"""

import torch
from torch import Tensor

__all__ = ["int8_linear"]


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``(x W^T) x_scale weight_scale + bias`` [..., N]: exact sums, scaled in at least fp32."""
    rows = x.reshape(-1, x.shape[-1])
    if x.is_cuda:
        # Shapes that CUDA's int8 product refuses; no sum of int8 products is beyond 2^53.
        acc = rows.double() @ weight.double().t()
    else:
        acc = torch._int_mm(rows.contiguous(), weight.t())
    wide = torch.promote_types(dtype, torch.float32)
    y = acc.to(wide) * x_scale.reshape(-1, 1) * weight_scale
    if bias is not None:
        y = y + bias
    return y.to(dtype).view(*x.shape[:-1], len(weight))
