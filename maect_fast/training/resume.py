"""What a run saves, and how it goes on from there."""

import dataclasses
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch.distributed as dist

from maect_fast.checkpoint import (
    random_states,
    save_checkpoint,
    set_random_states,
    write_atomically,
)
from maect_fast.config import Config, ConfigError
from maect_fast.training.distributed import World
from maect_fast.training.finite import not_finite
from maect_fast.training.meter import Meter
from maect_fast.training.run_directory import RunRecord, on_first_rank
from maect_fast.training.schedule import warmup_cosine
from maect_fast.training.stages import StageState, last_checkpoint, reading
from maect_fast.training.update import TrainingError

__all__ = ["resume_run", "save_run"]


def save_run(
    state: StageState, world: World, out: Path, record: RunRecord, meter: Meter, *, keep: bool
) -> None:
    """Write checkpoints/last.pt, and before it one that stays when `keep`."""
    world.rest()
    own = (random_states(), meter.state_dict())
    ranks: list[Any] = [own]
    if world.size > 1:
        ranks = [None] * world.size
        dist.all_gather_object(ranks, own)
    if world.rank != 0:
        return
    if not all(bool(p.isfinite().all()) for p in state.model.parameters()):
        raise TrainingError(not_finite(state, out, "weights are not finite"))
    random, meters = zip(*ranks, strict=True)
    content = {
        **state.state_dict(),
        "config": dataclasses.asdict(state.config),
        "record": dataclasses.asdict(record),
        "random_states": list(random),
        "meters": list(meters),
    }
    path = last_checkpoint(out)
    if not keep:
        save_checkpoint(path, content)
        return
    # In this order, so that a kill between the two leaves none out: the run comes by here again.
    kept = path.with_name(f"update-{state.update:07d}.pt")
    save_checkpoint(kept, content)
    write_atomically(path, lambda temporary: shutil.copyfile(kept, temporary))


def resume_run(
    saved: dict[str, Any],
    before: Config,
    state: StageState,
    world: World,
    out: Path,
    record: RunRecord,
    meter: Meter,
    images: dict[str, Any],
    *,
    change: Collection[str],
) -> list[str]:
    """Let a freshly built stage go on from a checkpoint.

    Args:
        saved: the checkpoint.
        before: the configuration in it.
        state: the stage, of the configuration to go on with.
        world: this process's place.
        out: run directory.
        record: the checkpoint's; what is changed is noted there.
        meter: goes on too.
        images: identity of the images to go on with.
        change: settings that may differ from those of before.

    Returns:
        Lines that say where it goes on.

    Raises:
        ConfigError: other images, or fewer epochs than are done.
        CheckpointError: a part that does not fit.
    """
    update, total, epochs = saved["update"], state.total, state.config.epochs
    if saved["total"] * epochs != total * before.epochs:
        raise ConfigError(
            f"data.root: the run in {out} has {saved['total']} updates, these images give "
            f"{total * before.epochs // epochs}; continue it with the images it was started with"
        )
    if update > total:
        done = update * before.epochs / saved["total"]
        raise ConfigError(
            f"epochs: the run in {out} has done {done:.4g} ({update} updates), now {epochs} were "
            f"asked for; expected at least {math.ceil(done)}"
        )
    state.load_state_dict(saved, out)
    # With another number of ranks the generators start anew: nothing of ours draws from them.
    if len(saved["random_states"]) == world.size:
        with reading("random_states", out):
            set_random_states(saved["random_states"][world.rank])
    with reading("meters", out):
        meter.load_state_dict(saved.get("meters", []))
    lines = [f"continuing {out} at update {update} of {total}"]
    if total != saved["total"]:
        lines.append(_length(before, state, saved))
    if on_first_rank(world, lambda: record.check_images(images, out, named=change, update=update)):
        state.forget_images()
        lines.append("with other images: the queue's ids and labels were forgotten")
    return lines


def _length(before: Config, state: StageState, saved: dict[str, Any]) -> str:
    """What becomes of the rates in a run that is made longer, or shorter."""
    update, epochs = saved["update"], state.config.epochs
    line = (
        f"epochs {before.epochs} -> {epochs}, updates {saved['total']} -> {state.total}: rates are "
        f"now those of {epochs} epochs from the start (warm-up, then cosine)"
    )
    if not 0 < update < state.total:
        return line
    warmup = int(before.optim.warmup * saved["total"])
    stood = warmup_cosine(update - 1, total=saved["total"], warmup=warmup)
    return f"{line}, at {state.lr_factor(update):.3f} of their peak, and stood at {stood:.3f}"
