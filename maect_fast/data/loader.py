"""Batches of augmented views for training, and plain images for evaluation.

What a batch holds is a function of (seed, epoch, batch number) alone: the number of workers, the
number of ranks and where a run was resumed change nothing.
"""

import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from maect_fast.config import AugmentConfig, ConfigError
from maect_fast.data.augment import (
    NOISE,
    bytes_to_normalized,
    draw,
    eval_pixels,
    eval_reduction,
    finish_views,
    image_views,
    num_draws,
    tensor_views,
    to_normalized,
    view_reduction,
)
from maect_fast.data.feed import Feed
from maect_fast.data.sources import Reduction, Source, TensorSource, UnfitImageError
from maect_fast.errors import UserError
from maect_fast.kernels._common.philox import MASK32, philox4x32
from maect_fast.names import listed, one_line, printable

__all__ = ["Batch", "DataError", "EvalBatches", "Loader", "eval_batches", "told_once"]

logger = logging.getLogger(__package__)

# The stream of epoch permutations among those of one run's seed.
STREAM = 3 << 32
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 1.0


# Where workers put their batches, on Linux.
SHARED_MEMORY = Path("/dev/shm")
# The DataLoader's own default, of batches that a worker is ahead.
PREFETCH = 2


class DataError(UserError, RuntimeError):
    """Images that cannot be had.

    More cannot be read than `data.max_broken` allows, and the message names them; or the workers
    that read them have ended.
    """


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of one update's images, on the loader's device."""

    views: Tensor
    """[V, n, C, H, W] fp32, normalised."""
    sample_id: Tensor
    """[n] int64, index of each image in its source."""
    label: Tensor
    """[n] int64; -1 = no label."""


class Broken(NamedTuple):
    """Why an image cannot be read."""

    kind: str
    """In a word or two, the same for all of its kind."""
    reason: str


@dataclass(frozen=True, slots=True)
class _Item:
    """What a worker hands over for one batch."""

    pixels: Tensor
    """[V, n, C, S, S] fp32, or uint8 that is still to be normalised; for evaluation [n, C, S, S]
    fp32. Void if too many are broken."""
    sample_id: Tensor
    """[n] int64, the images really shown."""
    label: Tensor
    """[n] int64, theirs."""
    broken: dict[int, Broken]
    """By index, why an image could not be read."""

    def pin_memory(self) -> "_Item":
        """The same in pinned memory; called by the DataLoader."""
        pixels, ids, labels = (x.pin_memory() for x in (self.pixels, self.sample_id, self.label))
        return _Item(pixels, ids, labels, self.broken)


class _Schedule(Sampler[tuple[int, list[int]]]):
    """The (epoch, image indices) of the batches to come; set anew before each pass."""

    def __init__(self) -> None:
        self.items: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


@dataclass(frozen=True)
class _TrainingBatches(Dataset[_Item]):
    """Decodes each image once and makes its views; runs in a worker."""

    source: Source
    augment: AugmentConfig
    img_size: int
    num_views: int
    seed: int
    max_broken: int

    def __getitem__(self, key: tuple[int, list[int]]) -> _Item:
        epoch, indices = key
        S, C = self.img_size, self.source.in_chans
        # A quarter of the bytes, to the main process and to the device, where the rest is done.
        stays_bytes = not self.augment.contrast and not self.augment.noise
        dtype = torch.uint8 if stays_bytes else torch.float32
        views = _empty(self.num_views, len(indices), C, S, S, dtype=dtype)
        ids, labels = list(indices), [-1] * len(indices)
        broken: dict[int, Broken] = {}
        draws = self._draws(ids, epoch, NOISE)
        reduction = partial(view_reduction, augment=self.augment, img_size=S)
        for row, index in enumerate(indices):
            read = _read(self.source, index, reduction, broken)
            while read is None:
                if len(broken) > self.max_broken:
                    return _Item(views, _int64(ids), _int64(labels), broken)
                ids[row] = (ids[row] + 1) % len(self.source)
                read = _read(self.source, ids[row], reduction, broken)
            image, labels[row] = read
            own = draws[:, row : row + 1]
            if self.augment.noise or ids[row] != index:
                own = self._draws([ids[row]], epoch, num_draws(self.augment, C * S * S))
            pixels = image_views(image, own[:, 0, :NOISE].tolist(), self.augment, S)
            if stays_bytes:
                views[:, row] = torch.from_numpy(pixels).movedim(-1, -3)
                continue
            # One image at a time stays in the cache.
            views[:, row] = finish_views(_to_float(pixels)[:, None], own, self.augment)[:, 0]
        return _Item(views, _int64(ids), _int64(labels), broken)

    def _draws(self, ids: list[int], epoch: int, num: int) -> Tensor:
        return draw(self.seed, torch.tensor(ids), epoch=epoch, num_views=self.num_views, num=num)


@dataclass(frozen=True)
class _EvaluationBatches(Dataset[_Item]):
    """Decodes, resizes and crops the middle; broken images are left out. Runs in a worker."""

    source: Source
    augment: AugmentConfig
    img_size: int

    def __getitem__(self, key: tuple[int, list[int]]) -> _Item:
        S, C = self.img_size, self.source.in_chans
        images = _empty(len(key[1]), C, S, S, dtype=torch.float32)
        ids: list[int] = []
        labels: list[int] = []
        broken: dict[int, Broken] = {}
        reduction = partial(eval_reduction, img_size=S)
        for index in key[1]:
            read = _read(self.source, index, reduction, broken)
            if read is not None:
                image, label = read
                pixels = _to_float(eval_pixels(image, S))
                images[len(ids)] = to_normalized(pixels, self.augment)
                ids.append(index)
                labels.append(label)
        return _Item(images[: len(ids)], _int64(ids), _int64(labels), broken)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor to fill; in a worker in shared memory, where it has to go.

    Left to the queue's thread, the move costs a copy, and where the memory is full the batch is
    lost and the main process waits for it for ever.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.tensor([], dtype=dtype).set_(storage).view(shape)


def _int64(numbers: list[int]) -> Tensor:
    values = torch.tensor(numbers, dtype=torch.int64)
    return _empty(len(numbers), dtype=torch.int64).copy_(values)


def _read(
    source: Source, index: int, reduction: Reduction, broken: dict[int, Broken]
) -> tuple[Image.Image, int] | None:
    """Image `index` and its label, or None and an entry in `broken` when it cannot be read."""
    try:
        return source.read(index, reduction)
    # Pillow has no common base for what it raises on a damaged file.
    except Exception as error:
        broken[index] = _broken(error)
        return None


def _broken(error: Exception) -> Broken:
    if isinstance(error, UnfitImageError):
        return Broken(error.kind, str(error))
    if isinstance(error, UnidentifiedImageError):
        return Broken("no image", "it begins like none")
    reason = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, Image.DecompressionBombError):
        return Broken("too large", reason)
    # What the system says has a number, what Pillow says has none.
    if isinstance(error, OSError) and error.errno is not None:
        return Broken("not to be opened", error.strerror or reason)
    return Broken("damaged", reason)


def _to_float(pixels: NDArray[np.uint8]) -> Tensor:
    """Bytes [..., S, S, C] to fp32 [..., C, S, S] in [0, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).contiguous().float().div_(255)


