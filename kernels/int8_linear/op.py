"""Registration of the linear layer on int8 operands with torch.library.

Who runs is decided inside, by device and dtype, so that a compiled program decides it too.
"""

import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.library import operator
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.int8_linear import reference

__all__ = ["int8_linear", "triton_obstacle"]

FORWARD = Plans()


def triton_obstacle(x_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why the Triton kernel cannot take these tensors or make that dtype, or None."""
    if reason := gpu.obstacle(x_scale) if bias is None else gpu.obstacle(x_scale, bias):
        return reason
    if dtype not in gpu.DTYPES:
        return f"makes float32, bfloat16 and float16, got {str(dtype).split('.')[1]}"
    return None


def _is_triton(backend: str, x_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel runs: "auto" takes it on CUDA wherever it can."""
    return backend == "triton" or (
        backend == "auto" and gpu.is_gpu(x_scale) and triton_obstacle(x_scale, bias, dtype) is None
    )


def _triton() -> ModuleType:
    from maect_fast.kernels.int8_linear import triton_kernel

    return triton_kernel


def _forward_fake(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)


@operator("int8_linear", fake=_forward_fake)
def int8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Y [..., N] contiguous: `reference.int8_linear`."""
    inputs, numbers = (x, x_scale, weight, weight_scale, bias), (dtype, backend)
    found = FORWARD.replay(inputs, numbers)
    if found is None:
        if not _is_triton(backend, x_scale, bias, dtype):
            return reference.int8_linear(*inputs, dtype)
        launcher = partial(_triton().forward, *inputs, dtype)
        found = FORWARD.record(lambda: (launcher(),), inputs, numbers)
    return found[0]


@register_flop_formula(torch.ops.maect_fast.int8_linear)
def _flop(x: Any, x_scale: Any, weight: Any, *_: Any, out_shape: Any) -> int:
    """From shapes."""
    return int(2 * math.prod(x) * weight[0])
