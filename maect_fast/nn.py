"""Module faces of the ops: they hold hyper-parameters and buffers and call the functions."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maect_fast.attention import FusedAttention, FusedMultiheadAttention
from maect_fast.attention_maps import attention_maps
from maect_fast.clip_loss import ClipLoss
from maect_fast.fuse import fuse, unfuse, why_not
from maect_fast.kernels import (
    Pick,
    QueueState,
    Shadow,
    TopK,
    enqueue,
    gather_with_neighbours,
    info_nce,
    queue_topk,
    with_shadow,
)
from maect_fast.kernels._common.checks import (
    check_int,
    check_int64,
    check_number,
    check_tensors,
    expect,
)
from maect_fast.kernels._common.collectives import group_rank
from maect_fast.profiling import profile_range

__all__ = [
    "ClipLoss",
    "FeatureQueue",
    "FusedAttention",
    "FusedMultiheadAttention",
    "NNCLRLoss",
    "NNCLROutput",
    "attention_maps",
    "fuse",
    "unfuse",
    "why_not",
]


class FeatureQueue(nn.Module):
    """A ring buffer of unit feature vectors with their labels and sample ids, and the search in it.

    Starts with random directions without label and id, which take part in searches. The buffers
    have the names of the official checkpoints: `queue` [Q, D] fp32, `queue_y` and `queue_id` [Q]
    int64 (-1 = none), `queue_ptr` [1] int64.

    Args:
        size: Q, the number of entries.
        dim: D, the length of a vector.
        shadow: on a GPU, the type of the rounded copy in which candidates are looked for:
            torch.float16, or torch.int8 for faster products; no result depends on it.
        generator: draws the initial directions; None is torch's default generator.

    Source: ml-jku/MAE-CT: models/contrastive_heads/base/contrastive_head_base.py.
    """

    queue: Tensor
    queue_y: Tensor
    queue_id: Tensor
    queue_ptr: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        shadow: torch.dtype = torch.float16,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_int("size", size, 1)
        check_int("dim", dim, 1)
        if shadow not in (torch.float16, torch.int8):
            raise ValueError(f"shadow: expected torch.float16 or torch.int8, got {shadow}")
        rows = torch.randn(size, dim, generator=generator, dtype=torch.float32)
        self.register_buffer("queue", nn.functional.normalize(rows, dim=-1))
        self.register_buffer("queue_y", torch.full((size,), -1))
        self.register_buffer("queue_id", torch.full((size,), -1))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.shadow_dtype = shadow
        self._shadow: Shadow | None = None
        self.register_load_state_dict_post_hook(_renew_shadow)  # type: ignore[no-untyped-call]

    @property
    def state(self) -> QueueState:
        """The buffers, as the ops take them."""
        return QueueState(self.queue, self.queue_y, self.queue_id, self.queue_ptr, self._shadow)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the buffers; a conversion of the whole model to halves leaves the rows as they are.

        Half-precision rows would be rounded anew with every update, and the shadow holds rounded
        ones already.
        """
        rows = self.queue
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.queue.dtype.itemsize < torch.float32.itemsize:
            self.queue = rows.to(self.queue.device)
        _renew_shadow(self)
        return self

    def search(
        self,
        query: Tensor,
        *,
        k: int,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
        pick: Pick | Tensor | None = None,
    ) -> TopK:
        """The k nearest entries to each row of query [n, D] or [V, n, D]; see `queue_topk`.

        Args:
            query: rows of any norm.
            k: number of neighbours.
            sample_id: int64 [n]; entries with the row's own id are excluded.
            label: int64 [n]; reports whether the picked entry has the row's label.
            pick: chooses one of the k.
        """
        check_tensors(query=query)
        is_rows = query.ndim in (2, 3) and query.shape[-1] == self.queue.shape[1]
        if not is_rows or not query.is_floating_point():
            D = self.queue.shape[1]
            got = f"{query.dtype} {list(query.shape)}"
            raise ValueError(f"query: expected floats [n, {D}] or [V, n, {D}], got {got}")
        check_int64("sample_id", sample_id, query.shape[-2:-1])
        check_int64("label", label, query.shape[-2:-1])
        expect(label is None or pick is not None, "label", "a pick with it", "none")
        return queue_topk(query, self.state, k=k, query_id=sample_id, query_label=label, pick=pick)

    @torch.no_grad()
    def enqueue(
        self, rows: Tensor, *, sample_id: Tensor | None = None, label: Tensor | None = None
    ) -> None:
        """Overwrite the oldest entries with rows [B, D], normalised; B may be any number.

        Args:
            rows: vectors of any norm.
            sample_id: int64 [B], None = none.
            label: int64 [B], None = none.
        """
        enqueue(self.state, rows, sample_id=sample_id, label=label)


def _renew_shadow(queue: FeatureQueue, _: object = None) -> None:
    """Round the queue anew, after it was moved or loaded."""
    # `load_state_dict(assign=True)` takes whatever dtype it is given.
    queue.queue = queue.queue.to(torch.promote_types(queue.queue.dtype, torch.float32))
    queue._shadow = None
    if _is_on_gpu(queue.queue):
        queue._shadow = with_shadow(queue.state, dtype=queue.shadow_dtype).shadow


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class NNCLROutput(NamedTuple):
    """Result of `NNCLRLoss`, 0-d tensors on the device."""

    loss: Tensor
    """Mean over the rows of this rank and both directions."""
    nn_accuracy: Tensor
    """Share of view 0's picked neighbours with the row's label, among pairs where both have one.

    Rows of this rank; 0 if there is no such pair. A health signal, no part of the loss.
    """
    searched_again: Tensor
    """Share of rows that a GPU had to search again: of time, not of results; 0 on the CPU.

    Near 0 as long as features differ; own copies in a queue larger than the data set raise it, too.
    """


