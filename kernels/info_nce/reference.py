"""Definition of the InfoNCE loss's row statistics and of their gradient, in plain PyTorch.

Legend: V views, n local predictions per view, P neighbours gathered over all ranks, D features;
R rows and C columns of the softmax: R = P, C = n, or transposed R = n, C = P.

Prediction j of this rank and neighbour `first + j` are the positive pairs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["row_stats", "row_stats_backward"]

EPS = 1e-12
# Logits that exist at a time: 16 MiB of fp32, whatever n and P.
BLOCK = 1 << 22


def row_stats(
    predicted: Tensor, neighbour: Tensor, temperature: Tensor, first: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of the logits ``<rows, columns> / T``, view by view.

    View v of `predicted` meets view V - 1 - v of `neighbour`: two views are crossed. Predictions
    are normalised (eps 1e-12), neighbours taken as they are. At least fp32 inside.

    Args:
        predicted: [V, n, D].
        neighbour: [V, P, D], constant.
        temperature: 0-d.
        first: the neighbour that is the positive of prediction 0.
        transposed: False: softmax rows are neighbours; True: predictions.

    Returns:
        row_max [V, R], constant under autograd; row_sum [V, R] of ``exp(logit - row_max)``;
        positive [V, n], the logits of the positive pairs. fp32 or fp64.
    """
    row_max, row_sum, positive = [], [], []
    # Autocast would round the logits to half precision.
    with torch.autocast(predicted.device.type, enabled=False):
        for rows, columns in _pairs(predicted, neighbour, transposed):
            for start, block in _blocks(rows, columns):
                logits = rows[block] @ columns.T / temperature
                row_max.append(logits.detach().amax(1))
                row_sum.append((logits - row_max[-1][:, None]).exp().sum(1))
                positive.append(_positives(logits, start, first, transposed))
    num_views = len(predicted)
    return (
        torch.cat(row_max).view(num_views, -1),
        torch.cat(row_sum).view(num_views, -1),
        torch.cat(positive).view(num_views, -1),
    )


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
    """Gradient of `row_stats` to `predicted`, in its dtype; the logits are computed again."""
    grads = []
    with torch.autocast(predicted.device.type, enabled=False):
        for view, (rows, columns) in enumerate(_pairs(predicted, neighbour, transposed)):
            grad_unit = torch.zeros_like(rows if transposed else columns)
            done = 0
            for start, block in _blocks(rows, columns):
                logits = rows[block] @ columns.T / temperature
                weight = (logits - row_max[view, block, None]).exp_() * grad_sum[view, block, None]
                diagonal = _positives(weight, start, first, transposed)
                diagonal += grad_positive[view, done : done + len(diagonal)]
                done += len(diagonal)
                if transposed:
                    grad_unit[block] = weight @ columns
                else:
                    grad_unit += weight.T @ rows[block]
            grads.append(_normalize_backward(grad_unit / temperature, predicted[view]))
    return torch.stack(grads)


def _pairs(
    predicted: Tensor, neighbour: Tensor, transposed: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Softmax rows and columns of each view."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    for view, raw in enumerate(predicted):
        unit = normalize(raw.to(dtype), dim=-1, eps=EPS)
        constant = neighbour[len(predicted) - 1 - view].to(dtype)
        yield (unit, constant) if transposed else (constant, unit)


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, slice]]:
    """Ranges of rows, with their starts, whose logits exist at the same time."""
    length = max(1, BLOCK // len(columns))
    for start in range(0, len(rows), length):
        yield start, slice(start, start + length)


def _positives(logits: Tensor, start: int, first: int, transposed: bool) -> Tensor:
    """View of the positive pairs' entries in the rows from `start` on, in order; perhaps none."""
    return logits.diagonal(start + first if transposed else start - first)


def _normalize_backward(grad: Tensor, raw: Tensor) -> Tensor:
    """Gradient of ``raw / max(norm(raw), EPS)``; below EPS the divisor is constant."""
    wide = raw.to(grad.dtype)
    norm: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    divisor = norm.clamp_min(EPS)
    unit = wide / divisor
    radial = (grad * unit).sum(-1, keepdim=True) * (norm >= EPS)
    return ((grad - radial * unit) / divisor).to(raw.dtype)
