"""A PyTorch Dataset as a source of images."""

import hashlib
import io
import logging
import pickle
from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from maect_fast.config import ConfigError, DataConfig, EncoderConfig
from maect_fast.data.decode import eight_bits
from maect_fast.data.sources import Reduction, Source, UnfitImageError
from maect_fast.names import listed, one_line

__all__ = ["DatasetSource", "from_dataset"]

logger = logging.getLogger(__package__)

# Images by whose pixels a Dataset is known again; it has no names, and to load all takes an epoch.
SAMPLED = 16
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def from_dataset(dataset: Any, data: DataConfig, encoder: EncoderConfig) -> "DatasetSource":
    """The images of a map-style `torch.utils.data.Dataset`, for `Loader` and `eval_batches`.

    Args:
        dataset: its items are (image, label) or an image alone; an image is a Pillow image or
            uint8: an array [H, W] or [H, W, C], or a tensor [C, H, W], with 1, 3 or 4 channels;
            a label is an integer, or None. An item must be the same whenever it is read: random
            views are made here, from the run's seed, so that a run resumes exactly. Labels are
            read from `targets` or `labels` where it has them, else from the items, and names from
            `classes`; `Subset` and `ConcatDataset` are looked into. Of a Hugging Face `Dataset` the
            columns of the types Image and ClassLabel are taken.
        data: gives the largest image that is taken, `max_pixels`, and the names of columns.
        encoder: says to how many channels images are converted.

    Raises:
        ConfigError: it has no length or is empty, its first item is none of these, or items differ
            from one reading to the next.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise ConfigError(
            "data: expected a map-style Dataset (with __len__ and __getitem__), got a "
            f"{type(dataset).__name__}"
        )
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise ConfigError(f"data: expected a Dataset that has images, {_name(dataset)} has none")
    if hasattr(dataset, "features") and hasattr(dataset, "column_names"):
        dataset = _Columns(dataset, data.image_column, data.label_column)
    source = DatasetSource(dataset, encoder.in_chans, data.max_pixels)
    try:
        first, again = (list(source.samples(4)) for _ in range(2))
    except Exception as error:
        raise ConfigError(
            f"data: {_name(dataset)} does not give its first images: {one_line(error)}"
        ) from error
    if first != again:
        raise ConfigError(
            f"data: an image of {_name(dataset)} is another one when it is read again; leave "
            "random transforms out, views are made by augment.*"
        )
    return source


class _Columns:
    """Two columns of a Hugging Face Dataset, as a Dataset of (image, label)."""

    def __init__(self, dataset: Any, image: str | None, label: str | None) -> None:
        kinds = {name: type(kind).__name__ for name, kind in dataset.features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        if image is None and len(images) != 1:
            raise ConfigError(
                f"data: expected one column of the type Image, got {listed(images) or 'none'} of "
                f"{listed(list(kinds))}; say which with data.image_column"
            )
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        self.image = images[0] if image is None else image
        self.label = label or next(iter(labels), None)
        self.dataset = dataset
        if self.label is not None:
            self.targets = list(dataset[self.label])
            self.classes = getattr(dataset.features[self.label], "names", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int | None]:
        row = self.dataset[index]
        return row[self.image], None if self.label is None else row[self.label]


@dataclass(frozen=True, eq=False)
class DatasetSource(Source):
    """Images of a map-style Dataset; see `from_dataset`."""

    dataset: Any
    channels: int
    """Channels to convert to: 3 or 1."""
    max_pixels: int
    """Pixels of the largest image that is taken."""

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def in_chans(self) -> int:
        """Channels of every image."""
        return self.channels

    @cached_property
    def _stated_labels(self) -> Tensor | None:
        """Those that are known without loading images."""
        return _stated_labels(self.dataset)

    @property
    def has_labels(self) -> bool:
        """Whether any image has one; where none are stated, whether the first one has."""
        if self._stated_labels is not None:
            return bool((self._stated_labels >= 0).any())
        return self.read(0)[1] >= 0

    @cached_property
    def labels(self) -> Tensor:  # type: ignore[override]
        """[N] int64; -1 = no label. Loads all images where the Dataset does not state them."""
        if self._stated_labels is not None:
            return self._stated_labels
        if not self.has_labels:
            return torch.full((len(self),), -1)
        logger.warning(
            "data: %s has neither `targets` nor `labels`, so all of its %d images are loaded to "
            "learn their labels",
            _name(self.dataset),
            len(self),
        )
        return torch.tensor([_parts(self.dataset[i])[1] for i in range(len(self))])

    @cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """The Dataset's `classes`, or the numbers in words."""
        names = _classes(self.dataset)
        if names is not None or not self.has_labels:
            return names or []
        return [str(label) for label in range(int(self.labels.max()) + 1)]

    def read(self, index: int, reduction: Reduction | None = None) -> tuple[Image.Image, int]:
        """Image `index`, at its full size, with its label."""
        image, label = _parts(self.dataset[index])
        return _converted(image, self.channels, self.max_pixels), label

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Image `index`, at its full size."""
        return self.read(index)[0]

    def name(self, index: int) -> str:
        """The index, in words."""
        return f"image {index}"

    def samples(self, count: int) -> Iterator[bytes]:
        """Digests of up to `count` images, spread over all, with their labels."""
        for index in range(0, len(self), -(-len(self) // count)):
            image, label = self.read(index)
            pixels = hashlib.sha256(image.tobytes()).hexdigest()
            yield f"{image.size} {pixels} {label}".encode()

    def _digest(self, root: str | None) -> str:
        """Of the length and the pixels of 16 images."""
        digest = hashlib.sha256(b"%d" % len(self))
        for sample in self.samples(SAMPLED):
            digest.update(sample)
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        """For a worker, by value where it could not import it."""
        content = _by_value(self.dataset)
        return _from_value, (type(self), content, self.channels, self.max_pixels)

    def check_workers(self) -> None:
        """Refuse a Dataset that cannot be pickled."""
        try:
            _Trial().dump(self.dataset)
        # Whatever objects of users raise.
        except Exception as error:
            raise ConfigError(
                f"data.workers: {_name(self.dataset)} cannot go to worker processes "
                f"({type(error).__name__}: {one_line(error)}); open what cannot be copied when the "
                "first image is read, or take data.workers=0"
            ) from error


class _ByValue(cloudpickle.Pickler):  # type: ignore[misc]
    """Takes what is defined in a notebook or a script along, and shares tensors' memory."""

    def __init__(self, file: Any) -> None:
        # multiprocessing's own, among them PyTorch's. The pickler looks once, when it is made.
        shared: Any = ForkingPickler(io.BytesIO()).dispatch_table
        self.dispatch_table: Any = ChainMap(shared, cloudpickle.Pickler.dispatch_table)
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)


