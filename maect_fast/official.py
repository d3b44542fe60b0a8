"""The call signatures of the authors' program, for who swaps an import.

``from utils.nnclr_util import find_nn`` and ``from losses.nnclr_loss import nnclr_loss_fn`` become
``from maect_fast.official import find_nn, nnclr_loss_fn``.

Source: ml-jku/MAE-CT: utils/nnclr_util.py, losses/nnclr_loss.py.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from maect_fast.kernels import info_nce, queue_topk

__all__ = ["find_nn", "nnclr_loss_fn"]


def find_nn(
    projected: Tensor, ids: Tensor, queue: Tensor, queue_ids: Tensor, topk: int = 0
) -> tuple[Tensor, Tensor]:
    """The nearest entry of the queue to each row, or one drawn from the `topk` nearest.

    Entries of the row's own id score -1. Scores are fp32, where the authors' have autocast's dtype.
    The draw is the authors': ``torch.randint`` of torch's CPU generator, once per call.

    Args:
        projected: [n, D], of any norm, without gradient.
        ids: int64 [n]; -1 has no own entries.
        queue: [Q, D] unit rows.
        queue_ids: int64 [Q].
        topk: 0 takes the nearest.

    Returns:
        Indices int64 [n] and the rows [n, D] in the queue's dtype.

    Source: ml-jku/MAE-CT: utils/nnclr_util.py; models/contrastive_heads/base (topk).
    """
    n, k = len(projected), max(topk, 1)
    rank = torch.randint(size=(n,), high=k) if topk else torch.zeros(n, dtype=torch.int64)
    found = queue_topk(projected, queue, k=k, query_id=ids, queue_id=queue_ids, pick=rank)
    assert found.picked_index is not None
    return found.picked_index, queue[found.picked_index]


def nnclr_loss_fn(
    predicted: Tensor, nn: Tensor, temperature: float, transposed: bool = False
) -> Tensor:
    """InfoNCE of predictions and neighbours, over the rows of all ranks of the default group.

    Args:
        predicted: [n, D], of any norm; gets the gradient.
        nn: [n, D] unit rows, constants.
        temperature: divisor of the cosines.
        transposed: softmax rows are predictions instead of neighbours.

    Returns:
        0-d; see `info_nce`.

    Source: ml-jku/MAE-CT: losses/nnclr_loss.py.
    """
    group = dist.group.WORLD if dist.is_initialized() else None
    return info_nce(predicted, nn, temperature=temperature, transposed=transposed, group=group)
