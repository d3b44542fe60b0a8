"""Batches of augmented views for training, and plain images for evaluation.

What a batch holds is a function of (seed, epoch, batch number) alone: the number of workers, the
number of ranks and where a run was resumed change nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
from maect_fast.data.broken import Broken, BrokenImages, read_image
from maect_fast.data.feed import Feed
from maect_fast.data.sources import Source, TensorSource
from maect_fast.data.workers import Schedule, data_loader, empty, handed_over
from maect_fast.kernels._common.philox import MASK32, philox4x32

__all__ = ["Batch", "EvalBatches", "Loader", "TrainingBatches", "eval_batches"]

# The stream of epoch permutations among those of one run's seed.
STREAM = 3 << 32


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of one update's images, on the loader's device."""

    views: Tensor
    """[V, n, C, H, W] fp32, normalised."""
    sample_id: Tensor
    """[n] int64, index of each image in its source."""
    label: Tensor
    """[n] int64; -1 = no label."""


@dataclass(frozen=True, slots=True)
class _Item:
    """What a worker hands over for one batch."""

    pixels: Tensor
    """[V, n, C, S, S] fp32, or uint8 that is still to be normalised; for evaluation [n, C, S, S]
    uint8. Void if too many are broken."""
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


@dataclass(frozen=True)
class TrainingBatches:
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
        dtype = torch.uint8 if self.stays_bytes else torch.float32
        views = empty(self.num_views, len(indices), C, S, S, dtype=dtype)
        ids, labels = list(indices), [-1] * len(indices)
        broken: dict[int, Broken] = {}
        draws = self._draws(ids, epoch, NOISE)
        reduction = partial(view_reduction, augment=self.augment, img_size=S)
        for row, index in enumerate(indices):
            read = read_image(self.source, index, reduction, broken)
            while read is None:
                if len(broken) > self.max_broken:
                    return _Item(views, _int64(ids), _int64(labels), broken)
                ids[row] = (ids[row] + 1) % len(self.source)
                read = read_image(self.source, ids[row], reduction, broken)
            image, labels[row] = read
            own = draws[:, row : row + 1]
            if self.augment.noise or ids[row] != index:
                own = self._draws([ids[row]], epoch, num_draws(self.augment, C * S * S))
            views[:, row] = self.make_views(image, own)
        return _Item(views, _int64(ids), _int64(labels), broken)

    @property
    def stays_bytes(self) -> bool:
        """Whether views are handed over as bytes.

        They are a quarter, to the main process and to the device, where the rest is done.
        """
        return not self.augment.contrast and not self.augment.noise

    def make_views(self, image: Image.Image, draws: Tensor) -> Tensor:
        """One image's, [V, C, S, S], of its numbers [V, 1, T, 4]."""
        numbers = draws[:, 0, :NOISE].tolist()
        pixels = image_views(image, numbers, self.augment, self.img_size)
        if self.stays_bytes:
            return torch.from_numpy(pixels).movedim(-1, -3)
        # One image at a time stays in the cache.
        return finish_views(_to_float(pixels)[:, None], draws, self.augment)[:, 0]

    def _draws(self, ids: list[int], epoch: int, num: int) -> Tensor:
        return draw(self.seed, torch.tensor(ids), epoch=epoch, num_views=self.num_views, num=num)


@dataclass(frozen=True)
class _EvaluationBatches:
    """Decodes, resizes and crops the middle; broken images are left out. Runs in a worker."""

    source: Source
    augment: AugmentConfig
    img_size: int

    def __getitem__(self, key: tuple[int, list[int]]) -> _Item:
        S, C = self.img_size, self.source.in_chans
        images = empty(len(key[1]), C, S, S, dtype=torch.uint8)
        ids: list[int] = []
        labels: list[int] = []
        broken: dict[int, Broken] = {}
        reduction = partial(eval_reduction, img_size=S)
        for index in key[1]:
            read = read_image(self.source, index, reduction, broken)
            if read is not None:
                image, label = read
                images[len(ids)] = torch.from_numpy(eval_pixels(image, S)).movedim(-1, -3)
                ids.append(index)
                labels.append(label)
        return _Item(images[: len(ids)], _int64(ids), _int64(labels), broken)


def _int64(numbers: list[int]) -> Tensor:
    values = torch.tensor(numbers, dtype=torch.int64)
    return empty(len(numbers), dtype=torch.int64).copy_(values)


def _to_float(pixels: NDArray[np.uint8]) -> Tensor:
    """Bytes [..., S, S, C] to fp32 [..., C, S, S] in [0, 1]."""
    return torch.from_numpy(pixels).movedim(-1, -3).contiguous().float().div_(255)


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
        self._broken = BrokenImages(source, max_broken)
        self._feed = Feed(device)
        self._schedule = Schedule()
        photometric = any(
            view.jitter or view.blur or view.grayscale or view.solarize for view in augment.views
        )
        self._images: Tensor | None = None
        if isinstance(source, TensorSource):
            if not photometric:
                self._images = source.images
            source = source.to("cpu")
        self.work = TrainingBatches(source, augment, img_size, num_views, seed, self._broken.limit)
        self._decoded = data_loader(
            self.work,
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
    def is_in_memory(self) -> bool:
        """Whether no image is decoded, so that views are made in batches, by no worker."""
        return self._images is not None

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
        yield from self.handed_over(made)

    def handed_over(self, made: Iterable[tuple[Tensor, ...]]) -> Iterator[Batch]:
        """Views, ids and labels on the device, where views that come as bytes are normalised."""
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
            for item in handed_over(self._decoded):
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
        device: torch.device | str,
    ) -> None:
        self.source = source
        self.augment = augment
        self._feed = Feed(device)
        self._broken = BrokenImages(source, max_broken)
        wanted = torch.arange(len(source)) if indices is None else torch.tensor(indices)
        self._parts = torch.split(wanted, batch_size)
        schedule = Schedule()
        schedule.items = [(0, part.tolist()) for part in self._parts]
        self._decoded = data_loader(
            _EvaluationBatches(source, augment, img_size),
            schedule,
            workers=0 if isinstance(source, TensorSource) else workers,
            batch_bytes=batch_size * source.in_chans * img_size**2,
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
        for images, label in self._feed(self._from_workers()):
            yield bytes_to_normalized(images, self.augment), label

    def _from_workers(self) -> Iterator[tuple[Tensor, ...]]:
        try:
            for item in handed_over(self._decoded):
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
    device: torch.device | str = "cpu",
) -> EvalBatches:
    """All images in the order of the source, as they are; the last batch may be smaller.

    Files are resized to a short side of img_size * 256 / 224 (bicubic) and the middle is cut out;
    images in memory are taken as they are. Both are normalised with the mean and std of `augment`;
    files on the `device`, to which they travel as bytes.
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
        device=device,
    )


def permutation(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the images in an epoch, [N] int64: a function of (seed, epoch) alone."""
    key = seed + STREAM
    word = philox4x32((key & MASK32, key >> 32), (epoch, 0, 0, 0))[0]
    return torch.randperm(num_images, generator=torch.Generator().manual_seed(int(word)))
