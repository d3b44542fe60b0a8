"""Definition of the residual sum with its norm in plain PyTorch, any float dtype up to fp64.

Legend: M rows (tokens), any number of leading dimensions; D features. r is the residual stream, a
branch what a block's attention or MLP adds to it.
"""

import torch
from torch import Tensor

from maect_fast.kernels._common.int8 import quantize_rows

__all__ = ["residual_norm", "residual_norm_backward", "residual_norm_int8"]


def residual_norm(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r_out = r + branch + branch_bias, y = LayerNorm(r_out).

    Returns:
        r_out [..., D] in the dtype of r, empty without a branch, as it is r then; y [..., D] in
        `dtype`; mean and rstd [...] of the rounded r_out, in at least fp32.
    """
    wide = _wide(r)
    out, x = r.new_empty((0,)), r
    if branch is not None:
        if branch_bias is None:
            x = r.to(wide) + branch
        else:
            # On a CPU fresh memory costs as much as a pass.
            x = (branch + branch_bias.to(wide)).add_(r)
        x = out = x.to(r.dtype)
    shape = [r.shape[-1]]
    y, mean, rstd = torch.native_layer_norm(x.to(wide), shape, weight.to(wide), bias.to(wide), eps)
    return out, y.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def residual_norm_int8(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """r_out and y of `residual_norm`, of which y [..., D] is int8 and has scales [...] fp32."""
    inputs = (r, branch, branch_bias, weight, bias)
    out, y, _, _ = residual_norm(*inputs, eps, _wide(r))
    return out, *quantize_rows(y)


def residual_norm_backward(
    dy: Tensor,
    dr_out: Tensor | None,
    r_out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    need_dr: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, from those of y and (perhaps) of r_out.

    Returns:
        dr [..., D] in the dtype of r_out, gradient of r and of branch; y [..., D] again, in the
        dtype of dy; both empty if not needed; sums over rows in at least fp32: gradients of weight
        and bias, and of branch_bias if dr is needed, [2 or 3, D].
    """
    wide = _wide(r_out)
    x, upstream = r_out.to(wide), dy.to(wide)
    gamma, beta = weight.to(wide), bias.to(wide)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        *(upstream, x, [x.shape[-1]], mean[..., None], rstd[..., None], gamma, beta),
        [need_dr, True, True],
    )
    dr = r_out.new_empty((0,))
    sums = [dweight, dbias]
    if need_dr:
        dx = dx if dr_out is None else dx.add_(dr_out)
        sums.append(dx.reshape(-1, dx.shape[-1]).sum(0))
        dr = dx.to(r_out.dtype)
    y = dy.new_empty((0,))
    if need_y:
        y = (x - mean[..., None]).mul_(rstd[..., None]).mul_(gamma).add_(beta).to(dy.dtype)
    return dr, y, torch.stack(sums)


def _wide(r: Tensor) -> torch.dtype:
    return torch.promote_types(r.dtype, torch.float32)
