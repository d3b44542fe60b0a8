"""A run's directory: one process writes in it, nothing in it is lost, and a run stays one run."""

import dataclasses
import fcntl
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EACCES, EAGAIN, ENOLCK, ENOSYS, EOPNOTSUPP
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from maect_fast.checkpoint import (
    fingerprint,
    kept_checkpoints,
    remove_temporaries,
    way_out,
    write_atomically,
)
from maect_fast.config import (
    Config,
    ConfigError,
    flat_settings,
    load_recipe,
    merge_config,
    save_config,
)
from maect_fast.names import printable
from maect_fast.training.distributed import World
from maect_fast.training.log import METRICS, read_metrics
from maect_fast.training.stages import StageState, last_checkpoint

__all__ = [
    "RunRecord",
    "check_last",
    "check_space",
    "check_writable",
    "inherited_line",
    "on_first_rank",
    "run_directory",
    "touches",
]

T = TypeVar("T")

LOCK = ".lock"
# What a run writes, in the order in which a new start sets it aside: without its checkpoints a
# directory with metrics is not taken for an empty one.
WRITTEN = (
    *("checkpoints", METRICS, "config.yaml", "profile", "report"),
    *("events.out.tfevents.*", "trackers.json", "wandb", "mlflow.db"),
)
# A process that has just taken the lock writes its name within so many seconds.
NAME_SECONDS = 1.0

# Settings that may differ when a run continues: they change no result but for rounding.
MAY_CHANGE = {
    "data.root",
    "data.test_root",
    "data.workers",
    "data.max_broken",
    "data.max_pixels",
    "checkpoint_every",
    "chunk_size",
    "knn_every",
    "save_minutes",
    "log_every",
    "trackers",
    "threads",
    "device",
    "profile",
    "profiler",
    "rank_timeout",
}
# Those that may differ where `--change` names them: weights, batches and schedule fit all the same.
CHANGEABLE = (
    "augment.",
    "optim.",
    "encoder.stream",
    "epochs",
    "head.temperature",
    "head.topk",
    "mask_ratio",
    "precision",
)

# What a run hands on to the next stage where it was given beside its recipe: what weights, head and
# images have in common in all stages, and recipes need not say. Of `data.*` it is all.
HANDED_ON = (
    "augment.",
    "encoder.",
    "head.output_dim",
    "head.pooling",
    "head.predictor_hidden",
    "head.projector_hidden",
    "head.queue_size",
)


