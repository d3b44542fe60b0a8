"""Registration of the row statistics with torch.library; the ranks talk to each other outside."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import cpp
from maect_fast.kernels.info_nce import reference

__all__ = ["row_stats", "row_stats_backward", "row_stats_backward_cpp", "row_stats_cpp"]


@torch.library.custom_op("maect_fast::info_nce_fwd", mutates_args=())
def row_stats(
    predicted: Tensor, neighbour: Tensor, temperature: Tensor, first: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """row_max, row_sum, positive."""
    return reference.row_stats(predicted, neighbour, temperature, first, transposed)


@row_stats.register_kernel("cpu")
def _(
    predicted: Tensor, neighbour: Tensor, temperature: Tensor, first: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    is_cpp = cpp.obstacle(predicted, neighbour) is None
    function = row_stats_cpp if is_cpp else reference.row_stats
    return function(predicted, neighbour, temperature, first, transposed)


def row_stats_cpp(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    simd: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """`row_stats` with the inner loops called `simd`, of `torch.ops.maect_fast.info_nce_simd()`.

    "avx512_bf16" multiplies in bf16 and takes only bf16 predictions. Empty: the first that does.
    """
    stats = _allocate(predicted, neighbour, transposed)
    torch.ops.maect_fast.info_nce_fwd_cpp(
        predicted, neighbour, float(temperature), first, transposed, simd, *stats
    )
    return stats


@row_stats.register_fake
def _(
    predicted: Tensor, neighbour: Tensor, temperature: Tensor, first: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _allocate(predicted, neighbour, transposed)


def _allocate(
    predicted: Tensor, neighbour: Tensor, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results."""
    num_views, num_predictions, _ = predicted.shape
    num_rows = num_predictions if transposed else neighbour.shape[1]
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return (
        predicted.new_empty((num_views, num_rows), dtype=dtype),
        predicted.new_empty((num_views, num_rows), dtype=dtype),
        predicted.new_empty((num_views, num_predictions), dtype=dtype),
    )


@torch.library.custom_op("maect_fast::info_nce_bwd", mutates_args=())
def row_stats_backward(
    grad_sum: Tensor,
    grad_positive: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    row_max: Tensor,
    first: int,
    transposed: bool,
) -> Tensor:
    """Gradient of `predicted`."""
    return reference.row_stats_backward(
        grad_sum, grad_positive, predicted, neighbour, temperature, row_max, first, transposed
    )


@row_stats_backward.register_kernel("cpu")
def _(
    grad_sum: Tensor,
    grad_positive: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    row_max: Tensor,
    first: int,
    transposed: bool,
) -> Tensor:
    is_cpp = cpp.obstacle(predicted, neighbour) is None
    function = row_stats_backward_cpp if is_cpp else reference.row_stats_backward
    return function(
        grad_sum, grad_positive, predicted, neighbour, temperature, row_max, first, transposed
    )


def row_stats_backward_cpp(
    grad_sum: Tensor,
    grad_positive: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    row_max: Tensor,
    first: int,
    transposed: bool,
    simd: str = "",
) -> Tensor:
    """`row_stats_backward` with the inner loops called `simd`, which must be the forward's."""
    grad = predicted.new_empty(predicted.shape)
    torch.ops.maect_fast.info_nce_bwd_cpp(
        grad_sum.contiguous(),
        grad_positive.contiguous(),
        predicted,
        neighbour,
        float(temperature),
        row_max.contiguous(),
        first,
        transposed,
        simd,
        grad,
    )
    return grad


@row_stats_backward.register_fake
def _(
    grad_sum: Tensor,
    grad_positive: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    row_max: Tensor,
    first: int,
    transposed: bool,
) -> Tensor:
    return predicted.new_empty(predicted.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    predicted, neighbour, temperature, ctx.first, ctx.transposed = inputs
    ctx.save_for_backward(predicted, neighbour, temperature, output[0])


def _backward(
    ctx: Any, _grad_max: Tensor, grad_sum: Tensor, grad_positive: Tensor
) -> tuple[Tensor, None, None, None, None]:
    """`row_max` is a constant: the loss does not depend on the shift of the exponents."""
    predicted, neighbour, temperature, row_max = ctx.saved_tensors
    grad_predicted = row_stats_backward(
        grad_sum,
        grad_positive,
        predicted,
        neighbour,
        temperature,
        row_max,
        ctx.first,
        ctx.transposed,
    )
    return grad_predicted, None, None, None, None


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("info_nce has no second derivative; backend='reference' has one")


row_stats.register_autograd(_backward, setup_context=_setup_context)
row_stats_backward.register_autograd(_no_second_derivative)


@register_flop_formula(torch.ops.maect_fast.info_nce_fwd)
def _row_stats_flop(predicted: Any, neighbour: Any, *_: Any, out_shape: Any) -> int:
    """From shapes: the logits."""
    return int(2 * math.prod(predicted) * neighbour[1])


@register_flop_formula(torch.ops.maect_fast.info_nce_bwd)
def _row_stats_backward_flop(
    grad_sum: Any, grad_positive: Any, predicted: Any, neighbour: Any, *_: Any, out_shape: Any
) -> int:
    """The logits again, and their gradient's product with the neighbours."""
    return int(4 * math.prod(predicted) * neighbour[1])
