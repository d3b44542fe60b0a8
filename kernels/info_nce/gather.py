"""Public function: the exchange of neighbours between ranks, which may start before the loss."""

import torch
import torch.distributed as dist
from torch import Tensor

from maect_fast.kernels._common.collectives import (
    PendingRows,
    check_equal_rows,
    start_all_gather_packed,
)

__all__ = ["columns_of", "gather_neighbours", "gather_with_neighbours"]


def gather_neighbours(
    neighbour: Tensor, *, group: dist.ProcessGroup | None, dtype: torch.dtype
) -> PendingRows:
    """Start to send the neighbours of `info_nce`, so that they travel while the predictor runs.

    Args:
        neighbour: [2, n, D] or [n, D].
        group: as for `info_nce`.
        dtype: that of the predictions; if it is a half type, neighbours travel in it.

    Returns:
        What `info_nce` takes in their place, with the same `group`.
    """
    return gather_with_neighbours(neighbour, group=group, dtype=dtype)[0]


def gather_with_neighbours(
    neighbour: Tensor, *others: Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype
) -> list[PendingRows]:
    """`gather_neighbours` with all else of an update in the same message.

    Args:
        neighbour: [2, n, D] or [n, D].
        others: [n, ...] each, of any dtypes: what enters the queue.
        group: as for `info_nce`.
        dtype: as for `gather_neighbours`.

    Returns:
        The neighbours, then the others, in order.
    """
    rows = neighbour.detach().view(-1, *neighbour.shape[-2:]).transpose(0, 1)
    check_equal_rows("neighbour", rows, group)
    is_half = group is not None and dtype.itemsize == 2
    return start_all_gather_packed([rows.to(dtype) if is_half else rows, *others], group)


def columns_of(
    neighbour: Tensor | PendingRows, *, group: dist.ProcessGroup | None, dtype: torch.dtype
) -> Tensor:
    """The neighbours of all ranks, [V, W * n, D]; arguments as of `gather_neighbours`.

    Constants travel and every rank keeps its predictions, so that the backward sends nothing.
    """
    if isinstance(neighbour, Tensor):
        if group is None:
            return neighbour.detach().view(-1, *neighbour.shape[-2:])
        neighbour = gather_neighbours(neighbour, group=group, dtype=dtype)
    return neighbour.wait().transpose(0, 1)
