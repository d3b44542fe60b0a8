"""Public function: GELU with its bias."""

from torch import Tensor

from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import (
    FLOATING,
    check_rows,
    check_tensor,
    check_tensors,
    expect,
)
from maect_fast.kernels.gelu import op

__all__ = ["gelu", "gelu_int8"]


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
    check_tensors(h=h)
    check_backend("gelu", backend, triton=lambda: op.triton_obstacle(h, bias))
    _check(h, bias)
    return op.gelu(h, bias, backend)


def gelu_int8(
    h: Tensor, bias: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """`gelu` in int8 with a scale per row, an operand of `int8_linear`.

    It is quantised as `quantize_rows` does it, from fp32; half-way between two steps the kernel may
    take the other one.

    Args:
        h: [..., D] floats, viewable as rows of one stride; last stride 1.
        bias: [D] floats.
        backend: "auto" is "triton" on CUDA but for fp64 and D > 8192, else "reference".

    Returns:
        g [..., D] int8 and its scales [...] fp32, contiguous. Nothing gets a gradient.

    Raises:
        ValueError, TypeError, RuntimeError: as `gelu`.
    """
    check_backend("gelu_int8", backend, triton=lambda: op.int8_obstacle(h, bias))
    _check(h, bias)
    g, scale = op.gelu_int8(h, bias, backend)
    return g, scale


def _check(h: Tensor, bias: Tensor | None) -> None:
    expect(h.ndim > 0, "h", "at least one dimension", h.ndim)
    check_tensor("h", h, h, FLOATING, (None,) * h.ndim)
    check_rows("h", h)
    check_tensor("bias", bias, h, FLOATING, h.shape[-1:])
