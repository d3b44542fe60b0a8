"""Registration of the loss with torch.library, and what it is made of, on one or many ranks.

Statistics of the softmax's rows, then the rows' losses and their mean, which has the gradient.
Between the two the ranks add up their sums; nothing is sent in the backward pass.
"""

import math
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import cpp, gpu
from maect_fast.kernels._common.collectives import all_gather_rows, all_reduce_max, all_reduce_sum
from maect_fast.kernels._common.library import Differentiable, needs_gradient, operator
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.info_nce import reference

__all__ = [
    "Result",
    "finish",
    "gradient",
    "gradient_cpp",
    "loss",
    "mean_loss",
    "row_losses",
    "row_stats",
    "row_stats_cpp",
    "symmetric_loss",
    "triton_obstacle",
]


ROWS, STATS, GRADIENT = (Plans(scalars=("temperature",)) for _ in range(3))
FINISH = Plans()


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
    if not gpu.is_gpu(predicted) and predicted.device.type == "cpu":
        return "reference" if cpp.obstacle(predicted, neighbour) else "cpp"
    return "reference" if triton_obstacle(predicted, neighbour) else "triton"


def _triton() -> ModuleType:
    from maect_fast.kernels.info_nce import triton_kernel

    return triton_kernel


def _scalar(temperature: Tensor, predicted: Tensor) -> Tensor | float:
    """A number, or where a kernel loads it from, so that nothing waits for the device.

    On the CPU, fp64 holds what the caller gave as a float.
    """
    is_loaded = predicted.is_cpu and temperature.dtype != torch.float64
    return float(temperature) if temperature.is_cpu and not is_loaded else temperature


