"""Public functions: the NNCLR InfoNCE loss, alone and with its health."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from maect_fast.kernels._common import cpp
from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import check_bool, check_temperature, check_tensors, expect
from maect_fast.kernels._common.collectives import PendingRows, group_rank
from maect_fast.kernels.info_nce import op
from maect_fast.kernels.info_nce.gather import columns_of
from maect_fast.kernels.info_nce.reference import InfoNCEStats

__all__ = ["info_nce", "info_nce_stats"]

# From here on one shift for all rows keeps the exponentials of unit rows in fp32's range.
FIXED_SHIFT_FROM = 0.025


def info_nce(
    predicted: Tensor,
    neighbour: Tensor | PendingRows,
    *,
    temperature: float | Tensor,
    group: dist.ProcessGroup | None = None,
    transposed: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE between predictions and the neighbours of the other view.

    ``L(p, nn) = -mean_i log softmax_j(<nn_i, normalize(p_j)> / T)[i]``. Two views are crossed:
    ``(L(predicted[0], neighbour[1]) + L(predicted[1], neighbour[0])) / 2``, where neighbour[v] was
    found for view v. The logits never exist as a whole.

    With `group`, columns are those of all W ranks, row i of rank r has the label r * n + i, and the
    loss is the mean over the own rows. The gradient is that of the sum of the ranks' losses, all
    weighted as this rank's: averaged over ranks, as DDP does, it is the gradient of the loss over
    the global batch. The backward pass sends nothing.

    Args:
        predicted: [2, n, D] or [n, D] (one direction, nothing crossed), any float dtype, n >= 1;
            normalised inside (eps 1e-12). The only input with a gradient, which has its dtype.
        neighbour: the same shape, unit rows (this is not checked), a constant; or what
            `gather_neighbours` made of it.
        temperature: T > 0; a float or a 0-d tensor without gradient (its value is not checked).
        group: ranks that share their columns; n must be equal on all. None: no communication.
        transposed: rows are predictions and columns neighbours instead.
        backend: "auto" is "triton" on CUDA for D in 16, 32, .. 1024 and "cpp" on the CPU, else
            "reference". Factors of half predictions' products may be rounded to their dtype.

    Returns:
        0-d, fp32 (fp64 for fp64 predictions); at least fp32 inside. It has no second derivative.

    Raises:
        ValueError: shapes or dtypes that do not fit, T <= 0 as a float, unequal n.
        RuntimeError: a backend that is not there, or not for these inputs.

    Source: arXiv 2304.10520 section 3; ml-jku/MAE-CT: losses/nnclr_loss.py.
    """
    return _loss(predicted, neighbour, temperature, group, transposed, False, backend).loss


def info_nce_stats(
    predicted: Tensor,
    neighbour: Tensor | PendingRows,
    *,
    temperature: float | Tensor,
    group: dist.ProcessGroup | None = None,
    transposed: bool = False,
    backend: Backend = "auto",
) -> InfoNCEStats:
    """`info_nce` and the health of its training; arguments and errors are the same."""
    found = _loss(predicted, neighbour, temperature, group, transposed, True, backend)
    accuracy = (found.positive >= found.normaliser[0]).to(found.lse.dtype).mean()
    cosine = (found.positive.mean() * temperature).detach()
    return InfoNCEStats(found.loss, accuracy, cosine, found.lse)


def _loss(
    predicted: Tensor,
    neighbour: Any,
    temperature: float | Tensor,
    group: dist.ProcessGroup | None,
    transposed: bool,
    with_max: bool,
    backend: Backend,
) -> op.Result:
    """Check, gather, call."""
    check_tensors(predicted=predicted)
    shape, local = list(predicted.shape), neighbour
    if isinstance(neighbour, PendingRows):
        views = neighbour.local.transpose(0, 1)
        local = views if len(shape) == 3 else views[0]
    check_tensors(neighbour=local)
    check_bool("transposed", transposed)
    check_backend(
        "info_nce",
        backend,
        triton=lambda: op.triton_obstacle(predicted, local),
        cpp=lambda: cpp.obstacle(predicted, local),
    )
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 2)) or shape != list(local.shape):
        got = f"{shape} and {list(local.shape)}"
        raise ValueError(f"predicted, neighbour: expected both [2, n, D] or both [n, D], got {got}")
    expect(shape[-2] > 0, "predicted", "at least one row", "none")
    for name, x in (("predicted", predicted), ("neighbour", local)):
        expect(x.is_floating_point(), name, "floats", x.dtype)
    return op.loss(
        predicted if len(shape) == 3 else predicted[None],
        columns_of(neighbour, group=group, dtype=predicted.dtype),
        check_temperature(temperature, learnable=False),
        first=group_rank(group) * shape[-2],
        transposed=transposed,
        # Each row a shift of its own.
        online=with_max or isinstance(temperature, Tensor) or temperature < FIXED_SHIFT_FROM,
        group=group,
        backend=backend,
    )
