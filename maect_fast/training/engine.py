"""The training loop: one run of one stage, resumable at every update."""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from maect_fast.checkpoint import seed_generators
from maect_fast.config import Config, ConfigError, load_config, profile_window
from maect_fast.data import Loader, Source, build_source, from_dataset
from maect_fast.names import is_utf8, printable
from maect_fast.profiling import Profile
from maect_fast.training.distributed import World, init_world
from maect_fast.training.feature_check import FeatureCheck
from maect_fast.training.finite import check_finite, not_finite
from maect_fast.training.int8_gate import check_int8
from maect_fast.training.log import RunLog
from maect_fast.training.memory import check_memory
from maect_fast.training.meter import Meter
from maect_fast.training.resume import resume_run, save_run
from maect_fast.training.run_directory import (
    RunRecord,
    check_space,
    inherited_line,
    on_first_rank,
    run_directory,
)
from maect_fast.training.signals import StopSignal
from maect_fast.training.stages import (
    StageState,
    build_stage,
    last_checkpoint,
    load_state,
    reading,
    start_weights,
)
from maect_fast.training.trackers import check_trackers
from maect_fast.training.update import TrainingError, Update

__all__ = ["TrainingError", "run_stage"]

# A rank that alone waits for data goes on waiting for so many seconds after a signal.
PATIENCE_SECONDS = 5.0


def run_stage(
    config: Config,
    out: Path,
    *,
    init: Path | None = None,
    decoder: Path | None = None,
    capture: bool = True,
    restart: bool = False,
    change: Collection[str] = (),
    recipe: str | None = None,
    inherited: Mapping[str, Any] = MappingProxyType({}),
    dataset: Any = None,
) -> int:
    """Run `config.stage` in the run directory `out`; a directory with a run in it is continued.

    Writes config.yaml, metrics.jsonl, what trackers write, and checkpoints/. The directory is this
    run's alone meanwhile.

    Args:
        config: the resolved configuration.
        out: run directory, made if missing.
        init: where a new run's weights come from; see `start_weights`. A run that is continued
            must have come from there.
        decoder: the pretrain run whose decoder a reconstruction loss uses; the same holds.
        restart: set a run that is there aside, and start anew.
        change: settings, or groups of settings, in which `config` may differ from that of the run
            that is continued; "data.root" allows for other images.
        capture: on a GPU, one CUDA graph per update where that is possible; see `Update`.
        recipe: what a new run's configuration was made from, for its record.
        inherited: settings that a new run has from `init`, by dotted key, for its record.
        dataset: where `data.source` is `dataset`, a torch Dataset; see `from_dataset`.

    Returns:
        0 when the run is finished, the number of the signal when one stopped it after a save.

    Raises:
        ConfigError: settings that do not fit the data or the weights, or that differ from the run's
            own; a directory that is in use, or that has lost its last checkpoint; a tracker whose
            library is missing.
        CheckpointError: a checkpoint that is damaged or does not fit.
        TrainingError: the loss is not finite.
    """
    config = _with_whole_paths(config)
    if not is_utf8(out):
        raise ConfigError(f"--out: expected a path in UTF-8, got {printable(out)}")
    check_trackers(config.trackers)
    world = init_world(config.device)
    if world.watch is not None:
        world.watch.patience = config.rank_timeout
    with ExitStack() as held:
        on_first_rank(world, lambda: held.enter_context(run_directory(out, restart=restart)))
        return _run(
            config,
            out,
            world,
            init=init,
            decoder=decoder,
            change=change,
            capture=capture,
            recipe=recipe,
            inherited=inherited,
            dataset=dataset,
        )


def _with_whole_paths(config: Config) -> Config:
    """The configuration by which the run finds its images from any folder."""
    data = config.data
    root, test_root = (
        None if path is None else os.path.abspath(path) for path in (data.root, data.test_root)
    )
    data = dataclasses.replace(data, root=root, test_root=test_root)
    return dataclasses.replace(config, data=data)


