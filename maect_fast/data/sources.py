"""What a source of images is; and images that are held in memory."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from maect_fast.config import ConfigError
from maect_fast.names import listed, printable

__all__ = [
    "ORIGINAL_SIZE",
    "Names",
    "Reduction",
    "Source",
    "TensorSource",
    "UnfitImageError",
    "number_labels",
    "original_size",
]


class UnfitImageError(ValueError):
    """A readable image that is not taken: `kind` says why in a word, the message in a line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


# Where a decoded image is smaller than its file says, its `info` has width and height of that.
ORIGINAL_SIZE = "original_size"


def original_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of what a decoded image was made from."""
    width, height = image.info.get(ORIGINAL_SIZE, image.size)
    return width, height


Reduction: TypeAlias = Callable[[int, int], int]


class Source(ABC):
    """A fixed, ordered set of images; the index of an image is its id everywhere."""

    labels: Tensor
    """[N] int64; -1 = no label."""
    class_names: list[str]
    """Name of each label; empty without labels."""

    ignored: Mapping[str, int] = MappingProxyType({})
    """Beside the images, files of other kinds: how many there are of each suffix."""

    def __len__(self) -> int:
        return len(self.labels)

    def about(self) -> str:
        """How many images there are, and what else was found, in a line."""
        line = f"{len(self):,} images"
        if self.class_names:
            line += f" of {self.num_classes:,} classes"
        if not self.ignored:
            return line
        most = sorted(self.ignored.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{count:,} {printable(suffix) or 'without suffix'}" for suffix, count in most]
        return f"{line}; ignored: {listed(shown)}"

    @property
    def has_labels(self) -> bool:
        """Whether any image has one."""
        return bool((self.labels >= 0).any())

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    @abstractmethod
    def in_chans(self) -> int:
        """Channels of every image: 3 or 1."""

    @abstractmethod
    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Image `index` as a Pillow image of mode RGB or L; raises when it cannot be read.

        Args:
            index: which image.
            reduction: by how much an image of some width and height may be smaller than it is,
                where that makes decoding cheaper; None for the full size.
        """

    def read(self, index: int, reduction: Reduction | None = None) -> tuple[Image.Image, int]:
        """Image `index` as `decode` has it, with its label."""
        return self.decode(index, reduction), int(self.labels[index])

    def check_workers(self) -> None:  # noqa: B027 (most have nothing to refuse)
        """Refuse what no worker process could be given.

        Raises:
            ConfigError: says why, and what to do.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call image `index` in a message."""

    def identity(self, root: str | None) -> dict[str, Any]:
        """By which a run knows its images again: their number and a digest, plain values.

        Args:
            root: folder of the images; moved as a whole they are the same.
        """
        return {"number": len(self), "digest": self._digest(root)}

    @abstractmethod
    def _digest(self, root: str | None) -> str:
        """Hexadecimal, equal for equal images in the same order."""


@dataclass(frozen=True, eq=False)
class Names:
    """Many names as one byte tensor with end positions.

    Worker processes share it, where a list of a million strings would be copied to each of them as
    its reference counts change.
    """

    content: Tensor
    """All names one after another, uint8."""
    ends: Tensor
    """[N] int64, end of each in `content`."""

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """The given names, in their order; any bytes that a file's name can have."""
        encoded = [os.fsencode(name) for name in names]
        return cls(
            torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
            torch.tensor([len(name) for name in encoded]).cumsum(0),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.content[start : int(self.ends[index])].numpy().tobytes())

    def encoded(self) -> Iterator[bytes]:
        """All of them, as bytes."""
        content, ends = self.content.numpy().tobytes(), self.ends.tolist()
        return (content[a:b] for a, b in zip([0, *ends], ends, strict=False))


def number_labels(
    key: str,
    found: Sequence[int | str | None],
    names: Sequence[str] | None = None,
    *,
    known: Sequence[str] = (),
) -> tuple[Tensor, list[str]]:
    """Labels [N] and their names, from what stands beside the images.

    Args:
        key: what the setting is called that named the images.
        found: of each image a number, the name of a class, or None.
        names: those of the numbers, where they are stated; else the numbers in words.
        known: names of classes, by which those of these images are numbered; none for their own.

    Raises:
        ConfigError: a number without a name, or a class that is not `known`.
    """
    numbers = [label for label in found if isinstance(label, int)]
    if names is None:
        texts = {label for label in found if isinstance(label, str)}
        names = [str(number) for number in range(max(numbers, default=-1) + 1)]
        names += sorted(texts - set(names))
    if numbers and not -1 <= min(numbers) <= max(numbers) < len(names):
        wrong = min(numbers) if min(numbers) < -1 else max(numbers)
        raise ConfigError(
            f"{key}: expected labels from 0 to {len(names) - 1}, or -1 for none, got {wrong}"
        )
    own = [names[x] if isinstance(x, int) and x >= 0 else x for x in found]
    used = {label for label in own if isinstance(label, str)}
    unknown = sorted(used - set(known or names))
    if unknown:
        raise ConfigError(
            f"{key}: expected the classes of data.root, got {printable(unknown[0])!r} as well"
        )
    class_names = list(known or names) if used else []
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[label] if isinstance(label, str) else -1 for label in own]
    return torch.tensor(labels, dtype=torch.int64), class_names


@dataclass(frozen=True, eq=False)
class TensorSource(Source):
    """Images of one size held in memory."""

    labels: Tensor
    class_names: list[str]
    images: Tensor
    """[N, C, H, W] uint8."""

    @property
    def in_chans(self) -> int:
        """Channels of every image."""
        return self.images.shape[1]

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Image `index` as a Pillow image of mode RGB or L, at its full size."""
        pixels = self.images[index].cpu()
        if self.in_chans == 1:
            return Image.fromarray(pixels[0].numpy())
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())

    def name(self, index: int) -> str:
        """The index, in words."""
        return f"image {index}"

    def _digest(self, root: str | None) -> str:
        """Of the pixels."""
        digest = hashlib.sha256(repr(list(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "TensorSource":
        """The same images on another device; views are then computed there."""
        return TensorSource(
            labels=self.labels, class_names=self.class_names, images=self.images.to(device)
        )
