"""Definition of the neighbour search and of the ring buffer's update, in plain PyTorch.

Legend: V views, n rows per view, B = V * n rows searched, Q queue entries (slots), D features,
K neighbours.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from maect_fast.kernels._common.philox import MASK32, philox4x32

__all__ = [
    "Pick",
    "QueueState",
    "Shadow",
    "TopK",
    "check_ranks",
    "draw_ranks",
    "enqueue",
    "queue_topk",
]

EPS = 1e-12
# Rows and queue entries that meet at a time: 8 MiB of fp32 scores, whatever n and Q.
BLOCK_B = 128
BLOCK_Q = 16384
# Slots at a product's ragged edge are summed in another order than those before, so that equal rows
# of the queue would score differently. With MKL, on one and two threads, 16 are not always enough.
WHOLE_TILES = 64

Scalar: TypeAlias = Tensor | int


class Pick(NamedTuple):
    """Draws one of the K sorted neighbours per row: rank r in 0 .. K-1, 0 is the nearest.

    ``x = Philox4x32-10(key=(seed, seed >> 32), counter=(row, view, step, step >> 32))[0]`` and
    ``r = (x * K) >> 32``. The draw depends on nothing else, so neither the device nor the number of
    ranks changes it. ints or 0-d int64 tensors; inside a CUDA graph `step` must be a tensor on the
    device, or every replay repeats one draw.
    """

    seed: Scalar
    """64 bits."""
    step: Scalar
    """Number of the update, 64 bits."""
    view: Scalar
    """Number of the query's first view."""
    row: Scalar = 0
    """Number of the query's first row in the global batch (rank * n), or all numbers, int64 [n]."""


class Shadow(NamedTuple):
    """A rounded copy of the queue, in which a GPU looks for candidates; it changes no result.

    Valid for a queue that only `enqueue` has changed since.
    """

    rows: Tensor
    """fp16 or int8, padded with zeros to whole tiles."""
    bound: Tensor
    """[tiles, 3] fp32: largest distance of a row to its rounding, largest norm, scale."""


class QueueState(NamedTuple):
    """The ring buffer; `enqueue` writes into these tensors."""

    queue: Tensor
    """[Q, D] fp32 unit rows."""
    queue_y: Tensor
    """[Q] int64 labels, -1 = none."""
    queue_id: Tensor
    """[Q] int64 sample ids, -1 = none."""
    queue_ptr: Tensor
    """[1] int64, the next slot to be written."""
    shadow: Shadow | None = None
    """Made by `with_shadow`, kept by `enqueue`. Without it, a GPU makes one in every search."""


class TopK(NamedTuple):
    """Result of a search; [..] is the query's shape without D."""

    values: Tensor
    """[.., K] cosines, fp32 (fp64 if the query or the queue is), descending, own slots last."""
    indices: Tensor
    """[.., K] int64 slots, ascending among equal values."""
    picked_index: Tensor | None = None
    """[..] int64, with `pick`: the drawn slot."""
    picked_neighbour: Tensor | None = None
    """[.., D] in the queue's dtype, with `pick`: a copy of the drawn slot's row."""
    label_hit: Tensor | None = None
    """[..] bool, with `pick` and labels: the drawn slot has the query's label, which is >= 0."""
    searched_again: Tensor | None = None
    """[..] bool: rows of which rounded scores could not tell the first K, so that they took longer.

    Never on the CPU, and not told by the reference.
    """


def draw_ranks(pick: Pick, shape: torch.Size, k: int, device: torch.device) -> Tensor:
    """The ranks of `shape` ([n] or [V, n]) that `pick` draws among K."""
    row, view = pick.row, pick.view
    if not isinstance(row, Tensor) or row.ndim == 0:
        row = torch.arange(shape[-1], device=device) + row
    if len(shape) == 2:
        view = torch.arange(shape[0], device=device)[:, None] + view
    counter = (row.to(device), view, pick.step & MASK32, pick.step >> 32)
    word, *_ = philox4x32((pick.seed & MASK32, pick.seed >> 32), counter)
    return word * k >> 32


def check_ranks(rank: Tensor, k: int) -> None:
    """Refuse ranks outside 0 .. K-1 on the CPU; elsewhere looking would wait for the device."""
    if rank.device.type == "cpu" and bool(((rank < 0) | (rank >= k)).any()):
        raise ValueError(f"pick: expected ranks in 0 .. {k - 1}, got {rank.min()} .. {rank.max()}")