def on_first_rank(world: World, act: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks; what it raises, all raise."""
    if world.size == 1:
        return act()
    outcome: list[Any] = [None, None]
    if world.rank == 0:
        try:
            outcome[0] = act()
        except Exception as error:  # raised again below, on all ranks
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    found: T = outcome[0]
    return found


def check_writable(path: Path, *, folder: bool = True) -> None:
    """Refuse a `path`, which need not exist, where no folder, or no file, can be made.

    Raises:
        ConfigError: says what is in the way.
    """
    if path.exists() and path.is_dir() != folder:
        is_one, expected = ("file", "folder") if folder else ("folder", "file")
        raise ConfigError(f"--out: {path} is a {is_one}, expected a {expected}")
    place = path
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise ConfigError(f"--out: {place} is not a folder, so there can be no {path}")
    if not os.access(place, os.W_OK):
        raise ConfigError(f"--out: {path} cannot be written, as {place} is not writable")


@contextmanager
def run_directory(out: Path, *, restart: bool = False) -> Iterator[None]:
    """Hold the directory `out`, made if missing, for this process alone, and tidy it up.

    The lock is the kernel's: it ends with the process, however that ends.

    Args:
        out: run directory.
        restart: set what an earlier run wrote aside, in a folder `earlier-N`.

    Raises:
        ConfigError: another process holds it, it cannot be written, or it has lost the checkpoint
            from which its run continues.
    """
    check_writable(out)
    is_new = not out.exists()
    with _lock(out):
        for folder in (out, out / "checkpoints"):
            remove_temporaries(folder)
        if restart:
            _set_aside(out)
        check_last(out)
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            if is_new and not any(out.iterdir()):
                out.rmdir()


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Hold `out`/.lock, which names its holder."""
    path = out / LOCK
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+")
        except FileNotFoundError:
            continue  # its last holder has just removed the empty directory
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (EACCES, EAGAIN):
                    raise ConfigError(
                        f"--out: {out} is in use by {_holder(path)}; wait for it or choose another"
                    ) from None
                if error.errno not in (ENOLCK, ENOSYS, EOPNOTSUPP):
                    raise
                print(  # noqa: T201 (what the user has to look after)
                    f"{out}: this file system has no locks, so a second process with this --out "
                    "would not be noticed",
                    file=sys.stderr,
                )
                yield
                return
            # The last holder may have removed it between the two calls.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            file.truncate(0)
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {began}\n")
            file.flush()
            yield
            return


def _holder(path: Path) -> str:
    """Who holds the lock."""
    deadline = time.monotonic() + NAME_SECONDS
    while time.monotonic() < deadline:
        name = path.read_text().strip() if path.exists() else ""
        if name:
            return name
        time.sleep(0.01)
    return "another process"


def _set_aside(out: Path) -> None:
    """Move all that an earlier run wrote."""
    found = [path for pattern in WRITTEN for path in sorted(out.glob(pattern))]
    if not found:
        return
    number = 1
    while (out / f"earlier-{number}").exists():
        number += 1
    folder = out / f"earlier-{number}"
    folder.mkdir()
    for path in found:
        path.rename(folder / path.name)
    print(f"{out}: the earlier run is in {folder}", file=sys.stderr)  # noqa: T201


def check_last(out: Path) -> None:
    """Refuse a directory with a run in it whose last checkpoint is gone.

    Raises:
        ConfigError: says what is there and how to go on.
    """
    last = last_checkpoint(out)
    if last.exists():
        return
    updates = [int(line["update"]) for line in read_metrics(out)]
    kept = kept_checkpoints(last.parent)
    there = [f"metrics up to update {updates[-1]}"] if updates else []
    there += [f"{len(kept)} kept checkpoints"] if kept else []
    if there:
        raise ConfigError(f"{last} is missing beside {' and '.join(there)}; {way_out(last)}")


def check_space(state: StageState, out: Path) -> None:
    """Refuse to start where not one checkpoint fits on the disk.

    Raises:
        ConfigError: with both sizes.
    """
    tensors = [*state.model.parameters(), *state.model.buffers()]
    # AdamW's averages come with the first update.
    tensors += 2 * [p for p in state.model.parameters() if p.requires_grad]
    if state.encoder_ema is not None:
        tensors += state.encoder_ema.state_dict().values()
    needed, free = sum(x.nbytes for x in tensors), shutil.disk_usage(out).free
    if free < needed:
        raise ConfigError(
            f"--out: a checkpoint takes {needed / 2**20:.0f} MiB, and {out} has "
            f"{free / 2**20:.0f} MiB free"
        )


@dataclass(slots=True)
class RunRecord:
    """What a run was started with, and what was changed since; part of its checkpoints."""

    init: dict[str, Any] | None = None
    """Path and fingerprint of what `--init` named."""
    decoder: dict[str, Any] | None = None
    """The same of `--decoder`."""
    images: dict[str, Any] | None = None
    """Number and digest of the training images."""
    recipe: str | None = None
    """Its name, or the path of its file."""
    given: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of `HANDED_ON`, the settings in which it is not its recipe, by dotted key."""
    inherited: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of these and of `data.*`, those that are the run's whose weights it started from."""
    changes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """In their order: update, setting, before, after."""

    @classmethod
    def of(
        cls,
        init: Path | None,
        decoder: Path | None,
        images: dict[str, Any],
        recipe: str | None,
        config: Config,
        inherited: Mapping[str, Any],
    ) -> "RunRecord":
        """The record of a new run."""
        given = {}
        if recipe is not None:
            own = flat_settings(merge_config(load_recipe(recipe, config.stage)))
            given = {
                key: value
                for key, value in flat_settings(config).items()
                if key.startswith(HANDED_ON) and value != own[key]
            }
        return cls(_identity(init), _identity(decoder), images, recipe, given, dict(inherited))

    @classmethod
    def read(cls, fields: dict[str, Any]) -> "RunRecord":
        """The record of a checkpoint.

        Raises:
            ValueError: a part of it is missing.
        """
        record = cls(**fields)
        for settings in (record.given, record.inherited):
            if not isinstance(settings, dict):
                raise ValueError(f"expected settings, got {type(settings).__name__}")
        origin, change = {"path", "fingerprint"}, {"update", "setting", "before", "after"}
        for part, keys in (
            (record.init, origin),
            (record.decoder, origin),
            (record.images, {"number", "digest"}),
            *((each, change) for each in record.changes),
        ):
            if part is not None and set(part) != keys:
                raise ValueError(f"expected {', '.join(sorted(keys))}")
        return record

    def check_origin(self, out: Path, *, init: Path | None, decoder: Path | None) -> None:
        """Refuse to continue with another start than the run's own; None asks for none.

        Raises:
            ConfigError: names both.
        """
        for option, path, mine in (
            ("--init", init, self.init),
            ("--decoder", decoder, self.decoder),
        ):
            if path is None or (mine is not None and _is_same(path, mine)):
                continue
            began = "random weights" if mine is None else mine["path"]
            if mine is not None and str(path.resolve()) == mine["path"]:
                began = f"other weights than {path} holds now"
            raise ConfigError(
                f"{option}: the run in {out} was started from {began}; continue it without "
                f"{option}, or choose another --out for {path}"
            )

    def check_settings(
        self, config: Config, before: Config, out: Path, *, named: Collection[str], update: int
    ) -> None:
        """Refuse settings that would make the run another one, and note those `named` ones.

        Raises:
            ConfigError: names the setting, and what to do.
        """
        settings = flat_settings(before)
        for key, value in flat_settings(config).items():
            if settings[key] == value or key in MAY_CHANGE:
                continue
            told = f"{key}: the run in {out} has {settings[key]}, now {value} was asked for"
            if not key.startswith(CHANGEABLE):
                raise ConfigError(
                    f"{told}; continue it without --recipe and this setting, or choose another "
                    "--out"
                )
            if not touches(named, key):
                raise ConfigError(
                    f"{told}; continue it without --recipe and this setting, or with "
                    f"--change {key}={value}"
                )
            self._note(update, key, settings[key], value)
            if key.startswith(HANDED_ON):
                self.given[key] = value

    def check_images(
        self, images: dict[str, Any], out: Path, *, named: Collection[str], update: int
    ) -> bool:
        """Refuse other images than the run's own; True where they are others, and `named`.

        Raises:
            ConfigError: says how many there were and are.
        """
        if self.images is None or self.images["digest"] == images["digest"]:
            self.images = images
            return False
        if not touches(named, "data.root"):
            raise ConfigError(
                f"data.root: these {images['number']} images are not the {self.images['number']} "
                f"that the run in {out} was started with (names or sizes differ); continue it with "
                "those, or with --change data.root=FOLDER"
            )
        self._note(update, "images", self.images, images)
        self.images = images
        return True

    def _note(self, update: int, setting: str, before: Any, after: Any) -> None:
        self.changes.append(
            {"update": update, "setting": setting, "before": before, "after": after}
        )

    def write_config(self, config: Config, out: Path) -> None:
        """Write config.yaml, which begins with what was changed on the way."""
        lines = []
        if self.inherited and self.init is not None:
            lines.append(f"# {inherited_line(self.init['path'], self.inherited)}\n")
        lines += [
            f"# from update {change['update']} on: {change['setting']} was {change['before']}, "
            f"is {change['after']}\n"
            for change in self.changes
        ]

        def write(temporary: Path) -> None:
            save_config(config, temporary)
            temporary.write_text("".join(lines) + temporary.read_text())

        write_atomically(out / "config.yaml", write)


def touches(named: Collection[str], key: str) -> bool:
    """Whether `key`, or a group that it belongs to, is among them."""
    return any(key == name or key.startswith(f"{name}.") for name in named)


def _identity(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    file = last_checkpoint(path) if path.is_dir() else path
    return {"path": str(path.resolve()), "fingerprint": fingerprint(file)}


def _is_same(path: Path, identity: dict[str, Any]) -> bool:
    """Whether `path` holds what it did, wherever it lies now; by its name where it is gone."""
    file = last_checkpoint(path) if path.is_dir() else path
    if not file.exists():
        return str(path.resolve()) == str(identity["path"])
    return bool(fingerprint(file) == identity["fingerprint"])


def inherited_line(run: Path | str, settings: Mapping[str, Any]) -> str:
    """What was taken over from a run, for people."""
    told = ", ".join(f"{key}={value}" for key, value in settings.items())
    return f"inherited from {printable(run)}: {printable(told)}"
