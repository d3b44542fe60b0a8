"""Registration of the residual sum with its norm with torch.library.

Who runs is decided inside, by device and dtype, so that a compiled program decides it too. Neither
op has a derivative of its own: `api.residual_norm` does, and whoever calls them says what is saved.
"""

from types import ModuleType

import torch
from torch import Tensor

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.library import operator
from maect_fast.kernels.residual_norm import reference

__all__ = ["residual_norm", "residual_norm_backward", "triton_obstacle"]

# Features of a row, all of which the kernels hold at once.
MAX_FEATURES = 3072


def triton_obstacle(*tensors: Tensor | None, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernels cannot take these tensors or make that dtype, or None."""
    given = [x for x in tensors if x is not None]
    if reason := gpu.obstacle(*given):
        return reason
    if dtype not in gpu.DTYPES:
        return f"makes float32, bfloat16 and float16, got {str(dtype).split('.')[1]}"
    D = given[0].shape[-1]
    return None if D <= MAX_FEATURES else f"takes up to {MAX_FEATURES} features, got {D}"


def _is_triton(backend: str, *tensors: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernels run: "auto" takes them on CUDA wherever they can."""
    is_cuda = tensors[0] is not None and tensors[0].is_cuda
    return backend == "triton" or (
        backend == "auto" and is_cuda and triton_obstacle(*tensors, dtype=dtype) is None
    )


def _triton() -> ModuleType:
    from maect_fast.kernels.residual_norm import triton_kernel

    return triton_kernel


def _forward_fake(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(r.dtype, torch.float32)
    mean, rstd = (r.new_empty(r.shape[:-1], dtype=wide) for _ in range(2))
    out = r.new_empty((0,) if branch is None else r.shape)
    return out, r.new_empty(r.shape, dtype=dtype), mean, rstd


@operator("residual_norm_fwd", fake=_forward_fake)
def residual_norm(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r_out, y, mean, rstd: `reference.residual_norm`, contiguous."""
    inputs = (r, branch, branch_bias, weight, bias)
    if not _is_triton(backend, *inputs, dtype=dtype):
        out, y, mean, rstd = reference.residual_norm(*inputs, eps, dtype)
        return out.contiguous(), y.contiguous(), mean, rstd
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    with gpu.current(r):
        result = _triton().forward(*inputs, eps, dtype)
    return result


def _backward_fake(
    dy: Tensor,
    dr_out: Tensor | None,
    r_out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    need_dr: bool,
    need_y: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(r_out.dtype, torch.float32)
    sums = r_out.new_empty((3 if need_dr else 2, r_out.shape[-1]), dtype=wide)
    dr = r_out.new_empty(r_out.shape if need_dr else (0,))
    return dr, dy.new_empty(dy.shape if need_y else (0,)), sums


@operator("residual_norm_bwd", fake=_backward_fake)
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dr, y, sums: `reference.residual_norm_backward`, contiguous."""
    inputs = (dy, dr_out, r_out, mean, rstd, weight, bias)
    if not _is_triton(backend, *inputs, dtype=dy.dtype):
        dr, y, sums = reference.residual_norm_backward(*inputs, need_dr, need_y)
        return dr.contiguous(), y.contiguous(), sums
    with gpu.current(dy):
        result: tuple[Tensor, Tensor, Tensor] = _triton().backward(*inputs, need_dr, need_y)
    return result
