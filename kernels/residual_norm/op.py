"""Registration of the residual sum with its norm with torch.library.

Who runs is decided inside, by device and dtype, so that a compiled program decides it too.
"""

from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.library import Differentiable, needs_gradient, operator
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.residual_norm import reference

__all__ = [
    "residual_norm",
    "residual_norm_bwd",
    "residual_norm_fwd",
    "residual_norm_int8",
    "triton_obstacle",
]

FORWARD, BACKWARD = Plans(), Plans()
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
    is_gpu = tensors[0] is not None and gpu.is_gpu(tensors[0])
    return backend == "triton" or (
        backend == "auto" and is_gpu and triton_obstacle(*tensors, dtype=dtype) is None
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
def residual_norm_fwd(
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
    inputs, numbers = (r, branch, branch_bias, weight, bias), (eps, dtype, backend)
    found = FORWARD.replay(inputs, numbers)
    if found is None:
        if not _is_triton(backend, *inputs, dtype=dtype):
            out, y, mean, rstd = reference.residual_norm(*inputs, eps, dtype)
            return out.contiguous(), y.contiguous(), mean, rstd
        launcher = partial(_triton().forward, *inputs, eps, dtype)
        found = FORWARD.record(launcher, inputs, numbers)
    out, y, mean, rstd = found
    return out, y, mean, rstd


def _int8_fake(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    out = r.new_empty((0,) if branch is None else r.shape)
    scale = r.new_empty(r.shape[:-1], dtype=torch.float32)
    return out, r.new_empty(r.shape, dtype=torch.int8), scale


@operator("residual_norm_int8", fake=_int8_fake)
def residual_norm_int8(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """r_out, empty without a branch, y, scale: `reference.residual_norm_int8`, contiguous."""
    inputs, numbers = (r, branch, branch_bias, weight, bias), (eps, torch.int8, backend)
    found = FORWARD.replay(inputs, numbers)
    if found is None:
        if not _is_triton(backend, *inputs, dtype=torch.float32):
            out, y, scale = reference.residual_norm_int8(*inputs, eps)
            return out.contiguous(), y, scale
        launcher = partial(_triton().forward, *inputs, eps, torch.int8)
        found = FORWARD.record(launcher, inputs, numbers)
    out, y, scale = found
    return out, y, scale


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
def residual_norm_bwd(
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
    numbers = (need_dr, need_y, backend)
    found = BACKWARD.replay(inputs, numbers)
    if found is None:
        if not _is_triton(backend, *inputs, dtype=dy.dtype):
            dr, y, sums = reference.residual_norm_backward(*inputs, need_dr, need_y)
            return dr.contiguous(), y.contiguous(), sums
        launcher = partial(_triton().backward, *inputs, need_dr, need_y)
        found = BACKWARD.record(launcher, inputs, numbers)
    dr, y, part = found
    return dr, y, part.sum(0)


def residual_norm(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """r_out, empty without a branch, and y, with their gradients."""
    inputs = (r, branch, branch_bias, weight, bias)
    output: tuple[Tensor, ...]
    if needs_gradient(_ResidualNorm.op, *(x for x in inputs if x is not None)):
        output = _ResidualNorm.call(*inputs, *options)
    else:
        output = residual_norm_fwd(*inputs, *options)
    return output[0], output[1]


class _ResidualNorm(Differentiable):
    op = "residual_norm"
    forward = staticmethod(residual_norm_fwd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        r, branch, _, weight, bias, _, ctx.dtype, ctx.backend = inputs
        r_out, _, mean, rstd = output
        # No zeros for the statistics, which have no gradient, nor for a stream nobody reads.
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:5]]
        ctx.save_for_backward(r if branch is None else r_out, mean, rstd, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, dr_out: Tensor | None, dy: Tensor | None, *_statistics: None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        _, branch_dtype, branch_bias_dtype, weight_dtype, bias_dtype = ctx.dtypes
        need_dr = any(ctx.needs_input_grad[:3])
        if dy is None:
            dy = torch.zeros_like(saved[0], dtype=ctx.dtype)
        if branch_dtype is None:
            dr_out = None
        # Upstream gradients may have any layout; mostly nothing is copied.
        dy = dy.contiguous()
        dr_out = None if dr_out is None else dr_out.contiguous()
        dr, _, sums = residual_norm_bwd(dy, dr_out, *saved, need_dr, False, ctx.backend)
        dweight, dbias, *rest = sums.unbind()
        gradients = (
            dr if need_dr else None,
            dr.to(branch_dtype) if need_dr and branch_dtype is not None else None,
            rest[0].to(branch_bias_dtype) if rest and branch_bias_dtype is not None else None,
            dweight.to(weight_dtype),
            dbias.to(bias_dtype),
        )
        upstream = (dy,) if dr_out is None else (dy, dr_out)
        return *_ResidualNorm.last((*upstream, *saved), *gradients), *(None,) * 3
