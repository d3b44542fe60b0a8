"""Public function: the NNCLR InfoNCE loss."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from maect_fast.kernels._common import cpp
from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.collectives import (
    all_gather_rows,
    all_reduce_max,
    all_reduce_sum,
    group_rank,
)
from maect_fast.kernels.info_nce import op, reference

__all__ = ["info_nce"]


def info_nce(
    predicted: Tensor,
    neighbour: Tensor,
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
    loss is the mean over the own rows. The gradient is that of the sum of the ranks' losses:
    averaged over ranks, as DDP does, it is the gradient of the loss over the global batch.

    Args:
        predicted: [2, n, D] or [n, D] (one direction, nothing crossed), any float dtype, n >= 1;
            normalised inside (eps 1e-12). The only input with a gradient, which has its dtype.
        neighbour: the same shape, unit rows (this is not checked), a constant.
        temperature: T > 0; a float or a 0-d tensor without gradient (its value is not checked).
        group: ranks that share their columns; n must be equal on all. None: no communication.
        transposed: rows are predictions and columns neighbours instead.
        backend: "auto" is "cpp" on the CPU, else "reference"; "triton" is not built yet. For bf16
            predictions, "cpp" may round normalised predictions and neighbours to bf16.

    Returns:
        0-d, fp32 (fp64 for fp64 predictions); at least fp32 inside. It has no second derivative.

    Raises:
        ValueError: shapes or dtypes that do not fit, T <= 0 as a float.
        RuntimeError: a backend that is not built, or "cpp" for what is fp64 or not on the CPU.

    Source: arXiv 2304.10520 section 3; ml-jku/MAE-CT: losses/nnclr_loss.py.
    """
    check_backend("info_nce", backend, cpp=lambda: cpp.obstacle(predicted, neighbour))
    shape = predicted.shape
    if shape != neighbour.shape or not (len(shape) == 2 or (len(shape) == 3 and shape[0] == 2)):
        raise ValueError(
            "predicted, neighbour: expected both [2, n, D] or both [n, D], "
            f"got {list(shape)} and {list(neighbour.shape)}"
        )
    if shape[-2] == 0:
        raise ValueError("predicted: expected at least one row, got none")
    if not (predicted.is_floating_point() and neighbour.is_floating_point()):
        got = f"{predicted.dtype} and {neighbour.dtype}"
        raise ValueError(f"predicted, neighbour: expected floats, got {got}")
    divisor = _check_temperature(temperature)

    views = predicted.view(-1, *shape[-2:])
    constant = neighbour.detach().view(-1, *shape[-2:])
    num_rows = shape[-2]
    first = group_rank(group) * num_rows
    # The constants travel and every rank keeps its predictions, so the backward sends only sums.
    constant = all_gather_rows(constant.transpose(0, 1), group).transpose(0, 1)
    stats = reference.row_stats if backend == "reference" else op.row_stats
    row_max, row_sum, positive = stats(views, constant, divisor, first, transposed)
    row_max = row_max.detach()
    if group is not None and not transposed:
        shift = all_reduce_max(row_max, group)
        row_sum = all_reduce_sum(row_sum * (row_max - shift).exp(), group)
        local = slice(first, first + num_rows)
        row_max, row_sum = shift[:, local], row_sum[:, local]
    return (row_sum.log() + (row_max - positive)).mean()


def _check_temperature(temperature: float | Tensor) -> Tensor:
    """The temperature as a 0-d tensor."""
    if isinstance(temperature, Tensor):
        if temperature.ndim != 0 or temperature.requires_grad:
            raise ValueError(
                "temperature: expected a float or a 0-d tensor without gradient, "
                f"got shape {list(temperature.shape)}, requires_grad {temperature.requires_grad}"
            )
        return temperature
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    # On the CPU whatever the device of the inputs: kernels take it as a number, nothing is copied.
    return torch.tensor(temperature, dtype=torch.float64)
