"""What a source of images is; and images that are held in memory."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

__all__ = ["Reduction", "Source", "TensorSource", "UnfitImageError"]


class UnfitImageError(ValueError):
    """A readable image that is not taken: `kind` says why in a word, the message in a line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


Reduction: TypeAlias = Callable[[int, int], int]


class Source(ABC):
    """A fixed, ordered set of images; the index of an image is its id everywhere."""

    labels: Tensor
    """[N] int64; -1 = no label."""
    class_names: list[str]
    """Name of each label; empty without labels."""

    def __len__(self) -> int:
        return len(self.labels)

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