def _rows_fake(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    online: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    V, n, _ = predicted.shape
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    lse, positive, weight = (predicted.new_empty((V, n), dtype=dtype) for _ in range(3))
    normaliser = lse.new_empty((2, V, n))
    inverse = _inverse_fake(predicted, neighbour, backend)
    return lse.new_empty(()), lse, positive, weight, normaliser, inverse


@operator("info_nce_fwd", fake=_rows_fake)
def row_losses(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    online: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mean, lse, positive, weight, normaliser, inverse of as many softmax rows as predictions.

    `row_stats` and `finish` in one, where no rank has a say between them.
    """
    scalar = _scalar(temperature, predicted)
    planned = ((predicted, neighbour), (first, transposed, online, backend), (scalar,))
    found = ROWS.replay(*planned)
    if found is None:
        chosen = _choose(backend, predicted, neighbour)
        if chosen != "triton":
            stats = _row_stats(chosen, predicted, neighbour, temperature, first, transposed)
            loss, lse, weight, normaliser = reference.finish(*stats)
            return loss.mean(), lse, stats[2], weight, normaliser, lse.new_empty(0)
        launcher = partial(
            _triton().row_losses, predicted, neighbour, scalar, first, transposed, online
        )
        found = ROWS.record(launcher, *planned)
    mean, lse, positive, weight, normaliser, inverse = found
    return _total(mean), lse, positive, weight, normaliser, inverse


def _row_stats(chosen: str, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """By the reference or C++."""
    return row_stats_cpp(*inputs) if chosen == "cpp" else reference.row_stats(*inputs)


def _total(mean: Tensor) -> Tensor:
    """Of what several programs added up."""
    return mean.sum() if mean.ndim else mean


def _inverse_fake(predicted: Tensor, neighbour: Tensor, backend: str) -> Tensor:
    """1 / norm of the predictions, if the kernels take it in their backward."""
    V, n, _ = predicted.shape
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    shape = (V, n) if _choose(backend, predicted, neighbour) == "triton" else (0,)
    return predicted.new_empty(shape, dtype=dtype)


def _row_stats_fake(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    online: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_neighbours, num_parts = neighbour.shape[1], 1
    if _choose(backend, predicted, neighbour) == "triton":
        num_parts = _triton().num_parts(predicted, num_neighbours, transposed)
    num_rows = predicted.shape[1] if transposed else num_neighbours
    stats = _allocate(predicted, num_rows, num_parts)
    return *stats, _inverse_fake(predicted, neighbour, backend)


@operator("info_nce_stats", fake=_row_stats_fake)
def row_stats(
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    first: int,
    transposed: bool,
    online: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """row_max, row_sum, positive, and what the same backend's `gradient` takes as `inverse`.

    `online`: row_max must be a maximum, not any fixed shift.
    """
    scalar = _scalar(temperature, predicted)
    planned = ((predicted, neighbour), (first, transposed, online, backend), (scalar,))
    found = STATS.replay(*planned)
    if found is None:
        chosen = _choose(backend, predicted, neighbour)
        if chosen != "triton":
            stats = _row_stats(chosen, predicted, neighbour, temperature, first, transposed)
            return *stats, stats[0].new_empty(0)
        launcher = partial(
            _triton().row_stats, predicted, neighbour, scalar, first, transposed, online
        )
        found = STATS.record(launcher, *planned)
    row_max, row_sum, positive, inverse = found
    return row_max, row_sum, positive, inverse


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


def _allocate(predicted: Tensor, num_rows: int, num_parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised statistics."""
    num_views, num_predictions, _ = predicted.shape
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return (
        predicted.new_empty((num_parts, num_views, num_rows), dtype=dtype),
        predicted.new_empty((num_parts, num_views, num_rows), dtype=dtype),
        predicted.new_empty((num_views, num_predictions), dtype=dtype),
    )


def _finish_fake(
    row_max: Tensor, row_sum: Tensor, positive: Tensor, first: int, n: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    V, R = positive.shape
    lse, weight = (positive.new_empty((V, n)) for _ in range(2))
    return positive.new_empty(()), lse, weight, positive.new_empty((2, V, R))


@operator("info_nce_finish", fake=_finish_fake)
def finish(
    row_max: Tensor, row_sum: Tensor, positive: Tensor, first: int, n: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, lse, weight of n rows from `first` on, which have losses here; normaliser of all."""
    is_auto = backend == "auto" and gpu.is_gpu(row_max) and gpu.obstacle(row_max) is None
    if backend != "triton" and not is_auto:
        loss, lse, weight, normaliser = reference.finish(row_max, row_sum, positive)
        own = slice(first, first + n)
        return loss[:, own].mean(), lse[:, own].clone(), weight[:, own].clone(), normaliser
    inputs = row_max.contiguous(), row_sum.contiguous(), positive.contiguous()
    found = FINISH.replay(inputs, (first, n))
    if found is None:
        launcher = partial(_triton().finish, *inputs, first, n)
        found = FINISH.record(launcher, inputs, (first, n))
    mean, lse, weight, normaliser = found
    return _total(mean), lse, weight, normaliser


def _gradient_fake(grad: Tensor, predicted: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    radial = predicted.new_empty(predicted.shape[:2], dtype=dtype)
    return predicted.new_empty(predicted.shape), radial


@operator("info_nce_bwd", fake=_gradient_fake)
def gradient(
    grad: Tensor,
    predicted: Tensor,
    inverse: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    num_losses: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Gradient of `predicted`, and its radial part; `grad` is that of the mean of the losses."""
    weight = weight.contiguous()
    by_neighbour = None if by_neighbour is None else by_neighbour.contiguous()
    by_predicted = None if by_predicted is None else by_predicted.contiguous()
    rows = (weight, by_neighbour, by_predicted)
    scalar = _scalar(temperature, predicted)
    planned = (
        (grad, predicted, inverse, neighbour, *rows),
        (first, num_losses, backend),
        (scalar,),
    )
    found = GRADIENT.replay(*planned)
    if found is None:
        chosen = _choose(backend, predicted, neighbour)
        if chosen != "triton":
            run = gradient_cpp if chosen == "cpp" else reference.gradient
            return run(grad / num_losses, predicted, neighbour, temperature, *rows, first)
        inputs = (grad, predicted, inverse, neighbour, scalar, *rows, first, num_losses)
        found = GRADIENT.record(partial(_triton().gradient, *inputs), *planned)
    result, radial = found
    return result, radial


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


def mean_loss(
    mean: Tensor,
    predicted: Tensor,
    inverse: Tensor,
    temperature: Tensor,
    neighbour: Tensor,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
    num_losses: int,
    num_counted: int,
    backend: str,
) -> Tensor:
    """`mean`, of so many rows' losses, with its gradient to predictions and temperature.

    See `gradient`. `num_counted`: how often a pair's logit is in the sums of `radial`.
    """
    if not needs_gradient(_MeanLoss.op, predicted, temperature):
        return mean
    constants = (neighbour, weight, by_neighbour, by_predicted)
    numbers = (first, num_losses, num_counted, backend)
    loss: Tensor = _MeanLoss.call(mean, predicted, inverse, temperature, *constants, *numbers)
    return loss


class _MeanLoss(Differentiable):
    op = "info_nce"

    @staticmethod
    def forward(mean: Tensor, *_: Any) -> Tensor:
        # No view of its input, which could not be changed in place.
        return mean.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *tensors, ctx.first, ctx.num_losses, ctx.num_counted, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        predicted, inverse, temperature, *constants = ctx.saved_tensors
        inputs = (grad, predicted, inverse, constants[0], temperature, *constants[1:])
        grad_predicted, radial = gradient(*inputs, ctx.first, ctx.num_losses, ctx.backend)
        grads: tuple[Tensor | None, ...] = (grad_predicted, None)
        if ctx.needs_input_grad[3]:
            # The logits are cosines / T, and `radial` sums logits times their gradients.
            total = radial.sum().to(temperature.device) / ctx.num_counted
            grads = (grad_predicted, (-total / temperature).to(temperature.dtype))
        grads = _MeanLoss.last((grad, predicted, temperature), *grads)
        return None, grads[0], None, grads[1], *[None] * 8


class Result(NamedTuple):
    """A loss and what its softmax rows on this rank tell, constants but for the loss."""

    loss: Tensor
    """0-d."""
    lse: Tensor
    """[V, n], logsumexp of a row's logits."""
    positive: Tensor
    """[V, n], logit of a row's positive pair."""
    normaliser: Tensor
    """[2, V, n], of which the first is the largest other logit of a row, if `online`."""


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
    n = predicted.shape[1]
    if backend == "triton" or (gpu.is_gpu(predicted) and backend != "reference"):
        # Once for both directions, as the kernels' products ask.
        neighbour = _side_by_side(neighbour.to(predicted.dtype))
        predicted = _side_by_side(predicted)
    inputs = (predicted.detach(), neighbour, temperature.detach())
    if group is None or transposed:
        mean, lse, positive, weight, normaliser, inverse = row_losses(
            *inputs, first, transposed, online, backend
        )
    else:
        stats = row_stats(*inputs, first, transposed, online, backend)
        row_max, row_sum, of_all = _over_ranks(*stats[:3], inputs[2], first, online, group)
        inverse = stats[3]
        mean, lse, weight, normaliser = finish(row_max, row_sum, of_all, first, n, backend)
        positive = of_all[:, first : first + n]
    by_neighbour, by_predicted = (None, normaliser) if transposed else (normaliser, None)
    constants = (neighbour, weight, by_neighbour, by_predicted)
    numbers = (first, weight.numel(), 1, backend)
    result = mean_loss(mean, predicted, inverse, temperature, *constants, *numbers)
    of_own = normaliser if transposed else normaliser[:, :, first : first + n]
    return Result(result, lse, positive, of_own)


def _side_by_side(x: Tensor) -> Tensor:
    """With the features of a row side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
    rows = (row_max, row_sum, stats[0][2])
    mean, _, weight, normaliser = finish(*rows, 0, pair.shape[1], backend)
    of_all = all_gather_rows(normaliser.permute(2, 0, 1), group).permute(1, 2, 0)
    zeros = torch.zeros_like(weight)
    # The other view's row has the same positive pair.
    means, weights = (mean, torch.zeros_like(mean)), (weight + weight.flip(0), zeros)
    # Each pair is in both views' logits, and for each of its two rows.
    numbers = (first, weight.numel(), 2, backend)
    losses = [
        mean_loss(
            means[i],
            pair,
            stats[i][3],
            temperature,
            block,
            weights[i],
            of_all if i else of_all.flip(1),
            normaliser,
            *numbers,
        )
        for i, block in enumerate(blocks)
    ]
    return sum(losses[1:], start=losses[0])


@register_flop_formula([torch.ops.maect_fast.info_nce_fwd, torch.ops.maect_fast.info_nce_stats])
def _row_stats_flop(predicted: Any, neighbour: Any, *_: Any, out_shape: Any) -> int:
    """From shapes: the logits."""
    return int(2 * math.prod(predicted) * neighbour[1])


@register_flop_formula(torch.ops.maect_fast.info_nce_bwd)
def _gradient_flop(
    grad: Any, predicted: Any, inverse: Any, neighbour: Any, *_: Any, out_shape: Any
) -> int:
    """The logits again, and their gradient's product with the neighbours."""
    return int(4 * math.prod(predicted) * neighbour[1])
