"""Public function: a linear layer on int8 operands."""

import torch
from torch import Tensor

from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import FLOATING, check_rows, check_tensor, expect
from maect_fast.kernels.int8_linear import op

__all__ = ["int8_linear"]

# So many products of 127 by 127 stay below 2^31.
MOST_FEATURES = 131_072


def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend = "auto",
) -> Tensor:
    """``y = (x W^T) x_scale weight_scale + bias``: a product in int8 with scales of its rows.

    Sums are exact, in int32; scales and bias are applied in fp32 and y is rounded once.
    `quantize_rows` makes an operand with its scales, of a weight one per output.

    Args:
        x: [..., K] int8, viewable as rows of one stride; last stride 1. K up to 131,072.
        x_scale: [...] fp32 contiguous, of the rows.
        weight: [N, K] int8 contiguous.
        weight_scale: [N] fp32 contiguous.
        bias: [N] floats.
        dtype: of y, a float.
        backend: "auto" is "triton" on CUDA but for fp64, else "reference".

    Returns:
        [..., N] contiguous, in `dtype`. Nothing gets a gradient.

    Raises:
        ValueError, TypeError: a shape, layout, device or dtype that does not fit.
        RuntimeError: a backend that is not there, or not for these inputs.

    Source: arXiv 2208.07339, section 2.1 (row- and column-wise scales).
    """
    check_backend("int8_linear", backend, triton=lambda: op.triton_obstacle(x_scale, bias, dtype))
    expect(x.ndim > 0, "x", "at least one dimension", x.ndim)
    K = x.shape[-1]
    check_tensor("x", x, x, (torch.int8,), (None,) * x.ndim)
    expect(0 < K <= MOST_FEATURES, "x", f"1 to {MOST_FEATURES} features", K)
    expect(x.stride(-1) == 1 or K == 1, "x", "a last stride of 1", x.stride())
    check_rows("x", x)
    check_tensor("weight", weight, x, (torch.int8,), (None, K))
    check_tensor("x_scale", x_scale, x, (torch.float32,), x.shape[:-1])
    check_tensor("weight_scale", weight_scale, x, (torch.float32,), weight.shape[:1])
    check_tensor("bias", bias, x, FLOATING, weight.shape[:1])
    for name, tensor in (("weight", weight), ("x_scale", x_scale)):
        expect(tensor.is_contiguous(), name, "a contiguous tensor", tensor.stride())
    expect(dtype in FLOATING, "dtype", "a float", dtype, TypeError)
    return op.int8_linear(x, x_scale, weight, weight_scale, bias, dtype, backend)
