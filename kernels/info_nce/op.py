"""Registration of the loss with torch.library, and what it is made of, on one or many ranks.

Statistics of the softmax's rows, then the rows' losses, then their mean, which has the gradient.
Between the first two the ranks add up their sums; nothing is sent in the backward pass.
"""

import math
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import cpp, gpu
from maect_fast.kernels._common.collectives import all_gather_rows, all_reduce_max, all_reduce_sum
from maect_fast.kernels.info_nce import reference

__all__ = [
    "Result",
    "finish",
    "gradient",
    "gradient_cpp",
    "loss",
    "mean_loss",
    "row_stats",
    "row_stats_cpp",
    "symmetric_loss",
    "triton_obstacle",
]


def triton_obstacle(predicted: Tensor, neighbour: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    D = predicted.shape[-1]
    if D % 16 or D > 1024:
        return f"takes D a multiple of 16 up to 1024, got {D}"
    return gpu.obstacle(predicted, neighbour)


def _choose(backend: str, predicted: Tensor, neighbour: Tensor) -> str:
    """The backend that runs: "auto" goes by device, and to the reference where no kernel can."""
    if backend != "auto":
        return backend
    if predicted.device.type == "cpu":
        return "reference" if cpp.obstacle(predicted, neighbour) else "cpp"
    return "reference" if triton_obstacle(predicted, neighbour) else "triton"


def _triton() -> ModuleType:
    from maect_fast.kernels.info_nce import triton_kernel

    return triton_kernel


@torch.library.custom_op("maect_fast::info_nce_fwd", mutates_args=())
def row_stats(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    online: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """row_max, row_sum, positive; `online`: row_max must be a maximum, not any fixed shift."""
    inputs = (predicted, neighbour, temperature, first, transposed)
    match _choose(backend, predicted, neighbour):
        case "triton":
            with gpu.current(predicted):
                result: tuple[Tensor, Tensor, Tensor] = _triton().row_stats(*inputs, online)
            return result
        case "cpp":
            return row_stats_cpp(*inputs)
    return reference.row_stats(*inputs)


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
    stats = _allocate(predicted, predicted.shape[1] if transposed else neighbour.shape[1], 1)
    torch.ops.maect_fast.info_nce_fwd_cpp(
        predicted, neighbour, float(temperature), first, transposed, simd, *stats
    )
    return stats


@row_stats.register_fake
def _(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    online: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    num_neighbours, num_parts = neighbour.shape[1], 1
    if _choose(backend, predicted, neighbour) == "triton":
        num_parts = _triton().num_parts(predicted, num_neighbours, transposed)
    return _allocate(predicted, predicted.shape[1] if transposed else num_neighbours, num_parts)


def _allocate(predicted: Tensor, num_rows: int, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised statistics."""
    num_views, num_predictions, _ = predicted.shape
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return (
        predicted.new_empty((num_parts, num_views, num_rows), dtype=dtype),
        predicted.new_empty((num_parts, num_views, num_rows), dtype=dtype),
        predicted.new_empty((num_views, num_predictions), dtype=dtype),
    )


@torch.library.custom_op("maect_fast::info_nce_finish", mutates_args=())
def finish(
    row_max: Tensor, row_sum: Tensor, positive: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, lse, weight, normaliser."""
    is_auto = backend == "auto" and row_max.is_cuda and gpu.obstacle(row_max) is None
    if backend != "triton" and not is_auto:
        return reference.finish(row_max, row_sum, positive)
    parts = row_max.contiguous(), row_sum.contiguous()
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    with gpu.current(positive):
        result = _triton().finish(*parts, positive.contiguous())
    return result


@finish.register_fake
def _(
    row_max: Tensor, row_sum: Tensor, positive: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, lse, weight = (positive.new_empty(positive.shape) for _ in range(3))
    return loss, lse, weight, positive.new_empty((2, *positive.shape))


@torch.library.custom_op("maect_fast::info_nce_mean", mutates_args=())
def mean_loss(
    predicted: Tensor,
    temperature: Tensor,
    row_loss: Tensor,
    neighbour: Tensor,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    num_counted: int,
    backend: str,
) -> Tensor:
    """Mean of the rows' losses, and whatever its gradient to predictions and temperature needs.

    See `reference.gradient`. `num_counted`: how often a pair's logit is in the sums of `radial`.
    """
    return row_loss.mean()


@mean_loss.register_fake
def _(predicted: Tensor, temperature: Tensor, row_loss: Tensor, *_: Any) -> Tensor:
    return row_loss.new_empty(())


@torch.library.custom_op("maect_fast::info_nce_bwd", mutates_args=())
def gradient(
    grad: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of `predicted`, and its radial part."""
    weight = weight.contiguous()
    by_neighbour = None if by_neighbour is None else by_neighbour.contiguous()
    by_predicted = None if by_predicted is None else by_predicted.contiguous()
    inputs = (predicted, neighbour, temperature, weight, by_neighbour, by_predicted, first)
    match _choose(backend, predicted, neighbour):
        case "triton":
            with gpu.current(predicted):
                result: tuple[Tensor, Tensor] = _triton().gradient(grad, *inputs)
            return result
        case "cpp":
            return gradient_cpp(grad, *inputs)
    return reference.gradient(grad, *inputs)


def gradient_cpp(
    grad: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    simd: str = "",
) -> tuple[Tensor, Tensor]:
    """`gradient` with the inner loops called `simd`, which must be the forward's."""
    result = predicted.new_empty(predicted.shape)
    radial = predicted.new_empty(predicted.shape[:2], dtype=torch.float32)
    # An empty tensor stands for none.
    rows = (radial[:0] if x is None else x for x in (by_neighbour, by_predicted))
    torch.ops.maect_fast.info_nce_bwd_cpp(
        float(grad),
        predicted,
        neighbour,
        float(temperature),
        weight,
        *rows,
        first,
        simd,
        result,
        radial,
    )
    return result, radial


@gradient.register_fake
def _(grad: Tensor, predicted: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    radial = predicted.new_empty(predicted.shape[:2], dtype=dtype)
    return predicted.new_empty(predicted.shape), radial


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    predicted, temperature, row_loss, *tensors, ctx.first, ctx.num_counted, ctx.backend = inputs
    ctx.num_rows = row_loss.numel()
    ctx.save_for_backward(predicted, temperature, *tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    predicted, temperature, neighbour, *tensors = ctx.saved_tensors
    grad_predicted, radial = gradient(
        grad / ctx.num_rows, predicted, neighbour, temperature, *tensors, ctx.first, ctx.backend
    )
    grad_temperature = None
    if ctx.needs_input_grad[1]:
        # The logits are cosines / T, and `radial` sums logits times their gradients.
        total = radial.sum().to(temperature.device) / ctx.num_counted
        grad_temperature = (-total / temperature).to(temperature.dtype)
    return grad_predicted, grad_temperature, *[None] * 8


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("info_nce has no second derivative")


mean_loss.register_autograd(_backward, setup_context=_setup_context)
gradient.register_autograd(_no_second_derivative)


class Result(NamedTuple):
    """A loss and what its softmax rows on this rank tell, constants but for the loss."""

    loss: Tensor
    """0-d."""
    lse: Tensor
    """[V, n], logsumexp of a row's logits."""
    positive: Tensor
    """[V, n], logit of a row's positive pair."""
    row_max: Tensor
    """[V, n], the largest other logit of a row, if `online`."""


def loss(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    *,
    first: int,
    transposed: bool,
    online: bool,
    group: dist.ProcessGroup | None,
    backend: str,
) -> Result:
    """Of predictions [V, n, D] and the neighbours [V, P, D] of all ranks; see `reference`."""
    inputs = (predicted.detach(), neighbour, temperature.detach())
    row_max, row_sum, positive = row_stats(*inputs, first, transposed, online, backend)
    if group is not None and not transposed:
        row_max, row_sum, positive = _over_ranks(
            row_max, row_sum, positive, inputs[2], first, online, group
        )
    row_loss, lse, weight, normaliser = finish(row_max, row_sum, positive, backend)
    by_neighbour, by_predicted = (None, normaliser) if transposed else (normaliser, None)
    largest = normaliser[0]
    if group is not None and not transposed:
        own = slice(first, first + predicted.shape[1])
        row_loss, weight, lse = row_loss[:, own], weight[:, own], lse[:, own]
        positive, largest = positive[:, own], largest[:, own]
    mean = mean_loss(
        predicted,
        temperature,
        row_loss,
        neighbour,
        weight,
        by_neighbour,
        by_predicted,
        first,
        1,
        backend,
    )
    return Result(mean, lse, positive, largest)


def _over_ranks(
    row_max: Tensor,
    row_sum: Tensor,
    positive: Tensor,
    temperature: Tensor,
    first: int,
    online: bool,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the columns of all ranks, and the positives of all rows."""
    # Without a maximum all ranks know the shift: that of unit rows.
    fixed = torch.ones_like(row_max[0]) / temperature
    shift = all_reduce_max(row_max.amax(0), group) if online else fixed
    row_sum = (row_sum * (row_max - shift).exp()).sum(0)
    both = torch.stack((row_sum, torch.zeros_like(row_sum)))
    both[1, :, first : first + positive.shape[1]] = positive
    row_sum, positive = all_reduce_sum(both, group)
    return shift[None], row_sum[None], positive


def symmetric_loss(
    pair: Tensor,
    temperature: Tensor,
    *,
    same_view: bool,
    first: int,
    group: dist.ProcessGroup | None,
    backend: str,
) -> Tensor:
    """Of two views' rows [2, n, D] to each other's, and with `same_view` to those of their own.

    The rows of all ranks are constants to each other, as neighbours are: what they miss, the
    gradient of a row as a column, is complete where the row is, for normalisers travel too.
    """
    wide = pair.detach().to(torch.promote_types(pair.dtype, torch.float32))
    constant = torch.nn.functional.normalize(wide, dim=-1, eps=reference.EPS).to(pair.dtype)
    gathered = all_gather_rows(constant.transpose(0, 1), group).transpose(0, 1)
    # As the op crosses views, flipped views meet themselves; their diagonal is left out.
    blocks = (gathered, gathered.flip(0)) if same_view else (gathered,)
    inputs = (pair.detach(), temperature.detach())
    stats = [row_stats(inputs[0], x, inputs[1], first, True, True, backend) for x in blocks]
    row_max, row_sum = (torch.cat([s[i] for s in stats]) for i in range(2))
    row_loss, _, weight, normaliser = finish(row_max, row_sum, stats[0][2], backend)
    of_all = all_gather_rows(normaliser.permute(2, 0, 1), group).permute(1, 2, 0)
    zeros = torch.zeros_like(weight)
    # The other view's row has the same positive pair.
    losses, weights = (row_loss, zeros), (weight + weight.flip(0), zeros)
    result: Tensor = row_loss.new_zeros(())
    for i, block in enumerate(blocks):
        by_neighbour = of_all if i else of_all.flip(1)
        result = result + mean_loss(
            pair,
            temperature,
            losses[i],
            block,
            weights[i],
            by_neighbour,
            normaliser,
            first,
            # Each pair is in both views' logits, and for each of its two rows.
            2,
            backend,
        )
    return result


@register_flop_formula(torch.ops.maect_fast.info_nce_fwd)
def _row_stats_flop(predicted: Any, neighbour: Any, *_: Any, out_shape: Any) -> int:
    """From shapes: the logits."""
    return int(2 * math.prod(predicted) * neighbour[1])


@register_flop_formula(torch.ops.maect_fast.info_nce_bwd)
def _gradient_flop(grad: Any, predicted: Any, neighbour: Any, *_: Any, out_shape: Any) -> int:
    """The logits again, and their gradient's product with the neighbours."""
    return int(4 * math.prod(predicted) * neighbour[1])
