"""Public functions: the ring buffer's update, and its rounded copy."""

import torch
from torch import Tensor

from maect_fast.kernels._common.checks import check_int64, check_tensors
from maect_fast.kernels.queue_topk import op
from maect_fast.kernels.queue_topk.reference import QueueState, Shadow

__all__ = ["enqueue", "with_shadow"]


def enqueue(
    state: QueueState, rows: Tensor, *, sample_id: Tensor | None = None, label: Tensor | None = None
) -> None:
    """Write ``normalize(rows[i])``, its id and label to slot ``(ptr + i) mod Q``; advance ptr by B.

    In place, without waiting for the device. Of B > Q rows the last Q stay. NaN rows are stored as
    they come (a search ranks them last), zero rows stay zero.

    Args:
        state: the ring buffer.
        rows: [B, D], any float dtype; normalised in at least fp32 (eps 1e-12).
        sample_id: int64 [B]; None writes -1, and so with `label`.
        label: int64 [B].

    Raises:
        ValueError: shapes or dtypes that do not fit.

    Source: ml-jku/MAE-CT: models/contrastive_heads/base/contrastive_head_base.py.
    """
    check_tensors(rows=rows)
    if rows.ndim != 2 or rows.shape[1] != state.queue.shape[1] or not rows.is_floating_point():
        expected = f"floats [B, {state.queue.shape[1]}]"
        raise ValueError(f"rows: expected {expected}, got {rows.dtype} {list(rows.shape)}")
    check_int64("sample_id", sample_id, rows.shape[:1])
    check_int64("label", label, rows.shape[:1])
    op.enqueue(*state[:4], *(state.shadow or (None, None)), rows.detach(), sample_id, label)


def with_shadow(state: QueueState, *, dtype: torch.dtype = torch.float16) -> QueueState:
    """The same buffers and, where Triton kernels search, a rounded copy kept up by `enqueue`.

    It makes searches faster and changes no result. After the queue has changed by other means than
    `enqueue`, make a new one.

    Args:
        state: with an fp32 queue.
        dtype: torch.float16, or torch.int8: faster products, but more candidates.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float16, torch.int8):
        raise ValueError(f"dtype: expected torch.float16 or torch.int8, got {dtype}")
    if op.triton_obstacle(state.queue, state.queue, 1) is not None:
        return state
    return state._replace(shadow=Shadow(*op.make_shadow(state.queue, dtype)))
