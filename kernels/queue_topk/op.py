"""Registration of the search, of its draws and of the enqueue with torch.library."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import cpp
from maect_fast.kernels.queue_topk import reference

__all__ = ["draw_ranks", "enqueue", "queue_topk", "search_cpp"]


def _queue_topk(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five fields of TopK; those that were not asked for are empty."""
    result = reference.queue_topk(
        query, queue, k, query_id, queue_id, query_label, queue_label, rank
    )
    _, _, index, neighbour, hit = _allocate(query, queue, 0, None, None)
    if result.picked_index is not None and result.picked_neighbour is not None:
        index, neighbour = result.picked_index, result.picked_neighbour
    if result.label_hit is not None:
        hit = result.label_hit
    return result.values, result.indices, index, neighbour, hit


queue_topk = torch.library.custom_op("maect_fast::queue_topk", _queue_topk, mutates_args=())


@queue_topk.register_kernel("cpu")
def _(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (query, queue, k, query_id, queue_id, query_label, queue_label, rank)
    if cpp.obstacle(query, queue) is None:
        return search_cpp(*arguments)
    return _queue_topk(*arguments)


def search_cpp(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
    simd: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by the inner loops called `simd`, which change its time and no bit of its result.

    Their names (`torch.ops.maect_fast.queue_topk_simd()`) tell the type in which candidates are
    scored: bf16, int8 (vnni) or else fp32. Empty is the first of them.
    """
    if rank is not None:
        reference.check_ranks(rank, k)
    out = _allocate(query, queue, k, query_label, rank)
    ids_and_labels = (
        x if x is None else x.contiguous()
        for x in (query_id, queue_id, query_label, queue_label, rank)
    )
    torch.ops.maect_fast.queue_topk_cpp(
        query.reshape(-1, query.shape[-1]), queue, k, *ids_and_labels, simd, *out
    )
    return out


@queue_topk.register_fake
def _(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _allocate(query, queue, k, query_label, rank)


def _allocate(
    query: Tensor, queue: Tensor, k: int, query_label: Tensor | None, rank: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results."""
    rows, dim = query.shape[:-1], queue.shape[1]
    dtype = torch.promote_types(torch.promote_types(query.dtype, queue.dtype), torch.float32)
    picks = rank is not None
    return (
        query.new_empty((*rows, k), dtype=dtype),
        query.new_empty((*rows, k), dtype=torch.int64),
        query.new_empty(rows if picks else (0,), dtype=torch.int64),
        queue.new_empty((*rows, dim) if picks else (0,)),
        query.new_empty(rows if picks and query_label is not None else (0,), dtype=torch.bool),
    )


@register_flop_formula(torch.ops.maect_fast.queue_topk)
def _queue_topk_flop(query: Any, queue: Any, *_: Any, out_shape: Any) -> int:
    """From shapes: every row of the queries meets every row of the queue once."""
    return int(2 * math.prod(query) * queue[0])


def draw_ranks(pick: reference.Pick, shape: torch.Size, k: int, device: torch.device) -> Tensor:
    """`reference.draw_ranks`, on the CPU in one call instead of a hundred."""
    if device.type != "cpu":
        return reference.draw_ranks(pick, shape, k, device)
    row = torch.as_tensor(pick.row)
    row = torch.arange(shape[-1]) + row if row.ndim == 0 else row.contiguous()
    scalars = (_as_int64(x) for x in (pick.seed, pick.step, pick.view))
    ranks: Tensor = _draw_ranks(*scalars, row, k, shape[0] if len(shape) == 2 else 1)
    return ranks.view(shape)


def _as_int64(x: reference.Scalar) -> Tensor:
    """The same 64 bits; a seed may use them all."""
    if isinstance(x, int) and x >= 1 << 63:
        x -= 1 << 64
    return torch.as_tensor(x, dtype=torch.int64, device="cpu")


@torch.library.custom_op("maect_fast::draw_ranks", mutates_args=(), device_types="cpu")
def _draw_ranks(
    seed: Tensor, step: Tensor, view: Tensor, row: Tensor, k: int, num_views: int
) -> Tensor:
    if cpp.load() is not None:
        pick = reference.Pick(seed, step, view, row)
        return reference.draw_ranks(pick, torch.Size((num_views, len(row))), k, row.device)
    ranks = row.new_empty((num_views, len(row)))
    torch.ops.maect_fast.draw_ranks_cpp(seed, step, view, row, k, ranks)
    return ranks


@_draw_ranks.register_fake
def _(seed: Tensor, step: Tensor, view: Tensor, row: Tensor, k: int, num_views: int) -> Tensor:
    return row.new_empty((num_views, len(row)))


@torch.library.custom_op(
    "maect_fast::queue_enqueue", mutates_args=("queue", "queue_y", "queue_id", "queue_ptr")
)
def enqueue(
    queue: Tensor,
    queue_y: Tensor,
    queue_id: Tensor,
    queue_ptr: Tensor,
    rows: Tensor,
    sample_id: Tensor | None,
    label: Tensor | None,
) -> None:
    """Normalise rows [B, D] and write them, their ids and labels at the pointer; advance it."""
    reference.enqueue(queue, queue_y, queue_id, queue_ptr, rows, sample_id, label)


@enqueue.register_fake
def _(
    queue: Tensor,
    queue_y: Tensor,
    queue_id: Tensor,
    queue_ptr: Tensor,
    rows: Tensor,
    sample_id: Tensor | None,
    label: Tensor | None,
) -> None:
    return None
