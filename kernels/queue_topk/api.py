"""Public function: exact nearest-neighbour search in a ring buffer."""

from typing import Any

from torch import Tensor

from maect_fast.kernels._common import cpp
from maect_fast.kernels._common.backend import Backend, check_backend
from maect_fast.kernels._common.checks import check_int, check_int64, check_tensors
from maect_fast.kernels.queue_topk import op, reference
from maect_fast.kernels.queue_topk.reference import Pick, QueueState, TopK

__all__ = ["queue_topk"]


def queue_topk(
    query: Tensor,
    queue: Tensor | QueueState,
    *,
    k: int = 20,
    query_id: Tensor | None = None,
    queue_id: Tensor | None = None,
    queue_label: Tensor | None = None,
    query_label: Tensor | None = None,
    pick: Pick | Tensor | None = None,
    backend: Backend = "auto",
) -> TopK:
    """The k rows of the queue with the largest cosine ``normalize(query) @ queue.T``, exactly.

    Sorted by (score descending, slot ascending). A slot with the query's own id scores exactly -1
    and comes last: it is returned only when fewer than k others exist. NaN scores rank, and return,
    as -inf; slots are always valid. Memory beyond the result's size grows with neither n nor Q.
    No gradient. On CUDA a QueueState `with_shadow` is searched faster.

    Args:
        query: [n, D] or [V, n, D] (views, searched in one pass), any float dtype; normalised inside
            (eps 1e-12). Scores are fp32 dot products, fp64 if query or queue is fp64.
        queue: [Q, D] rows of unit norm (not checked), Q of any size as for a k-NN gallery, or a
            QueueState, which brings ids and labels.
        k: 1 .. Q.
        query_id: int64 [n], shared by the views; -1 has no own slots. Needs ids of the queue.
        queue_id: int64 [Q], with `query_id`; not with a QueueState.
        queue_label: int64 [Q], with `query_label`; not with a QueueState.
        query_label: int64 [n], shared by the views; negative = none, never a hit. Needs `pick`.
        pick: chooses one neighbour per row: a Pick draws it, an int64 tensor of the query's shape
            without D replays ranks (0 = nearest) drawn elsewhere.
        backend: "auto" is "cpp" on the CPU and "triton" on CUDA; "reference" for what they cannot
            take: fp64, on CUDA also k > 200, D > 8192 and a queue whose last stride is not 1.

    Returns:
        TopK: values, indices [.., k]; with `pick` the chosen slots and rows, with labels the hits.

    Raises:
        TypeError: no tensor, no int.
        ValueError: shapes or dtypes that do not fit, k outside 1 .. Q, ids or labels on one side
            only, ranks (on the CPU) outside 0 .. k-1.
        RuntimeError: a backend asked for by name that cannot take these tensors.

    Source: arXiv 2304.10520 section 3; ml-jku/MAE-CT: losses/nnclr_loss.py (find_nn).
    """
    shadow: tuple[Tensor, ...] = ()
    if isinstance(queue, QueueState):
        if queue_id is not None or queue_label is not None:
            raise ValueError("queue_id, queue_label: expected None, as the QueueState brings them")
        queue_id = None if query_id is None else queue.queue_id
        queue_label = None if query_label is None else queue.queue_y
        shadow, queue = queue.shadow or (), queue.queue
    check_tensors(query=query, queue=queue)
    if query.ndim not in (2, 3) or queue.ndim != 2 or query.shape[-1] != queue.shape[1]:
        shapes = f"{list(query.shape)} and {list(queue.shape)}"
        raise ValueError(f"query, queue: expected [n, D] or [V, n, D] and [Q, D], got {shapes}")
    if not (query.is_floating_point() and queue.is_floating_point()):
        raise ValueError(f"query, queue: expected floats, got {query.dtype} and {queue.dtype}")
    check_int("k", k, 1, queue.shape[0])
    rows: Tensor = queue
    check_backend(
        "queue_topk",
        backend,
        triton=lambda: op.triton_obstacle(query, rows, k),
        cpp=lambda: cpp.obstacle(query, rows),
    )
    for key, mine, theirs in (("id", query_id, queue_id), ("label", query_label, queue_label)):
        if (mine is None) != (theirs is None):
            raise ValueError(f"query_{key}, queue_{key}: expected both or neither, got one")
        check_int64(f"query_{key}", mine, query.shape[-2:-1])
        check_int64(f"queue_{key}", theirs, queue.shape[:1])
    if query_label is not None and pick is None:
        raise ValueError("query_label: expected a pick with it, as its choice is what labels judge")
    draw: list[Tensor] = []
    if isinstance(pick, Pick):
        draw = op.pick_arguments(pick, query.device)
    rank = None if isinstance(pick, Pick) else pick
    check_int64("pick", rank, query.shape[:-1])
    tensors = (query_id, queue_id, query_label, queue_label)
    if backend == "reference":
        if isinstance(pick, Pick):
            rank = reference.draw_ranks(pick, query.shape[:-1], k, query.device)
        return reference.queue_topk(query.detach(), queue.detach(), k, *tensors, rank)
    found = op.queue_topk(query.detach(), queue.detach(), k, *tensors, rank, draw, shadow, backend)
    # What was not asked for is an empty tensor: an op cannot return None.
    num_fields = 2 if pick is None else 4 if query_label is None else 5
    fields: list[Any] = [*found[:num_fields], *(None,) * (5 - num_fields), found[5]]
    return TopK(*fields)