def _by_value(dataset: Any) -> bytes:
    buffer = io.BytesIO()
    _ByValue(buffer).dump(dataset)
    return buffer.getvalue()


def _from_value(
    kind: type[DatasetSource], content: bytes, channels: int, max_pixels: int
) -> DatasetSource:
    return kind(pickle.loads(content), channels, max_pixels)


class _Nowhere:
    """Takes what is written, and forgets it."""

    def write(self, content: Any) -> int:
        return len(content)


class _Trial(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles to nowhere."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), protocol=pickle.HIGHEST_PROTOCOL)

    def persistent_id(self, value: Any) -> str | None:
        """Something for what need not be tried, which may be large."""
        return "plain" if isinstance(value, Tensor | np.ndarray | bytes) else None


def _name(dataset: Any) -> str:
    return type(dataset).__name__


def _stated_labels(dataset: Any) -> Tensor | None:
    """[N] int64 from a Dataset's attributes; None where it has none of one integer per image."""
    if isinstance(dataset, Subset):
        whole = _stated_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [_stated_labels(part) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    stated: Any = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1:
        stated = dataset.tensors[1]
    try:
        labels = torch.as_tensor(np.asarray(stated))
    except (TypeError, ValueError):
        return None
    is_integer = not labels.is_floating_point() and labels.dtype != torch.bool
    return labels.long() if is_integer and labels.shape == (len(dataset),) else None


def _classes(dataset: Any) -> list[str] | None:
    if isinstance(dataset, Subset):
        return _classes(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return _classes(dataset.datasets[0])
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def _parts(item: Any) -> tuple[Any, int]:
    """Image and label of an item."""
    if not isinstance(item, tuple | list):
        return item, -1
    if len(item) not in (1, 2):
        raise UnfitImageError(
            "no image", f"expected (image, label) or an image, got {len(item)} things"
        )
    label: Any = item[1] if len(item) == 2 else None
    if label is None:
        return item[0], -1
    try:
        number = label.__index__()
    except (AttributeError, TypeError) as error:
        kind = type(label).__name__
        raise UnfitImageError("no label", f"expected an integer label, got a {kind}") from error
    return item[0], int(number)


def _converted(image: Any, channels: int, max_pixels: int) -> Image.Image:
    """As a Pillow image of mode RGB or L."""
    whole = image if isinstance(image, Image.Image) else _from_array(image)
    if whole.width * whole.height > max_pixels:
        raise UnfitImageError(
            "too large",
            f"{whole.width} x {whole.height} pixels, more than data.max_pixels = {max_pixels}",
        )
    mode = "RGB" if channels == 3 else "L"
    whole = eight_bits(whole)
    return whole if whole.mode == mode else whole.convert(mode)


def _from_array(pixels: Any) -> Image.Image:
    if isinstance(pixels, Tensor):
        array: Any = (pixels.movedim(0, -1) if pixels.ndim == 3 else pixels).cpu().numpy()
    elif isinstance(pixels, np.ndarray):
        array = pixels
    else:
        raise UnfitImageError(
            "no image",
            "expected a Pillow image, a uint8 array or a uint8 tensor, got a "
            f"{type(pixels).__name__}",
        )
    if array.dtype != np.uint8:
        raise UnfitImageError(
            "no bytes",
            f"expected uint8 pixels, got {array.dtype}; leave ToTensor and Normalize out, the "
            "recipe normalises",
        )
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in MODES:
        raise UnfitImageError(
            "no image",
            "expected an array [H, W, C] or a tensor [C, H, W] of 1, 3 or 4 channels, got "
            f"{list(pixels.shape)}",
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))
