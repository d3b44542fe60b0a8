"""Registration of the search and of the enqueue with torch.library."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from maect_fast.kernels._common import cpp, gpu
from maect_fast.kernels._common.checks import expect
from maect_fast.kernels._common.library import operator
from maect_fast.kernels._common.plan import Plans
from maect_fast.kernels.queue_topk import reference

__all__ = [
    "draw_ranks",
    "enqueue",
    "make_shadow",
    "pick_arguments",
    "queue_topk",
    "search_cpp",
    "search_triton",
    "triton_obstacle",
]

SEARCH, ENQUEUE = Plans(scalars=("seed", "step", "view", "row_number")), Plans()
# Of the Triton kernels; what is larger is for the reference. Sums of so many products of int8, with
# a number in front, are 32-bit integers.
MAX_K, MAX_D = 200, 8192


def triton_obstacle(query: Tensor, queue: Tensor, k: int) -> str | None:
    """Why the Triton kernels cannot search this, or None."""
    if k > MAX_K:
        return f"takes k up to {MAX_K}, got {k}"
    if queue.shape[1] > MAX_D:
        return f"takes rows of up to {MAX_D} features, got {queue.shape[1]}"
    if queue.stride(1) != 1 and queue.shape[1] > 1:
        return f"takes a queue whose last stride is 1, got strides {queue.stride()}"
    return gpu.obstacle(query, queue)


def _choose(query: Tensor, queue: Tensor, k: int) -> str:
    """The backend behind "auto": by device, and the reference where no kernel can."""
    if gpu.is_gpu(query):
        return "reference" if triton_obstacle(query, queue, k) else "triton"
    return "reference" if cpp.obstacle(query, queue) else "cpp"


def _queue_topk_fake(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
    draw: Sequence[Tensor],
    shadow: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    has_pick = rank is not None or len(draw) > 0
    return _allocate(query, queue, k, has_pick=has_pick, has_label=query_label is not None)


@operator("queue_topk", fake=_queue_topk_fake)
def queue_topk(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
    draw: Sequence[Tensor],
    shadow: Sequence[Tensor],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The six fields of TopK; those that were not asked for are empty.

    The pick is given as `rank`, drawn by `draw` (see `pick_arguments`), or not asked for. `shadow`
    has the fields of a Shadow, or nothing.
    """
    ids_and_labels = (query_id, queue_id, query_label, queue_label)
    if gpu.is_gpu(query) and rank is not None:
        reference.check_ranks(rank, k)
        rank = rank.to(query.device)
    scalars = _scalars(draw)
    planned = (query, queue, *ids_and_labels, rank, *shadow), (k, backend), scalars or (None,) * 4
    found = SEARCH.replay(*planned)
    if found is not None:
        values, indices, index, neighbour, hit, again = found
        return values, indices, index, neighbour, hit, again
    if backend == "auto":
        backend = _choose(query, queue, k)
    if backend == "triton":
        launcher = partial(search_triton, query, queue, k, *ids_and_labels, rank, scalars, shadow)
        values, indices, index, neighbour, hit, again = SEARCH.record(launcher, *planned)
        return values, indices, index, neighbour, hit, again
    if draw:
        pick = reference.Pick(*map(torch.as_tensor, scalars))
        rank = draw_ranks(pick, query.shape[:-1], k, query.device)
    if backend == "cpp":
        return search_cpp(query, queue, k, *ids_and_labels, rank)
    result = reference.queue_topk(query, queue, k, *ids_and_labels, rank)
    _, _, index, neighbour, hit, again = _allocate(query, queue, 0, has_pick=False, has_label=False)
    if result.picked_index is not None and result.picked_neighbour is not None:
        index, neighbour = result.picked_index, result.picked_neighbour
    if result.label_hit is not None:
        hit = result.label_hit
    return result.values, result.indices, index, neighbour, hit, again.zero_()


def _scalars(draw: Sequence[Tensor]) -> tuple[Tensor | int, ...]:
    """Seed, step, view and row: ints from the CPU, what lies on a device as it is."""
    if len(draw) == 1:
        return tuple(draw[0].tolist())
    # Numbers of the CPU are passed by value, others by address: nothing waits.
    return tuple(int(x) if x.device.type == "cpu" and x.ndim == 0 else x for x in draw)