def _run(
    config: Config,
    out: Path,
    world: World,
    *,
    init: Path | None,
    decoder: Path | None,
    change: Collection[str],
    capture: bool,
    recipe: str | None,
    inherited: Mapping[str, Any],
    dataset: Any,
) -> int:
    """`run_stage` in a directory that is ours."""
    profile = _profile(config, world, out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    last = last_checkpoint(out)
    resumed = load_state(out) if last.exists() else None
    with reading("record", out):
        record = RunRecord.read(resumed.get("record", {})) if resumed else RunRecord()
    if resumed is not None:
        if "record" in resumed:  # runs of before do not know
            on_first_rank(world, lambda: record.check_origin(out, init=init, decoder=decoder))
        before = load_config(resumed["config"])
        record.check_settings(config, before, out, named=change, update=resumed["update"])
    elif change:
        raise ConfigError(f"--change: there is no run in {out} to continue")
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        check_memory(config, num_gpus=world.size, num_bytes=memory)
    loader = _build_loader(config, world, dataset)
    images = on_first_rank(world, lambda: loader.source.identity(config.data.root))
    total = config.epochs * loader.updates_per_epoch
    state = build_stage(config, world, total=total)
    on_first_rank(world, lambda: check_space(state, out))
    seed_generators(config.seed + world.rank)
    left_out = () if loader.source.has_labels else ("nn_accuracy",)
    meter = Meter(config, world, left_out=left_out)
    if resumed is None:
        lines = start_weights(state, init=init, decoder=decoder)
        if inherited and init is not None:
            lines.append(inherited_line(init, inherited))
        record = on_first_rank(
            world, lambda: RunRecord.of(init, decoder, images, recipe, config, inherited)
        )
    else:
        lines = resume_run(resumed, before, state, world, out, record, meter, images, change=change)
    check_finite(state, init if resumed is None else last)
    lines += check_int8(state, loader, world)
    check = FeatureCheck(config, loader.source, updates_per_epoch=loader.updates_per_epoch)
    lines += on_first_rank(world, check.prepare)
    if world.rank == 0:
        for line in [loader.source.about(), *lines, *_warnings(config, loader)]:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (what the run starts from)
        record.write_config(config, out)
    save = partial(save_run, state, world, out, record, meter)
    if resumed is None or change:
        # From here on a directory with metrics has a checkpoint, and a disk that cannot take one is
        # found out before the first update. A run that was finished keeps what it was.
        save(keep=resumed is not None and resumed["update"] == resumed["total"] < total)
    stopped_by = _loop(state, loader, world, out, profile, meter, check, save, capture=capture)
    if loader.broken:
        count = len(loader.broken)
        print(f"rank {world.rank}: {count} unreadable images were replaced", file=sys.stderr)  # noqa: T201
    return stopped_by


def _loop(
    state: StageState,
    loader: Loader,
    world: World,
    out: Path,
    profile: Profile,
    meter: Meter,
    check: FeatureCheck,
    save: Callable[..., None],
    *,
    capture: bool,
) -> int:
    """Train until the last update, or a signal, whose number is returned."""
    config = state.config
    model: nn.Module = state.model
    if world.size > 1:
        # The queue is kept equal on all ranks by a deterministic enqueue, so nothing is broadcast.
        model = nn.parallel.DistributedDataParallel(state.model, broadcast_buffers=False)
    update = Update(state, model, world, capture=capture)
    saved = time.monotonic()
    log = RunLog(out, config, start=state.update, total=state.total, active=world.rank == 0)
    patience = PATIENCE_SECONDS if world.size > 1 else 0.0
    with closing(loader), log, profile, StopSignal(patience=patience) as stop:
        while state.update < state.total:
            epoch, position = divmod(state.update, loader.updates_per_epoch)
            batches = profile.batches(loader.batches(epoch, position), state.update)
            if not loader.is_in_memory:
                batches = meter.waiting(batches)
            for batch in stop.awaiting(batches):
                meter.add(update(batch))
                log.advance()
                if config.profile is None:
                    world.beat(state.update)
                is_last = state.update == state.total
                is_kept = state.update % (config.checkpoint_every * loader.updates_per_epoch) == 0
                is_checked = check.is_due(state)
                is_logged = is_last or is_checked or state.update % config.log_every == 0
                if is_logged:
                    metrics = meter.read(state, loader.updates_per_epoch)
                    if not math.isfinite(metrics["loss"]):
                        what = f"the loss is {metrics['loss']}"
                        raise TrainingError(not_finite(state, out, what))
                    if is_checked:
                        world.rest()
                    if is_checked and world.rank == 0:
                        metrics |= check.measure(state, stopped=lambda: bool(stop.number))
                        meter.restart_clock()
                    log.write(metrics)
                stopped_by = is_due = 0
                # Ranks agree on what a signal or the clock asks for, which costs a host sync:
                # only where the metrics are read anyway, unless there is one rank.
                if is_logged or world.size == 1:
                    is_due = int(time.monotonic() - saved >= 60 * config.save_minutes)
                    stopped_by, is_due = _agree([stop.number, is_due], world)
                if stopped_by or is_due or is_kept or is_last:
                    save(keep=is_kept and not is_last)
                    saved = time.monotonic()
                if stopped_by and not is_last:
                    # A rank that leaves makes its launcher end the others, of which one saves.
                    _agree([stopped_by], world)
                    return stopped_by
            if stop.ended_wait and world.size > 1:
                raise TrainingError(
                    f"rank {world.rank} was stopped while it waited for images, where the others "
                    "cannot save; the same command continues from the last saved update"
                )
            if stop.ended_wait:
                save(keep=False)
                return stop.number
    return 0


def _build_loader(config: Config, world: World, dataset: Any) -> Loader:
    """The training images, split over the ranks."""
    source: Source
    if dataset is None:
        source = build_source(config.data, config.encoder, split="train")
    else:
        source = from_dataset(dataset, config.data, config.encoder)
    return Loader(
        source,
        config.augment,
        num_views=config.num_views,
        batch_size=config.batch_size,
        img_size=config.encoder.img_size,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.workers,
        max_broken=config.data.max_broken,
        device=world.device,
    )


def _profile(config: Config, world: World, out: Path) -> Profile:
    """The profile that `config.profile` asks rank 0 for."""
    updates = profile_window(config.profile)
    if updates and config.profiler == "nsight" and world.device.type != "cuda":
        raise ConfigError("profiler: expected torch on a CPU, got nsight, which needs a GPU")
    return Profile(
        updates if world.rank == 0 else range(0),
        config.profiler,
        folder=out / "profile",
        device=world.device,
        tell=partial(tqdm.write, file=sys.stderr),
    )


def _warnings(config: Config, loader: Loader) -> list[str]:
    """What the user should know before hours pass."""
    size = config.head.queue_size
    images = loader.updates_per_epoch * config.batch_size
    if config.stage != "pretrain" and size > images:
        return [
            f"head.queue_size = {size} exceeds the {images} images of an epoch: the queue holds "
            "several copies of an image; own copies are excluded, but diversity is lower"
        ]
    return []


def _agree(numbers: list[int], world: World) -> list[int]:
    """The largest that any rank has of each."""
    if world.size == 1:
        return numbers
    votes = torch.tensor(numbers, dtype=torch.int32, device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    found: list[int] = votes.tolist()
    return found
