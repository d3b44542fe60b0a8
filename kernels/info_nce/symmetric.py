"""Public function: the symmetric loss of two sets of embeddings, CLIP's and NT-Xent."""

import torch
import torch.distributed as dist
from torch import Tensor

from maect_fast.kernels._common import cpp
from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import check_bool, check_temperature, check_tensors, expect
from maect_fast.kernels._common.collectives import check_equal_rows, group_rank
from maect_fast.kernels.info_nce import op

__all__ = ["symmetric_info_nce"]


def symmetric_info_nce(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor,
    same_view: bool = False,
    group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Contrasts two sets of embeddings, row i with row i; both get a gradient.

    The mean over all rows of both sets of ``-log softmax(<row, others> / T)[partner]``, rows
    normalised. The others are those of the other set: CLIP's loss, T = 1 / logit_scale. With
    `same_view` also those of the own set, but the row itself: NT-Xent, SimCLR's loss of two views.

    With `group`, the rows of all ranks are others, the loss is the mean over the own rows, and the
    gradient that of the sum of the ranks' losses, all weighted as this rank's: averaged over ranks,
    as DDP does, that of the loss over the global batch. The backward pass sends nothing.

    Args:
        first: [n, D], any float dtype, n >= 1; normalised inside (eps 1e-12).
        second: [n, D], the same dtype.
        temperature: T > 0; a float, or a 0-d tensor (its value is not checked), which may require a
            gradient.
        same_view: whether rows of the own set are negatives.
        group: ranks that share their rows; n must be equal on all. None: no communication.
        backend: as for `info_nce`.

    Returns:
        0-d, fp32 (fp64 for fp64 rows); at least fp32 inside. It has no second derivative.

    Raises:
        ValueError: shapes or dtypes that do not fit, T <= 0 as a float, unequal n.
        RuntimeError: a backend that is not there, or not for these inputs.

    Source: arXiv 2103.00020 figure 3 (CLIP); arXiv 2002.05709 section 2.1 (NT-Xent).
    """
    check_tensors(first=first, second=second)
    check_bool("same_view", same_view)
    check_backend(
        "symmetric_info_nce",
        backend,
        triton=lambda: op.triton_obstacle(first, second),
        cpp=lambda: cpp.obstacle(first, second),
    )
    if first.ndim != 2 or first.shape != second.shape:
        got = f"{list(first.shape)} and {list(second.shape)}"
        raise ValueError(f"first, second: expected both [n, D], got {got}")
    expect(len(first) > 0, "first", "at least one row", "none")
    if not first.is_floating_point() or first.dtype != second.dtype:
        got = f"{first.dtype} and {second.dtype}"
        raise ValueError(f"first, second: expected floats of one dtype, got {got}")
    divisor = check_temperature(temperature, learnable=True)
    check_equal_rows("first", first, group)
    return op.symmetric_loss(
        torch.stack((first, second)),
        divisor,
        same_view=same_view,
        first=group_rank(group) * len(first),
        group=group,
        backend=backend,
    )