def search_triton(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
    draw: Sequence[Tensor | int],
    shadow: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by the Triton kernels; `draw` has numbers or tensors."""
    from maect_fast.kernels.queue_topk import triton_kernel

    if query.stride(-1) != 1:
        query = query.contiguous()
    has_pick = rank is not None or len(draw) > 0
    out = _allocate(query, queue, k, has_pick=has_pick, has_label=query_label is not None)
    if query.numel() == 0:
        return out
    query_id, queue_id, query_label, queue_label, rank = (
        None if x is None else x.contiguous()
        for x in (query_id, queue_id, query_label, queue_label, rank)
    )
    triton_kernel.search(
        query, queue, shadow, k, query_id, queue_id, query_label, queue_label, rank, draw, out
    )
    return out


def make_shadow(queue: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and bounds of a `reference.Shadow`."""
    from maect_fast.kernels.queue_topk import triton_kernel

    return triton_kernel.make_shadow(queue, dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op by the inner loops called `simd`, which change its time and no bit of its result.

    Their names (`torch.ops.maect_fast.queue_topk_simd()`) tell the type in which candidates are
    scored: bf16, int8 (vnni) or else fp32. Empty is the first of them.
    """
    if rank is not None:
        reference.check_ranks(rank, k)
    has_label = query_label is not None
    out = _allocate(query, queue, k, has_pick=rank is not None, has_label=has_label)
    ids_and_labels = (
        x if x is None else x.contiguous()
        for x in (query_id, queue_id, query_label, queue_label, rank)
    )
    torch.ops.maect_fast.queue_topk_cpp(
        query.reshape(-1, query.shape[-1]), queue, k, *ids_and_labels, simd, *out[:5]
    )
    # No certificate that could fail.
    out[5].zero_()
    return out


def _allocate(
    query: Tensor, queue: Tensor, k: int, *, has_pick: bool, has_label: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised results."""
    rows, dim = query.shape[:-1], queue.shape[1]
    dtype = torch.promote_types(torch.promote_types(query.dtype, queue.dtype), torch.float32)
    return (
        query.new_empty((*rows, k), dtype=dtype),
        query.new_empty((*rows, k), dtype=torch.int64),
        query.new_empty(rows if has_pick else (0,), dtype=torch.int64),
        queue.new_empty((*rows, dim) if has_pick else (0,)),
        query.new_empty(rows if has_pick and has_label else (0,), dtype=torch.bool),
        query.new_empty(rows, dtype=torch.bool),
    )


@register_flop_formula(torch.ops.maect_fast.queue_topk)
def _queue_topk_flop(query: Any, queue: Any, *_: Any, out_shape: Any) -> int:
    """From shapes: every row of the queries meets every row of the queue once."""
    return int(2 * math.prod(query) * queue[0])


def pick_arguments(pick: reference.Pick, device: torch.device) -> list[Tensor]:
    """Seed, step, view and row of a Pick, int64: one tensor [4] of the CPU, or one of each.

    Ints stay on the CPU, so that nothing waits for the device.
    """
    if all(isinstance(x, int) for x in pick):
        return [torch.tensor([_wrapped(x) for x in pick], dtype=torch.int64)]  # type: ignore[arg-type]
    for name, x in zip(pick._fields, pick, strict=True):
        expect(isinstance(x, int | Tensor), f"pick.{name}", "an int or a tensor", x, TypeError)
    *scalars, row = (
        x.to(torch.int64) if isinstance(x, Tensor) else torch.tensor(_wrapped(x)) for x in pick
    )
    return [*scalars, row if row.ndim == 0 else row.to(device).contiguous()]


def _wrapped(x: int) -> int:
    """The same 64 bits, signed; a seed may use them all."""
    return x - (1 << 64) if x >= 1 << 63 else x


def draw_ranks(pick: reference.Pick, shape: torch.Size, k: int, device: torch.device) -> Tensor:
    """`reference.draw_ranks`, on the CPU in one call instead of a hundred."""
    if device.type != "cpu" or cpp.load() is not None:
        return reference.draw_ranks(pick, shape, k, device)
    scalars = _scalars(pick_arguments(pick, device))
    seed, step, view, row = (torch.as_tensor(x).cpu() for x in scalars)
    if row.ndim == 0:
        row = torch.arange(shape[-1]) + row
    ranks = row.new_empty(shape)
    torch.ops.maect_fast.draw_ranks_cpp(
        seed, step, view, row, k, ranks.view(math.prod(shape[:-1]), shape[-1])
    )
    return ranks


def _enqueue_fake(*_: Any) -> None:
    return None


@operator(
    "queue_enqueue",
    fake=_enqueue_fake,
    mutates_args=("queue", "queue_y", "queue_id", "queue_ptr", "shadow", "bound"),
)
def enqueue(
    queue: Tensor,
    queue_y: Tensor,
    queue_id: Tensor,
    queue_ptr: Tensor,
    shadow: Tensor | None,
    bound: Tensor | None,
    rows: Tensor,
    sample_id: Tensor | None,
    label: Tensor | None,
) -> None:
    """Normalise rows [B, D] and write them, their ids and labels at the pointer; advance it."""
    buffers = (queue, queue_y, queue_id, queue_ptr)
    if shadow is None and (not gpu.is_gpu(queue) or gpu.obstacle(queue, rows) is not None):
        reference.enqueue(*buffers, rows, sample_id, label)
        return
    planned = ((*buffers, shadow, bound, rows, sample_id, label), ())
    if ENQUEUE.replay(*planned) is None:
        launcher = partial(_launch_enqueue, buffers, shadow, bound, rows, sample_id, label)
        ENQUEUE.record(launcher, *planned)
    # Autograd is to know, as it does of PyTorch's own writes.
    written = (*buffers, shadow, bound)
    counted = [x for x in written if x is not None and not x.is_inference()]
    torch.autograd.graph.increment_version(counted)


def _launch_enqueue(
    buffers: tuple[Tensor, Tensor, Tensor, Tensor],
    shadow: Tensor | None,
    bound: Tensor | None,
    rows: Tensor,
    *small: Tensor | None,
) -> tuple[()]:
    from maect_fast.kernels.queue_topk import triton_queue

    # Rows of any dtype: the kernel widens or narrows them to fp32.
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    sample_id, label = (None if x is None else x.contiguous() for x in small)
    triton_queue.enqueue(*buffers, shadow, bound, rows, sample_id, label)
    return ()
