"""Public function: the residual sum with the layer norm that reads it."""

import torch
from torch import Tensor

from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import (
    FLOATING,
    check_number,
    check_rows,
    check_tensor,
    check_tensors,
    expect,
)
from maect_fast.kernels.residual_norm import op

__all__ = ["residual_norm", "residual_norm_int8"]


def residual_norm(
    r: Tensor,
    branch: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """``r_out = r + branch + branch_bias`` and ``y = LayerNorm(r_out) * weight + bias``.

    One pass over r and branch. The norm reads r_out as it is rounded to its dtype.

    Args:
        r: [..., D] floats, the residual stream, viewable as rows of one stride; last stride 1.
        branch: as `r`, of any float dtype: what a block adds, without its linear layer's bias.
        branch_bias: [D] floats, that bias; needs a branch.
        weight: [D] floats, the norm's.
        bias: [D] floats, the norm's.
        eps: added to the variance.
        dtype: of y, a float; None: that of `branch`, without one that of `r`.
        backend: "auto" is "triton" on CUDA but for fp64 and D > 3072, else "reference".

    Returns:
        r_out [..., D] in the dtype of `r`, which is `r` itself without a branch; y [..., D] in
        `dtype`. All five tensors get gradients: sums over rows are formed in fp32, that of `branch`
        is that of `r`, rounded to its dtype. No second derivative, no forward mode.

    Raises:
        ValueError, TypeError: a shape, layout, device or dtype that does not fit.
        RuntimeError: a backend that is not there, or not for these inputs.

    Source: arXiv 1607.06450; timm: models/vision_transformer.py, Block.
    """
    check_tensors(r=r, weight=weight, bias=bias)
    check_number("eps", eps, 0.0)
    if dtype is None:
        dtype = r.dtype if branch is None else branch.dtype
    inputs = (r, branch, branch_bias, weight, bias)
    check_backend("residual_norm", backend, triton=lambda: op.triton_obstacle(*inputs, dtype=dtype))
    _check(*inputs)
    expect(dtype in FLOATING, "dtype", "a float", dtype, TypeError)
    r_out, y = op.residual_norm(*inputs, eps, dtype, backend)
    return r if branch is None else r_out, y


def residual_norm_int8(
    r: Tensor,
    branch: Tensor | None = None,
    branch_bias: Tensor | None = None,
    *,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`residual_norm` whose y is int8 with a scale per row, an operand of `int8_linear`.

    y is quantised as `quantize_rows` does it, from fp32; half-way between two steps a kernel may
    take the other one. Args are those of `residual_norm`.

    Returns:
        r_out [..., D] in the dtype of `r`, which is `r` itself without a branch; y [..., D] int8;
        its scales [...] fp32. Nothing gets a gradient.

    Raises:
        ValueError, TypeError, RuntimeError: as `residual_norm`.
    """
    inputs = (r, branch, branch_bias, weight, bias)
    check_backend("residual_norm_int8", backend, triton=lambda: op.triton_obstacle(*inputs))
    _check(*inputs)
    r_out, y, scale = op.residual_norm_int8(*inputs, eps, backend)
    return r if branch is None else r_out, y, scale


def _check(
    r: Tensor, branch: Tensor | None, branch_bias: Tensor | None, weight: Tensor, bias: Tensor
) -> None:
    expect(r.ndim > 0, "r", "at least one dimension", r.ndim)
    check_tensor("r", r, r, FLOATING, (None,) * r.ndim)
    check_rows("r", r)
    expect(branch is not None or branch_bias is None, "branch", "one, with branch_bias", "None")
    if branch is not None:
        check_tensor("branch", branch, r, FLOATING, r.shape)
        check_rows("branch", branch)
    columns = (("branch_bias", branch_bias), ("weight", weight), ("bias", bias))
    for name, column in columns:
        check_tensor(name, column, r, FLOATING, r.shape[-1:])