class _Once(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


@contextmanager
def told_once() -> Iterator[None]:
    """Meanwhile the same is said once of images, however often they are read."""
    # All modules of the package share its logger.
    once = _Once()
    logger.addFilter(once)
    try:
        yield
    finally:
        logger.removeFilter(once)


class _BrokenImages:
    """Counts the distinct images that cannot be read, tells them by kind, stops at the limit."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source = source
        # At least one image must be left to stand in for the others.
        self.limit = min(limit, len(source) - 1)
        self.found: dict[int, Broken] = {}
        self.told = 0

    def add(self, broken: dict[int, Broken]) -> None:
        self.found |= broken
        if len(self.found) > self.limit:
            count = len(self.found)
            # The message says it all; `tell` would say it again.
            self.told = count
            raise DataError(
                f"{count} images cannot be read, at most {self.limit} may be (data.max_broken): "
                + "; ".join(self._kinds())
            )

    def tell(self) -> None:
        """One line per kind, if there is a new image since the last time."""
        if len(self.found) > self.told:
            self.told = len(self.found)
            for line in self._kinds():
                logger.warning("skipped %s", line)

    def _kinds(self) -> list[str]:
        kinds = sorted({broken.kind for broken in self.found.values()})
        return [self._line(kind) for kind in kinds]

    def _line(self, kind: str) -> str:
        of_kind = [
            f"{printable(self.source.name(index))} ({broken.reason})"
            for index, broken in sorted(self.found.items())
            if broken.kind == kind
        ]
        return f"{len(of_kind)} ({kind}): {listed(of_kind)}"

    def names(self) -> list[str]:
        return [self.source.name(index) for index in self.found]


class Loader:
    """Batches of augmented views for one rank.

    Batch b of an epoch holds images perm[b * B : (b + 1) * B] of the epoch's permutation, of which
    each rank gets a contiguous slice; a tail of fewer than B images is dropped. Images in memory
    are augmented in one go on the device where they lie; others (and images in memory with
    photometric changes) are decoded once per update by worker processes; their views travel as
    bytes, unless contrast or noise need floats. An image that cannot be read is replaced by the
    next one of the source that can.

    Raises:
        ConfigError: batch_size does not fit the number of images or of ranks.
    """

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        *,
        num_views: int,
        batch_size: int,
        img_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        max_broken: int = 10,
        device: torch.device | str = "cpu",
    ) -> None:
        """Args are those of the configuration; `batch_size` counts the images of all ranks.

        `device` is where the batches are wanted.
        """
        if batch_size > len(source):
            raise ConfigError(
                f"batch_size: expected at most the {len(source)} images there are, got {batch_size}"
            )
        if batch_size % world_size:
            raise ConfigError(
                f"batch_size: expected a multiple of the {world_size} ranks, got {batch_size}"
            )
        self.source = source
        self.augment = augment
        self.num_views = num_views
        self.batch_size = batch_size
        self.img_size = img_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._broken = _BrokenImages(source, max_broken)
        self._feed = Feed(device)
        self._schedule = _Schedule()
        photometric = any(
            view.jitter or view.blur or view.grayscale or view.solarize for view in augment.views
        )
        self._images: Tensor | None = None
        if isinstance(source, TensorSource):
            if not photometric:
                self._images = source.images
            source = source.to("cpu")
        self._decoded = _data_loader(
            _TrainingBatches(source, augment, img_size, num_views, seed, self._broken.limit),
            self._schedule,
            workers=0 if self._images is not None else workers,
            batch_bytes=4 * num_views * batch_size // world_size * source.in_chans * img_size**2,
            persistent=True,
        )

    @property
    def updates_per_epoch(self) -> int:
        """Batches in one epoch."""
        return len(self.source) // self.batch_size

    @property
    def broken(self) -> list[str]:
        """The images that this rank could not read so far."""
        return self._broken.names()

    def close(self) -> None:
        """End the workers now, also one that waits for a file system which does not answer."""
        workers = getattr(self._decoded._iterator, "_workers", [])
        for worker in workers:
            # The DataLoader would wait five seconds for each before it comes to this.
            worker.terminate()
        self._decoded._iterator = None

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from batch number `start` on; one pass at a time.

        Raises:
            DataError: more than `max_broken` images cannot be read.
        """
        order = permutation(len(self.source), seed=self.seed, epoch=epoch)
        local = self.batch_size // self.world_size
        parts = [
            order[b * self.batch_size + self.rank * local :][:local]
            for b in range(start, self.updates_per_epoch)
        ]
        if self._images is not None:
            made = self._augmented(self._images, parts, epoch)
        else:
            made = self._from_workers(parts, epoch)
        for views, sample_id, label in self._feed(made):
            if views.dtype == torch.uint8:
                views = bytes_to_normalized(views, self.augment)
            yield Batch(views, sample_id, label)

    def _augmented(
        self, images: Tensor, parts: list[Tensor], epoch: int
    ) -> Iterator[tuple[Tensor, ...]]:
        for sample_id in parts:
            on_device = sample_id.to(images.device)
            views = tensor_views(
                images[on_device],
                on_device,
                augment=self.augment,
                img_size=self.img_size,
                num_views=self.num_views,
                seed=self.seed,
                epoch=epoch,
            )
            if torch.cuda.is_available() and not views.is_cuda:
                views = views.pin_memory()
            yield views, sample_id, self.source.labels[sample_id]

    def _from_workers(self, parts: list[Tensor], epoch: int) -> Iterator[tuple[Tensor, ...]]:
        self._schedule.items = [(epoch, part.tolist()) for part in parts]
        try:
            for item in _items(self._decoded):
                self._broken.add(item.broken)
                yield item.pixels, item.sample_id, item.label
        finally:
            self._broken.tell()


class EvalBatches:
    """Iterates over (images [n, C, S, S] fp32, labels [n] int64); see `eval_batches`."""

    def __init__(
        self,
        source: Source,
        augment: AugmentConfig,
        *,
        img_size: int,
        batch_size: int,
        workers: int,
        max_broken: int,
        indices: Sequence[int] | None,
    ) -> None:
        self.source = source
        self.augment = augment
        self._broken = _BrokenImages(source, max_broken)
        wanted = torch.arange(len(source)) if indices is None else torch.tensor(indices)
        self._parts = torch.split(wanted, batch_size)
        schedule = _Schedule()
        schedule.items = [(0, part.tolist()) for part in self._parts]
        self._decoded = _data_loader(
            _EvaluationBatches(source, augment, img_size),
            schedule,
            workers=0 if isinstance(source, TensorSource) else workers,
            batch_bytes=4 * batch_size * source.in_chans * img_size**2,
            persistent=False,
        )

    @property
    def skipped(self) -> dict[int, str]:
        """Why images were left out, by index, in order; complete after a full pass."""
        return {index: broken.reason for index, broken in sorted(self._broken.found.items())}

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.source, TensorSource):
            yield from self._in_memory(self.source)
            return
        try:
            for item in _items(self._decoded):
                self._broken.add(item.broken)
                if len(item.sample_id):
                    yield item.pixels, item.label
        finally:
            self._broken.tell()

    def _in_memory(self, source: TensorSource) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._parts:
            images = source.images[part.to(source.images.device)]
            yield to_normalized(images.float() / 255, self.augment), source.labels[part]


