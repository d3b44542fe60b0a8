"""The training loop: one run of one stage, resumable at every update."""

import dataclasses
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from maect_fast.checkpoint import (
    random_states,
    save_checkpoint,
    seed_generators,
    set_random_states,
    write_atomically,
)
from maect_fast.config import Config, ConfigError, load_config, profile_window, save_config
from maect_fast.data import Batch, Loader, build_source
from maect_fast.names import is_utf8, printable
from maect_fast.profiling import Profile, profile_range
from maect_fast.training.distributed import World, init_world
from maect_fast.training.log import RunLog
from maect_fast.training.memory import check_memory
from maect_fast.training.stages import (
    StageState,
    build_stage,
    last_checkpoint,
    load_state,
    matrix_dtype,
    start_weights,
)

__all__ = ["TrainingError", "run_stage"]

# Settings that may differ when a run continues: they change no result but for rounding.
MAY_CHANGE = {
    "data.root",
    "data.test_root",
    "data.workers",
    "data.max_broken",
    "data.max_pixels",
    "checkpoint_every",
    "chunk_size",
    "save_minutes",
    "log_every",
    "threads",
    "device",
    "profile",
    "profiler",
}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why and from where it can be continued."""


def run_stage(
    config: Config, out: Path, *, init: Path | None = None, decoder: Path | None = None
) -> bool:
    """Run `config.stage` in the run directory `out`; a directory with a run in it is continued.

    Writes config.yaml, metrics.jsonl, TensorBoard events and checkpoints/.

    Args:
        config: the resolved configuration.
        out: run directory, made if missing.
        init: where a new run's weights come from; see `start_weights`.
        decoder: the pretrain run whose decoder a reconstruction loss uses.

    Returns:
        True when the run is finished, False when a signal stopped it after a save.

    Raises:
        ConfigError: settings that do not fit the data, or that differ from the run's own.
        TrainingError: the loss is not finite.
    """
    if not is_utf8(out):
        raise ConfigError(f"--out: expected a path in UTF-8, got {printable(out)}")
    world = init_world(config.device)
    profile = _profile(config, world, out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    resumed = load_state(out) if last_checkpoint(out).exists() else None
    if resumed is not None:
        _check_same_run(config, out, load_config(resumed["config"]))
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
        check_memory(config, num_gpus=world.size, num_bytes=memory)
    loader = _build_loader(config, world)
    total = config.epochs * loader.updates_per_epoch
    state = build_stage(config, world, total=total)
    seed_generators(config.seed + world.rank)
    if resumed is None:
        lines = start_weights(state, init=init, decoder=decoder)
    else:
        if resumed["total"] != total:
            raise ConfigError(
                f"data.root: the run in {out} has {resumed['total']} updates, these images give "
                f"{total}; continue it with the images it was started with"
            )
        state.load_state_dict(resumed, out)
        # With another number of ranks the generators start anew: nothing of ours draws from them.
        if len(resumed["random_states"]) == world.size:
            set_random_states(resumed["random_states"][world.rank])
        lines = [f"continuing {out} at update {state.update} of {total}"]
    if world.rank == 0:
        for line in [*lines, *_warnings(config, loader)]:
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (what the run starts from)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "config.yaml", lambda temporary: save_config(config, temporary))
    finished = _loop(state, loader, world, out, profile)
    if loader.broken:
        count = len(loader.broken)
        print(f"rank {world.rank}: {count} unreadable images were replaced", file=sys.stderr)  # noqa: T201
    return finished


def _loop(state: StageState, loader: Loader, world: World, out: Path, profile: Profile) -> bool:
    """Train until the last update or a signal."""
    config = state.config
    model: nn.Module = state.model
    if world.size > 1:
        # The queue is kept equal on all ranks by a deterministic enqueue, so nothing is broadcast.
        model = nn.parallel.DistributedDataParallel(state.model, broadcast_buffers=False)
    has_labels = bool((loader.source.labels >= 0).any())
    meter = _Meter(config, world, left_out=() if has_labels else ("nn_accuracy",))
    saved = time.monotonic()
    log = RunLog(
        out, title=config.stage, start=state.update, total=state.total, active=world.rank == 0
    )
    with log, profile, _stop_signal() as stopped:
        while state.update < state.total:
            epoch, position = divmod(state.update, loader.updates_per_epoch)
            for batch in profile.batches(loader.batches(epoch, position), state.update):
                meter.add(_update(state, model, batch, world))
                log.advance()
                is_last = state.update == state.total
                is_kept = state.update % (config.checkpoint_every * loader.updates_per_epoch) == 0
                is_logged = is_last or state.update % config.log_every == 0
                if is_logged:
                    log.write(meter.read(state, loader.updates_per_epoch))
                must_stop = is_due = False
                # Ranks agree on what a signal or the clock asks for, which costs a host sync:
                # only where the metrics are read anyway, unless there is one rank.
                if is_logged or world.size == 1:
                    is_due = time.monotonic() - saved >= 60 * config.save_minutes
                    must_stop, is_due = _agree([bool(stopped), is_due], world)
                if must_stop or is_due or is_kept or is_last:
                    _save(state, world, out, keep=is_kept and not is_last)
                    saved = time.monotonic()
                if must_stop and not is_last:
                    return False
    return True


def _update(state: StageState, model: nn.Module, batch: Batch, world: World) -> dict[str, Tensor]:
    """Forward, backward, optimiser, EMAs, of a batch on the device. No host sync."""
    device = world.device
    use_bf16 = matrix_dtype(state.config, device) == torch.bfloat16
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=use_bf16):
        outputs: dict[str, Tensor] = model(
            batch.views, sample_id=batch.sample_id, label=batch.label, step=state.update
        )
    with profile_range("backward"):
        outputs["loss"].backward()  # type: ignore[no-untyped-call]
    state.apply_gradients()
    return {name: value.detach() for name, value in outputs.items()}


class _Meter:
    """Sums the metrics on the device and reads their averages once per logged line."""

    def __init__(self, config: Config, world: World, *, left_out: Collection[str]):
        self.config, self.world, self.left_out = config, world, left_out
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.began = time.monotonic()

    def add(self, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            if name in self.left_out:
                continue
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def read(self, state: StageState, updates_per_epoch: int) -> dict[str, float]:
        """Averages over the updates since the last call and over the ranks: the one host sync."""
        values = torch.stack([value.float() for value in self.sums.values()]) / self.count
        if self.world.size > 1:
            dist.all_reduce(values)
            values /= self.world.size
        metrics = dict(zip(self.sums, values.tolist(), strict=True))
        if not math.isfinite(metrics["loss"]):
            raise TrainingError(
                f"the loss is {metrics['loss']} between updates {state.update - self.count} and "
                f"{state.update}; lower optim.encoder_lr or optim.other_lr, or use precision=fp32. "
                "The last saved checkpoint is from before: the same command continues from it"
            )
        seconds = time.monotonic() - self.began
        rate = self.count * self.config.batch_size / seconds
        groups = state.optimizer.param_groups
        line = {
            "update": state.update,
            "epoch": round(state.update / updates_per_epoch, 4),
            **metrics,
            "lr": max(group["lr"] for group in groups),
            "images_per_second": round(rate, 1),
        }
        self._reset()
        return line


def _save(state: StageState, world: World, out: Path, *, keep: bool) -> None:
    """Write checkpoints/last.pt, and a copy that stays when `keep`."""
    states: list[Any] = [random_states()]
    if world.size > 1:
        states = [None] * world.size
        dist.all_gather_object(states, random_states())
    if world.rank != 0:
        return
    weights = state.state_dict()
    if not all(bool(p.isfinite().all()) for p in state.model.parameters()):
        raise TrainingError(
            f"weights are not finite at update {state.update}: nothing was saved; "
            "lower the learning rate, or use precision=fp32"
        )
    config = dataclasses.asdict(state.config)
    path = last_checkpoint(out)
    save_checkpoint(path, {**weights, "config": config, "random_states": states})
    if keep:
        kept = path.with_name(f"update-{state.update:07d}.pt")
        write_atomically(kept, lambda temporary: shutil.copyfile(path, temporary))


def _build_loader(config: Config, world: World) -> Loader:
    """The training images, split over the ranks."""
    return Loader(
        build_source(config.data, config.encoder, split="train"),
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


def _check_same_run(config: Config, out: Path, before: Config) -> None:
    """Refuse to continue a run with settings that would make it another one."""
    settings = _flat(before)
    for key, value in _flat(config).items():
        if settings[key] != value and key not in MAY_CHANGE:
            raise ConfigError(
                f"{key}: the run in {out} has {settings[key]}, now {value} was asked for; "
                "continue it without --recipe and this setting, or choose another --out"
            )


def _flat(config: Config) -> dict[str, Any]:
    """Dotted keys and plain values."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                visit(f"{prefix}.{key}" if prefix else key, value)
        else:
            flat[prefix] = node

    visit("", dataclasses.asdict(config))
    return flat


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


def _agree(flags: list[bool], world: World) -> list[bool]:
    """True where any rank says so."""
    if world.size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


@contextmanager
def _stop_signal() -> Iterator[list[int]]:
    """A list that is filled by SIGTERM, SIGUSR1 or the first Ctrl-C; a second one interrupts."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread only
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, receive) for number in watched}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