@torch.no_grad()
def queue_topk(
    query: Tensor,
    queue: Tensor,
    k: int,
    query_id: Tensor | None,
    queue_id: Tensor | None,
    query_label: Tensor | None,
    queue_label: Tensor | None,
    rank: Tensor | None,
) -> TopK:
    """Search [.., n, D] in [Q, D]; ids and labels of the query are [n], `rank` is [.., n] or None.

    Raises:
        ValueError: a rank is outside 0 .. K-1 (on the CPU).
    """
    *batch, num_rows, dim = query.shape
    rows = query.reshape(-1, dim)
    dtype = torch.promote_types(torch.promote_types(query.dtype, queue.dtype), torch.float32)
    row_id = None if query_id is None else query_id.expand(*batch, num_rows).reshape(-1)
    values = torch.empty((len(rows), k), dtype=dtype, device=query.device)
    indices = torch.empty((len(rows), k), dtype=torch.int64, device=query.device)
    # Autocast would round the scores to half precision.
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, len(rows), BLOCK_B):
            block = slice(start, start + BLOCK_B)
            unit = normalize(rows[block].to(dtype), dim=-1, eps=EPS)
            block_id = None if row_id is None else row_id[block]
            values[block], indices[block] = _search(unit, queue, k, block_id, queue_id)
    values = values.view(*batch, num_rows, k)
    indices = indices.view(*batch, num_rows, k)
    never = torch.zeros((*batch, num_rows), dtype=torch.bool, device=query.device)
    if rank is None:
        return TopK(values, indices, searched_again=never)
    check_ranks(rank, k)
    chosen = rank.to(query.device).clamp(0, k - 1)
    picked = indices.gather(-1, chosen[..., None]).squeeze(-1)
    hit = None
    if query_label is not None and queue_label is not None:
        hit = (queue_label[picked] == query_label) & (query_label >= 0)
    return TopK(values, indices, picked, queue[picked], hit, never)


def _search(
    unit: Tensor, queue: Tensor, k: int, row_id: Tensor | None, queue_id: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and slots [rows, K] of unit rows, streaming the queue."""
    lowest = torch.finfo(unit.dtype).min
    values = unit.new_empty((len(unit), 0))
    slots = torch.empty((len(unit), 0), dtype=torch.int64, device=unit.device)
    for start in range(0, len(queue), BLOCK_Q):
        block = slice(start, start + BLOCK_Q)
        score = _scores(unit, queue[block].to(unit.dtype))  # [BLOCK_B, BLOCK_Q] fp32
        # NaN and -inf rank below every score, own slots (-inf from here on) below these.
        score.nan_to_num_(nan=lowest, posinf=torch.inf, neginf=lowest)
        if row_id is not None and queue_id is not None:
            own = row_id[:, None] == queue_id[block]
            score.masked_fill_(own & (row_id[:, None] != -1), -torch.inf)
        block_values, block_slots = _block_topk(score, min(k, score.shape[1]))
        # Slots ascend within equal values of both parts, and a stable sort keeps them so.
        values, order = torch.cat((values, block_values), 1).sort(
            stable=True, dim=1, descending=True
        )
        slots = torch.cat((slots, block_slots + start), 1).gather(1, order)
        values, slots = values[:, :k], slots[:, :k]
    own, unordered = values == -torch.inf, values == lowest
    return values.masked_fill(own, -1.0).masked_fill(unordered, -torch.inf), slots


def _scores(unit: Tensor, rows: Tensor) -> Tensor:
    """Products of unit rows with the queue's, equal for equal rows of it."""
    num_slots = len(rows)
    if num_slots % WHOLE_TILES:
        rows = pad(rows, (0, 0, 0, -num_slots % WHOLE_TILES))
    return (unit @ rows.T)[:, :num_slots]


def _block_topk(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores of each row, lower slots first among equals, listed in slot order."""
    num_slots = score.shape[1]
    # Among scores equal to the k-th, torch.topk chooses freely; the next one shows where it could.
    values, slots = score.topk(min(k + 1, num_slots))
    slots = slots[:, :k].contiguous()
    if k < num_slots:
        ambiguous = values[:, k] == values[:, k - 1]
        # Elsewhere than on the CPU, counting these rows would wait for the device: redo all.
        if score.device.type != "cpu":
            slots = _lowest_slots(score, values[:, k - 1], k)
        elif bool(ambiguous.any()):
            slots[ambiguous] = _lowest_slots(score[ambiguous], values[ambiguous, k - 1], k)
    slots = slots.sort(1).values
    return score.gather(1, slots), slots


def _lowest_slots(score: Tensor, threshold: Tensor, k: int) -> Tensor:
    """All slots scoring above the row's threshold and, up to k, the lowest ones that equal it."""
    num_slots = score.shape[1]
    place = torch.arange(num_slots, 0, -1, dtype=torch.int32, device=score.device)
    equal = torch.where(score == threshold[:, None], place, 0)
    return torch.where(score > threshold[:, None], place + num_slots, equal).topk(k).indices


@torch.no_grad()
def enqueue(
    queue: Tensor,
    queue_y: Tensor,
    queue_id: Tensor,
    queue_ptr: Tensor,
    rows: Tensor,
    sample_id: Tensor | None,
    label: Tensor | None,
) -> None:
    """Write normalize(rows[i]) to slot (ptr + i) mod Q, then advance the pointer by B."""
    num_slots, num_rows = len(queue), len(rows)
    # Of more than Q rows only the last Q survive; skipping the others leaves one writer per slot.
    skipped = max(0, num_rows - num_slots)
    slots = (queue_ptr + torch.arange(skipped, num_rows, device=queue.device)) % num_slots
    dtype = torch.promote_types(torch.promote_types(rows.dtype, queue.dtype), torch.float32)
    unit = normalize(rows[skipped:].to(dtype), dim=-1, eps=EPS)
    queue.index_copy_(0, slots, unit.to(queue.dtype))
    for buffer, entries in ((queue_id, sample_id), (queue_y, label)):
        if entries is None:
            buffer.index_fill_(0, slots, -1)
        else:
            buffer.index_copy_(0, slots, entries[skipped:])
    queue_ptr.copy_((queue_ptr + num_rows) % num_slots)
