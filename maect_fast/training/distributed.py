"""What the ranks of a run exchange.

Conventions: `group` None means one process and no communication. The local loss is the mean over
    the local rows and
DDP averages gradients over ranks, so a differentiable sum over ranks has the sum over ranks as its
backward; then one process with a batch of 2n and two with n each take the same step.
"""

import os
import socket
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maect_fast.config import ConfigError
from maect_fast.kernels._common.collectives import all_gather_rows, all_reduce_sum
from maect_fast.training.ranks import TIMEOUT, RankWatch, join_ranks, read_place

__all__ = [
    "SyncBatchNorm1d",
    "World",
    "all_gather_rows",
    "close_world",
    "init_world",
    "resolve_device",
]

# NCCL's own watchdogs would kill every rank whose peer is gone, with C++ stacks and before
# `RankWatch` can name that peer.
NCCL_LEAVES_IT_TO_US = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN": "0",
}
# Of the running statistics, torch's default.
MOMENTUM = 0.1


@dataclass(frozen=True, slots=True)
class World:
    """This process's place among the ranks of the run."""

    rank: int
    """Number of this process, 0 writes files."""
    size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its machine, and of its GPU."""
    group: dist.ProcessGroup | None
    """All ranks, or None for a single process."""
    device: torch.device
    """Where this rank computes."""
    watch: RankWatch | None = field(default=None, compare=False, repr=False)
    """Of the other ranks, if there are any."""

    def beat(self, update: int) -> None:
        """`update` updates are done; the next should follow within the watch's patience."""
        if self.watch is not None:
            self.watch.beat(update)

    def rest(self) -> None:
        """Until the next `beat`, this rank may take as long as it likes."""
        if self.watch is not None:
            self.watch.rest()


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here: auto is CUDA where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: expected cpu or auto where torch finds no GPU, got cuda")
    return torch.device(device)


def init_world(device: str) -> World:
    """Join the ranks that torchrun started; without torchrun, a world of one.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A second call gives the same
    world.

    Args:
        device: "auto", "cpu" (gloo) or "cuda" (NCCL, one GPU per local rank).

    Raises:
        ConfigError: an environment that no launcher sets, or more local ranks than GPUs.
    """
    watch, place, where = join_ranks(), read_place(), resolve_device(device)
    cuda = where.type == "cuda"
    if cuda:
        num_gpus = torch.cuda.device_count()
        if place.local_rank >= num_gpus:
            raise ConfigError(
                f"LOCAL_RANK: expected a GPU for each process, {socket.gethostname()} has "
                f"{num_gpus}, got {place.local_rank}; lower torchrun's --nproc-per-node"
            )
        where = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(where)
    if watch is not None and not dist.is_initialized():
        if cuda:
            os.environ.update(NCCL_LEAVES_IT_TO_US)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=watch.group_store,
            rank=place.rank,
            world_size=place.size,
            timeout=TIMEOUT,
            device_id=where if cuda else None,
        )
        watch.group = dist.group.WORLD
    return World(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        group=None if watch is None else dist.group.WORLD,
        device=where,
        watch=watch,
    )


def close_world() -> None:
    """Leave the process group and the other ranks, if there are any."""
    if not dist.is_initialized():
        return
    watch = join_ranks()
    dist.destroy_process_group()
    if watch is not None:
        watch.close()
        join_ranks.cache_clear()


class SyncBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the rows of all ranks; without a group, or in eval mode, torch's own.

    torch's SyncBatchNorm refuses CPU tensors; this one runs on gloo too. Statistics are fp32, the
    state dict is that of `nn.BatchNorm1d`, and every rank must bring the same number of rows.

    Args:
        num_features: D of the input [n, D].
        group: the ranks that share statistics.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(num_features, momentum=MOMENTUM)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [n, D]. Its gradient is that of the sum of all ranks' losses."""
        if self.group is None or not self.training:
            return super().forward(x)
        num_ranks = dist.get_world_size(self.group)
        num_rows = num_ranks * len(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Two passes, as E[x^2] - E[x]^2 cancels where a feature's mean is large against its spread.
        mean = all_reduce_sum(wide.mean(0), self.group) / num_ranks
        centred = wide - mean
        var = all_reduce_sum(centred.square().mean(0), self.group) / num_ranks
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, MOMENTUM)
            self.running_var.lerp_(var * (num_rows / (num_rows - 1)), MOMENTUM)
        normalized = centred * (var + self.eps).rsqrt() * self.weight + self.bias
        return normalized.to(x.dtype)
