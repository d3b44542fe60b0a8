"""What the ranks of a process group exchange around an op.

Convention: a rank's loss is the mean over its own rows and the caller averages gradients over ranks
(as DDP does), so the gradient of a sum over ranks is summed over the ranks too. Then W ranks with n
rows each take the step of one process with W * n rows. `group=None`: one process, no communication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "PendingRows",
    "all_gather_rows",
    "all_reduce_max",
    "all_reduce_sum",
    "check_equal_rows",
    "group_rank",
    "start_all_gather_packed",
    "start_all_gather_rows",
]

# Groups whose ranks brought equally many rows, the one time that they were compared.
_CHECKED: WeakSet[dist.ProcessGroup] = WeakSet()
# Where the parts of a packed row start: Triton loads in wide pieces where pointers are multiples of
# 16 bytes and strides of 16 numbers.
PART_BYTES = 64


@dataclass(frozen=True, slots=True)
class PendingRows:
    """All ranks' rows, perhaps still under way."""

    rows: Tensor
    """[W * n, ...]; only `wait` may read it."""
    local: Tensor
    """[n, ...], those of this rank."""
    work: dist.Work | None
    """None: arrived."""

    def wait(self) -> Tensor:
        """The rows; a GPU's stream waits for them, the host does not."""
        if self.work is not None:
            self.work.wait()
        return self.rows


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Number of this rank in the group, 0 without one.

    Raises:
        TypeError: it is no group.
    """
    if group is None:
        return 0
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group or None, got {type(group).__name__}")
    return dist.get_rank(group)


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order, without gradient; every rank must bring the same number.

    Args:
        x: [n, ...].
        group: the W ranks.

    Returns:
        [W * n, ...]
    """
    return start_all_gather_rows(x, group).wait()


def start_all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> PendingRows:
    """`all_gather_rows`, which other work may go on beside."""
    x = x.detach()
    if group is None:
        return PendingRows(x, x, None)
    gathered = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    work = dist.all_gather_into_tensor(gathered, x.contiguous(), group=group, async_op=True)
    return PendingRows(gathered, x, work)


def start_all_gather_packed(
    parts: Sequence[Tensor], group: dist.ProcessGroup | None
) -> list[PendingRows]:
    """`start_all_gather_rows` of several tensors in one message.

    Args:
        parts: [n, ...] each, of any dtypes.
        group: the W ranks.

    Returns:
        Of each part the rows [W * n, ...], dense but for the first stride.
    """
    if group is None:
        return [start_all_gather_rows(x, group) for x in parts]
    widths = [x[0].numel() * x.itemsize for x in parts]
    ends = list(accumulate(-(-width // PART_BYTES) * PART_BYTES for width in widths))

    def views(buffer: Tensor) -> list[Tensor]:
        return [
            buffer[:, start : start + width].view(x.dtype).view(len(buffer), *x.shape[1:])
            for x, start, width in zip(parts, [0, *ends], widths, strict=False)
        ]

    packed = parts[0].new_empty((len(parts[0]), ends[-1]), dtype=torch.uint8)
    for place, x in zip(views(packed), parts, strict=True):
        place.copy_(x.detach())
    pending = start_all_gather_rows(packed, group)
    rows = views(pending.rows)
    return [PendingRows(*both, pending.work) for both in zip(rows, views(packed), strict=True)]


def check_equal_rows(name: str, x: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise the same error on every rank unless all bring equally many rows x [n, ...].

    Only the first time that this group is asked: it costs a message, and on a GPU a wait.

    Args:
        name: how the message calls them.
        x: the rows.
        group: the ranks; None: one process, nothing to compare.

    Raises:
        TypeError: it is no group.
        ValueError: ranks with different numbers.
    """
    group_rank(group)  # refuses what is no group
    if group is None or group in _CHECKED:
        return
    sizes = all_gather_rows(torch.tensor([x.shape[0]], device=x.device), group).tolist()
    if len(set(sizes)) > 1:
        raise ValueError(f"{name}: expected equally many rows on every rank, got {sizes}")
    _CHECKED.add(group)


def all_reduce_max(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise maximum over the ranks, without gradient."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Elementwise sum over the ranks; its gradient is summed over the ranks."""
    result: Tensor = _AllReduceSum.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
