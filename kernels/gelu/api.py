"""Public function: GELU with its bias."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import FLOATING, check_rows, check_tensor, expect
from maect_fast.kernels.gelu import op

__all__ = ["gelu"]


def gelu(h: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Exact GELU of a linear layer's product, ``x * Phi(x)`` with ``x = h + bias``.

    The sum is formed in fp32 and not rounded. Of fp16 and bf16 the kernels take Phi from a
    polynomial, of which 0.03 % of bf16 results differ from correct rounding, by one ulp.

    Args:
        h: [..., D] floats, viewable as rows of one stride; last stride 1. Gets a gradient.
        bias: [D] floats; its gradient is summed in fp32.
        backend: "auto" is "triton" on CUDA but for fp64, else "reference".

    Returns:
        [..., D] contiguous, in the dtype of `h`; no second derivative, no forward mode. NaN stays
        NaN and infinity infinity; of -infinity the kernels make 0, plain PyTorch NaN.

    Raises:
        ValueError, TypeError: a shape, layout, device or dtype that does not fit.
        RuntimeError: a backend that is not there, or not for these inputs.

    Source: arXiv 1606.08415; torch.nn.functional.gelu.
    """
    check_backend("gelu", backend, triton=lambda: op.triton_obstacle(h, bias))
    expect(h.ndim > 0, "h", "at least one dimension", h.ndim)
    check_tensor("h", h, h, FLOATING, (None,) * h.ndim)
    check_rows("h", h)
    check_tensor("bias", bias, h, FLOATING, h.shape[-1:])
    inputs = [h] if bias is None else [h, bias]
    result: Tensor
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        result = _GELU.apply(h, bias, backend)  # type: ignore[no-untyped-call]
    else:
        result = op.gelu(h, bias, backend)
    return result


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(h, bias)
        ctx.backend = backend
        result: Tensor = op.gelu(h, bias, backend)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        h, bias = ctx.saved_tensors
        # An upstream gradient may have any layout; mostly nothing is copied.
        dh, _, dbias = op.gelu_backward(h, bias, dg.contiguous(), False, ctx.backend)
        return dh, None if bias is None else dbias.to(bias.dtype), None