def eval_batches(
    source: Source,
    augment: AugmentConfig,
    *,
    img_size: int,
    batch_size: int,
    workers: int = 0,
    max_broken: int = 10,
    indices: Sequence[int] | None = None,
) -> EvalBatches:
    """All images in the order of the source, as they are; the last batch may be smaller.

    Files are resized to a short side of img_size * 256 / 224 (bicubic) and the middle is cut out;
    images in memory are taken as they are. Both are normalised with the mean and std of `augment`.
    An image that cannot be read is left out, and the log has a line for each kind of them at the
    end; `EvalBatches.skipped` has their indices and reasons. With `indices` these images alone, in
    this order.

    Raises:
        DataError: while iterating, when more than `max_broken` images cannot be read.
    """
    return EvalBatches(
        source,
        augment,
        img_size=img_size,
        batch_size=batch_size,
        workers=workers,
        max_broken=max_broken,
        indices=indices,
    )


def permutation(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch, [N] int64: a function of (seed, epoch) alone."""
    key = seed + STREAM
    word = philox4x32((key & MASK32, key >> 32), (epoch, 0, 0, 0))[0]
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(int(word)))


def _items(decoded: DataLoader[_Item]) -> Iterator[_Item]:
    """What the workers hand over; their end, or that of their memory, in one line."""
    try:
        with _without_main():
            items = iter(decoded)
        yield from items
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1]
        if "DataLoader worker" not in what and "shared memory" not in what:
            raise
        room = ""
        if SHARED_MEMORY.is_dir():
            total, _, free = shutil.disk_usage(SHARED_MEMORY)
            room = f" ({SHARED_MEMORY} has {free / 2**20:.0f} of {total / 2**20:.0f} MiB free)"
        raise DataError(
            f"a worker that reads images ended: {what}{room}; lower data.workers, or give "
            f"{SHARED_MEMORY} and the process more memory"
        ) from error


def _check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Refuse workers whose batches do not fit where they have to go."""
    if not SHARED_MEMORY.is_dir():
        return
    # Those that workers are ahead, the one that is used and the one that is on its way.
    needed = (PREFETCH * workers + 2) * batch_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"data.workers: the batches of {workers} workers take {needed / 2**20:.0f} MiB of "
            f"{SHARED_MEMORY}, which has {free / 2**20:.0f} MiB free; lower data.workers "
            "(0 takes none) or make it larger (docker run --shm-size)"
        )


