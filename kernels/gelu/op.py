"""Registration of GELU with torch.library.

Who runs is decided inside, by device and dtype, so that a compiled program decides it too. Neither
op has a derivative of its own: `api.gelu` does, and whoever calls them says what is saved.
"""

from types import ModuleType

import torch
from torch import Tensor

from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.library import operator
from maect_fast.kernels.gelu import reference

__all__ = ["gelu", "gelu_backward", "triton_obstacle"]


def triton_obstacle(h: Tensor, bias: Tensor | None) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    return gpu.obstacle(h) if bias is None else gpu.obstacle(h, bias)


def _is_triton(backend: str, h: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels run: "auto" takes them on CUDA wherever they can."""
    return backend == "triton" or (
        backend == "auto" and h.is_cuda and triton_obstacle(h, bias) is None
    )


def _triton() -> ModuleType:
    from maect_fast.kernels.gelu import triton_kernel

    return triton_kernel


def _forward_fake(h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return h.new_empty(h.shape)


@operator("gelu_fwd", fake=_forward_fake)
def gelu(h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """G [..., D] contiguous: `reference.gelu`."""
    if not _is_triton(backend, h, bias):
        return reference.gelu(h, bias).contiguous()
    with gpu.current(h):
        result: Tensor = _triton().forward(h, bias)
    return result


def _backward_fake(
    h: Tensor, bias: Tensor | None, dg: Tensor, need_g: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(h.dtype, torch.float32)
    dbias = h.new_empty((0,) if bias is None else h.shape[-1:], dtype=wide)
    return h.new_empty(h.shape), h.new_empty(h.shape if need_g else (0,)), dbias


@operator("gelu_bwd", fake=_backward_fake)
def gelu_backward(
    h: Tensor, bias: Tensor | None, dg: Tensor, need_g: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, g, dbias: `reference.gelu_backward`, contiguous."""
    if not _is_triton(backend, h, bias):
        dh, g, dbias = reference.gelu_backward(h, bias, dg, need_g)
        return dh.contiguous(), g.contiguous(), dbias
    with gpu.current(h):
        result: tuple[Tensor, Tensor, Tensor] = _triton().backward(h, bias, dg, need_g)
    return result
