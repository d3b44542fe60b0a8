"""Averages of the metrics between two logged lines."""

import math
import time
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maect_fast.config import Config
from maect_fast.training.distributed import World
from maect_fast.training.stages import StageState
from maect_fast.training.waiting import DataWait

__all__ = ["Meter"]


class Meter:
    """Sums the metrics on the device and reads their averages once per logged line."""

    def __init__(self, config: Config, world: World, *, left_out: Collection[str]):
        self.config, self.world, self.left_out = config, world, left_out
        self.waiting = DataWait(world.device)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = self.num_timed = 0
        self.began = time.monotonic()

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Count one more update's."""
        for name, value in metrics.items():
            if name in self.left_out:
                continue
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1
        self.num_timed += 1

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums since the last line, for a checkpoint."""
        return {"sums": {k: v.cpu() for k, v in self.sums.items()}, "count": self.count}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue the sums of all ranks; another number of ranks shares their mean."""
        if not states:
            return
        own = [states[self.world.rank]] if len(states) == self.world.size else states
        self.count = own[0]["count"]
        self.sums = {
            name: torch.stack([state["sums"][name] for state in own]).mean(0).to(self.world.device)
            for name in own[0]["sums"]
        }

    def read(self, state: StageState, updates_per_epoch: int) -> dict[str, float]:
        """Averages over the updates since the last call and over the ranks: the one host sync.

        The rate is that of the updates which this process has made, and `data_wait` the share of
        their time in which it waited for batches.
        """
        values = torch.stack([value.float() for value in self.sums.values()]) / self.count
        if self.world.size > 1:
            dist.all_reduce(values)
            values /= self.world.size
        metrics = dict(zip(self.sums, values.tolist(), strict=True))
        seconds = time.monotonic() - self.began
        rate = self.num_timed * self.config.batch_size / seconds
        groups = state.optimizer.param_groups
        line = {
            "update": state.update,
            "epoch": round(state.update / updates_per_epoch, 4),
            **metrics,
            "lr": max(group["base_lr"] for group in groups) * state.lr_factor(state.update - 1),
            "images_per_second": round(rate, 1),
            "data_wait": round(self.waiting.read() / seconds, 3),
        }
        if math.isfinite(metrics["loss"]):
            self._reset()
        return line

    def restart_clock(self) -> None:
        """What was done since `read` was no training."""
        self.began = time.monotonic()
