"""What the ranks of a process group exchange around an op.

Convention: a rank's loss is the mean over its own rows and the caller averages gradients over ranks
(as DDP does), so the gradient of a sum over ranks is summed over the ranks too. Then W ranks with n
rows each take the step of one process with W * n rows. `group=None`: one process, no communication.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather_rows", "all_reduce_max", "all_reduce_sum", "group_rank"]


def group_rank(group: dist.ProcessGroup | None) -> int:
    """Number of this rank in the group, 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def all_gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order, without gradient; every rank must bring the same number.

    Args:
        x: [n, ...].
        group: the W ranks.

    Returns:
        [W * n, ...]
    """
    x = x.detach()
    if group is None:
        return x
    gathered = x.new_empty((dist.get_world_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


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
