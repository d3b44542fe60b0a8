"""Registration of GELU with torch.library.

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
from maect_fast.kernels.gelu import reference

__all__ = [
    "gelu",
    "gelu_bwd",
    "gelu_fwd",
    "gelu_int8",
    "int8_obstacle",
    "triton_obstacle",
]

FORWARD, BACKWARD, INT8 = Plans(), Plans(), Plans()
# Features of a row, all of which the int8 kernel holds at once.
MAX_FEATURES = 8192


def triton_obstacle(h: Tensor, bias: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    return gpu.obstacle(h) if bias is None else gpu.obstacle(h, bias)


def int8_obstacle(h: Tensor, bias: Tensor | None) -> str | None:
    """The same of the kernel that writes int8."""
    if h.shape[-1] > MAX_FEATURES:
        return f"takes up to {MAX_FEATURES} features, got {h.shape[-1]}"
    return triton_obstacle(h, bias)


def _is_triton(backend: str, h: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels run: "auto" takes them on CUDA wherever they can."""
    return backend == "triton" or (
        backend == "auto" and gpu.is_gpu(h) and triton_obstacle(h, bias) is None
    )


def _triton() -> ModuleType:
    from maect_fast.kernels.gelu import triton_kernel

    return triton_kernel


def _forward_fake(h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return h.new_empty(h.shape)


@operator("gelu_fwd", fake=_forward_fake)
def gelu_fwd(h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """G [..., D] contiguous: `reference.gelu`."""
    found = FORWARD.replay((h, bias), (backend,))
    if found is None:
        if not _is_triton(backend, h, bias):
            return reference.gelu(h, bias).contiguous()
        launcher = partial(_triton().forward, h, bias)
        found = FORWARD.record(lambda: (launcher(),), (h, bias), (backend,))
    return found[0]


def _int8_fake(h: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    scale = h.new_empty(h.shape[:-1], dtype=torch.float32)
    return h.new_empty(h.shape, dtype=torch.int8), scale


@operator("gelu_int8", fake=_int8_fake)
def gelu_int8(h: Tensor, bias: Tensor | None, backend: str) -> tuple[Tensor, Tensor]:
    """G [..., D] int8 and its scales, contiguous: `reference.gelu_int8`."""
    found = INT8.replay((h, bias), (backend,))
    if found is None:
        is_auto = backend == "auto" and gpu.is_gpu(h) and int8_obstacle(h, bias) is None
        if not (is_auto or backend == "triton"):
            return reference.gelu_int8(h, bias)
        found = INT8.record(partial(_triton().forward_int8, h, bias), (h, bias), (backend,))
    g, scale = found
    return g, scale


def _backward_fake(
    h: Tensor, bias: Tensor | None, dg: Tensor, need_g: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    dbias = h.new_empty((0,) if bias is None else h.shape[-1:], dtype=wide)
    return h.new_empty(h.shape), h.new_empty(h.shape if need_g else (0,)), dbias


@operator("gelu_bwd", fake=_backward_fake)
def gelu_bwd(
    h: Tensor, bias: Tensor | None, dg: Tensor, need_g: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, g, dbias: `reference.gelu_backward`, contiguous."""
    inputs, numbers = (h, bias, dg), (need_g, backend)
    found = BACKWARD.replay(inputs, numbers)
    if found is None:
        if not _is_triton(backend, h, bias):
            dh, g, dbias = reference.gelu_backward(*inputs, need_g)
            return dh.contiguous(), g.contiguous(), dbias
        found = BACKWARD.record(partial(_triton().backward, *inputs, need_g), inputs, numbers)
    dh, g, part = found
    return dh, g, part.sum(0)


def gelu(h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """The op with its gradients."""
    inputs = (h,) if bias is None else (h, bias)
    result: Tensor
    if needs_gradient(_GELU.op, *inputs):
        result = _GELU.call(h, bias, backend)
    else:
        result = gelu_fwd(h, bias, backend)
    return result


class _GELU(Differentiable):
    op = "gelu"
    forward = staticmethod(gelu_fwd)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        h, bias, ctx.backend = inputs
        ctx.save_for_backward(h, bias)

    @staticmethod
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        h, bias = ctx.saved_tensors
        # An upstream gradient may have any layout; mostly nothing is copied.
        with torch.no_grad():
            dh, _, dbias = gelu_bwd(h, bias, dg.contiguous(), False, ctx.backend)
        gradients = (dh, None if bias is None else dbias.to(bias.dtype))
        return *_GELU.last((dg, h), *gradients), None