def _data_loader(
    dataset: _TrainingBatches | _EvaluationBatches,
    schedule: _Schedule,
    *,
    workers: int,
    batch_bytes: int,
    persistent: bool,
) -> DataLoader[_Item]:
    """A DataLoader whose items are whole batches, each made by one worker."""
    # More processes than cores only take turns, and torch warns of them.
    workers = min(workers, _num_cores())
    context = None
    if workers:
        dataset.source.check_workers()
        _check_shared_memory(workers, batch_bytes)
        # Forking this process would copy its locks, of CUDA and of OpenMP among others, in whatever
        # state they are. The fork server imports what follows once, so that a worker starts in
        # milliseconds all the same.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        _start_fork_server()
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=schedule,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_init_worker,
        multiprocessing_context=context,
        persistent_workers=persistent and workers > 0,
        # An own generator, or the DataLoader would advance the global one.
        generator=torch.Generator(),
    )


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not run the main program's file again.

    They need nothing of it: what a Dataset needs goes to them by value. So a script may train at
    its top level.
    """
    main: Any = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_fork_server() -> None:
    """Start the fork server, if there is none, with the stop signals blocked.

    Ctrl-C, launchers and schedulers send them to the whole process group. The main process decides
    what they mean; without the server, workers would take themselves for orphans and end while the
    main process still waits for their batches. What is blocked here stays blocked in the server,
    and waits for this process.
    """
    # It lifts the block again when it has to start, so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    """Let the main process, and nobody else, stop this worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """Wait until the main process is gone, or asks for the end as it does when it exits.

    The DataLoader watches the process that forked the worker, which is the fork server, and the
    server lives as long as its workers.
    """
    main = multiprocessing.parent_process()
    assert main is not None
    if sys.platform == "linux":
        asked = False
        while main.is_alive() and not asked:
            received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
            asked = received is not None and received.si_pid == main.pid
    else:
        # No word on who sent a signal here: a worker ends on anybody's request.
        main.join()
    os._exit(0)