class NNCLRLoss(nn.Module):
    """NNCLR's loss with a neighbour drawn from the k nearest, and its queue.

    One search for both views, the loss of each view's predictions against the other view's
    neighbours, then, in training mode only, view 0 enters the queue: of all ranks, in rank order,
    so that every rank holds the same queue. Ranks exchange neighbours and what enters the queue in
    one message, and the sums of the loss in another. Nothing waits for the device.

    Args:
        queue_size: entries of the queue.
        dim: D of projections and predictions.
        topk: the neighbour is drawn uniformly from so many; 1 takes the nearest.
        temperature: divisor of the cosines.
        transposed: softmax rows are predictions instead of neighbours.
        seed: of the draws and of the queue's initial rows.
        group: ranks that share a batch, which is split evenly; None is one process.

    Source: arXiv 2304.10520 section 3; ml-jku/MAE-CT: losses/nnclr_loss.py.
    """

    def __init__(
        self,
        *,
        queue_size: int,
        dim: int,
        topk: int,
        temperature: float,
        transposed: bool = False,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        check_int("queue_size", queue_size, 1)
        check_int("dim", dim, 1)
        check_int("topk", topk, 1, queue_size)
        check_number("temperature", temperature, 0.0)
        check_int("seed", seed, 0)
        self.topk = topk
        self.temperature = temperature
        self.transposed = transposed
        self.seed = seed
        self.group = group
        self.queue = FeatureQueue(queue_size, dim, generator=torch.Generator().manual_seed(seed))

    def forward(
        self,
        projected: Tensor,
        predicted: Tensor,
        *,
        step: int | Tensor,
        sample_id: Tensor | None = None,
        label: Tensor | None = None,
    ) -> NNCLROutput:
        """Loss of one batch; the gradient goes to `predicted`.

        Args:
            projected: [2, n, D], what is searched and enqueued; normalised inside, no gradient.
            predicted: [2, n, D]; normalised inside.
            step: number of the update, which keys the draws; an int or a 0-d int64 tensor.
            sample_id: int64 [n]; a sample is not its own neighbour. -1 = none.
            label: int64 [n], only for `nn_accuracy`; negative = none.
        """
        self._check(projected, predicted, step, sample_id, label)
        first_row = group_rank(self.group) * projected.shape[1]
        with profile_range("search"):
            found = self.queue.search(
                projected,
                k=self.topk,
                sample_id=sample_id,
                label=label,
                pick=Pick(self.seed, step, view=0, row=first_row),
            )
        assert found.picked_index is not None
        assert found.picked_neighbour is not None
        assert found.searched_again is not None
        columns = {"rows": projected[0], "sample_id": sample_id, "label": label}
        # Of the training batch: what enters the queue.
        entering = {name: x for name, x in columns.items() if self.training and x is not None}
        with profile_range("loss"):
            neighbour, *others = gather_with_neighbours(
                found.picked_neighbour,
                *entering.values(),
                group=self.group,
                dtype=predicted.dtype,
            )
            loss = info_nce(
                predicted,
                neighbour,
                temperature=self.temperature,
                group=self.group,
                transposed=self.transposed,
            )
        if label is not None and found.label_hit is not None:
            known = (label >= 0) & (self.queue.queue_y[found.picked_index[0]] >= 0)
            accuracy = found.label_hit[0].sum() / known.sum().clamp_min(1)
        else:
            accuracy = torch.zeros_like(loss)
        if self.training:
            # Only now: the search must not find this batch.
            with profile_range("enqueue"):
                arrived = {name: x.wait() for name, x in zip(entering, others, strict=True)}
                self.queue.enqueue(**arrived)
        return NNCLROutput(loss, accuracy, found.searched_again.float().mean())

    def _check(
        self,
        projected: Tensor,
        predicted: Tensor,
        step: object,
        sample_id: Tensor | None,
        label: Tensor | None,
    ) -> None:
        """Refuse here what the ops would tell in the words of their own arguments."""
        check_tensors(projected=projected, predicted=predicted)
        D = self.queue.queue.shape[1]
        for name, x in (("projected", projected), ("predicted", predicted)):
            fits = x.ndim == 3 and x.shape[0] == 2 and x.shape[2] == D and x.shape[1] > 0
            if not fits or not x.is_floating_point():
                got = f"{x.dtype} {list(x.shape)}"
                raise ValueError(f"{name}: expected floats [2, n, {D}] with n > 0, got {got}")
        if predicted.shape[1] != projected.shape[1]:
            got = f"{list(projected.shape)} and {list(predicted.shape)}"
            raise ValueError(f"projected, predicted: expected equal shapes, got {got}")
        check_int64("sample_id", sample_id, projected.shape[1:2])
        check_int64("label", label, projected.shape[1:2])
        if isinstance(step, Tensor):
            check_int64("step", step, ())
        else:
            check_int("step", step, 0)
