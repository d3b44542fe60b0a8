"""Definition of the InfoNCE loss, from its row statistics to its gradient, in plain PyTorch.

Legend: V views, n local predictions per view, P neighbours gathered over all ranks, D features;
R rows and C columns of the softmax: R = P, C = n, or transposed R = n, C = P; S parts of the
columns, whose statistics come one by one.

Prediction j of this rank and neighbour `first + j` are the positive pairs. View v of `predicted`
meets view V - 1 - v of `neighbour`: two views are crossed.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["InfoNCEStats", "finish", "gradient", "row_stats"]

EPS = 1e-12
# Logits that exist at a time: 16 MiB of fp32, whatever n and P.
BLOCK = 1 << 22


class InfoNCEStats(NamedTuple):
    """The loss, and of this rank's softmax rows what tells whether training is well."""

    loss: Tensor
    """0-d, as `info_nce` returns it; the others are constants."""
    accuracy: Tensor
    """0-d: share of rows where no logit is larger than the positive's (top-1)."""
    similarity: Tensor
    """0-d: mean cosine of the positive pairs."""
    lse: Tensor
    """[V, n], V = 1 for one direction: logsumexp of each row's logits."""


def row_stats(
    predicted: Tensor, neighbour: Tensor, temperature: Tensor, first: int, transposed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the loss needs of the logits ``<rows, columns> / T``, view by view.

    Predictions are normalised (eps 1e-12), neighbours taken as they are. At least fp32 inside. The
    positive pairs are not among the columns: beside exp(positive) the digits of a small sum, which
    decide a small loss, would be lost.

    Args:
        predicted: [V, n, D].
        neighbour: [V, P, D], constant.
        temperature: 0-d.
        first: the neighbour that is the positive of prediction 0.
        transposed: False: softmax rows are neighbours; True: predictions.

    Returns:
        row_max [S, V, R], constant under autograd, at least the dtype's lowest number; row_sum
        [S, V, R] of ``exp(logit - row_max)``; positive [V, n], the logits of the positive pairs.
        fp32 or fp64; S is 1 here.
    """
    row_max, row_sum, positive = [], [], []
    # Autocast would round the logits to half precision.
    with torch.autocast(predicted.device.type, enabled=False):
        for rows, columns in _pairs(predicted, neighbour, transposed):
            lowest = torch.finfo(rows.dtype).min
            for start, block in _blocks(rows, columns):
                logits = rows[block] @ columns.T / temperature
                pairs = _positives(logits, start, first, transposed)
                positive.append(pairs.clone())
                pairs.fill_(-torch.inf)
                row_max.append(logits.detach().amax(1).clamp_min(lowest))
                row_sum.append((logits - row_max[-1][:, None]).exp().sum(1))
    num_views = len(predicted)
    return (
        torch.cat(row_max).view(1, num_views, -1),
        torch.cat(row_sum).view(1, num_views, -1),
        torch.cat(positive).view(num_views, -1),
    )


def finish(
    row_max: Tensor, row_sum: Tensor, positive: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows' losses from their statistics: ``log(1 + sum of exp(logit - positive))``.

    Args:
        row_max: [S, V, R].
        row_sum: [S, V, R].
        positive: [V, R], the logit of each row's positive pair.

    Returns:
        loss [V, R]; lse [V, R], the logsumexp of all logits; weight [V, R], the gradient of the
        loss to the positive's logit, its probability minus 1; normaliser [2, V, R], shift and
        factor with ``probability = exp(logit - shift) * factor``: exact where lse would round.
    """
    shift = row_max.amax(0)
    total = (row_sum * (row_max - shift).exp()).sum(0)
    odds = total.log() + (shift - positive)
    loss = torch.logaddexp(odds, torch.zeros_like(odds))
    factor = 1 / (total + (positive - shift).exp())
    return loss, positive + loss, -odds.sigmoid(), torch.stack((shift, factor))


def gradient(
    grad: Tensor,
    predicted: Tensor,
    neighbour: Tensor,
    temperature: Tensor,
    weight: Tensor,
    by_neighbour: Tensor | None,
    by_predicted: Tensor | None,
    first: int,
) -> tuple[Tensor, Tensor]:
    """Gradient of a sum of rows' losses to `predicted`; the logits are computed again.

    To the logit of neighbour i and prediction j it is ``weight[j]`` for a positive pair, else the
    sum of its probabilities in the softmax rows that have losses: neighbour i, prediction j, or
    both. All of it times `grad`.

    Args:
        grad: 0-d.
        predicted: [V, n, D].
        neighbour: [V, P, D].
        temperature: 0-d.
        weight: [V, n].
        by_neighbour: [2, V, P], normaliser of the rows that `predicted[v]` are the columns of;
            None: neighbours have no losses.
        by_predicted: [2, V, n], the same of predictions.
        first: as for `row_stats`.

    Returns:
        The gradient, in the dtype of `predicted`; radial [V, n], its part along the predictions:
        ``sum of logit * gradient to the logit``, so that ``-radial.sum() / T`` is that to T.
    """
    grads, radials = [], []
    with torch.autocast(predicted.device.type, enabled=False):
        for view, (rows, unit) in enumerate(_pairs(predicted, neighbour, False)):
            grad_unit = torch.zeros_like(unit)
            done = 0
            for start, block in _blocks(rows, unit):
                logits = rows[block] @ unit.T / temperature
                p = torch.zeros_like(logits)
                if by_neighbour is not None:
                    shift, factor = by_neighbour[:, view, block, None]
                    p += (logits - shift).exp() * factor
                if by_predicted is not None:
                    shift, factor = by_predicted[:, view]
                    p += (logits - shift).exp() * factor
                pairs = _positives(p, start, first, False)
                pairs.copy_(weight[view, done : done + len(pairs)])
                done += len(pairs)
                grad_unit += p.T @ rows[block]
            grad_unit *= grad / temperature
            radials.append((grad_unit * unit).sum(-1))
            grads.append(_normalize_backward(grad_unit, radials[-1], unit, predicted[view]))
    return torch.stack(grads), torch.stack(radials)


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


def _normalize_backward(grad: Tensor, radial: Tensor, unit: Tensor, raw: Tensor) -> Tensor:
    """Gradient of ``raw / max(norm(raw), EPS)``; below EPS the divisor is constant."""
    norm: Tensor = torch.linalg.vector_norm(raw.to(grad.dtype), dim=-1, keepdim=True)
    tangent = grad - (radial[:, None] * (norm >= EPS)) * unit
    return (tangent / norm.clamp_min(EPS)).to(raw.dtype)
