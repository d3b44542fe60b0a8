"""Where images come from: a folder of files, scikit-learn's digits, or synthetic patterns.

Legend: N images, C channels, H and W pixels, K waves per class.
"""

import hashlib
import heapq
import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from maect_fast.config import ConfigError, DataConfig, EncoderConfig
from maect_fast.names import is_utf8, listed, printable
from maect_fast.tensor_file import open_regular

__all__ = [
    "FolderSource",
    "Reduction",
    "Source",
    "TensorSource",
    "UnfitImageError",
    "build_source",
]

logger = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
# Pillow goes by the content and knows forty more, of which EPS runs another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# An encoder writes about ten; each costs a pass over all coefficients, however few bytes it has.
MAX_SCANS = 100
# Pillow reads Netpbm's numbers in letters one by one, in about the time of so many pixels.
TEXT = 16
# TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC, TILE_WIDTH, TILE_LENGTH = 258, 262, 322, 323
WHITE_IS_ZERO = 0
DIGITS_SIZE = 8
DIGITS_TEST = 360
SYNTHETIC_CLASSES = 10
SYNTHETIC_WAVES = 3
SYNTHETIC_CHUNK = 64
# Files of which a folder's digest has the size too: asking for all of a million takes minutes on a
# network file system.
SIZED_FILES = 10_000


class UnfitImageError(ValueError):
    """A readable image that is not taken: `kind` says why in a word, the message in a line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


Reduction: TypeAlias = Callable[[int, int], int]


@dataclass(frozen=True, eq=False)
class Source(ABC):
    """A fixed, ordered set of images; the index of an image is its id everywhere."""

    labels: Tensor
    """[N] int64; -1 = no label."""
    class_names: list[str]
    """Name of each label; empty without labels."""

    def __len__(self) -> int:
        return len(self.labels)

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


@dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, decoded on demand.

    The paths are one byte tensor with end positions rather than a list of strings: worker processes
    then share them, where a list of a million strings would be copied to every worker as its
    reference counts change.
    """

    path_bytes: Tensor
    """All paths one after another, uint8."""
    path_ends: Tensor
    """[N] int64, end of each path in `path_bytes`."""
    channels: int
    """Channels to decode to: 3 or 1."""
    max_pixels: int
    """Pixels of the largest image that is decoded."""

    @classmethod
    def from_paths(
        cls,
        paths: Iterable[str],
        *,
        labels: Tensor,
        class_names: list[str],
        in_chans: int,
        max_pixels: int,
    ) -> "FolderSource":
        """A source of the given files, in the given order."""
        encoded = [os.fsencode(path) for path in paths]
        return cls(
            labels=labels,
            class_names=class_names,
            path_bytes=torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8),
            path_ends=torch.tensor([len(path) for path in encoded]).cumsum(0),
            channels=in_chans,
            max_pixels=max_pixels,
        )

    @property
    def in_chans(self) -> int:
        """Channels of every decoded image."""
        return self.channels

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Read file `index`.

        Transparency and EXIF orientation are ignored, as torchvision's `ImageFolder` does. Grey
        images deeper than 8 bits are scaled by their format's range (16 bits, or a PGM's maxval),
        where Pillow's own conversion would clip them at 255. A JPEG is decoded at 1/2, 1/4 or 1/8
        of its size, by libjpeg's scaled inverse transform, as far as `reduction` allows.

        Raises:
            Exception: whatever Pillow raises on a file that it cannot read in full.
            UnfitImageError: more pixels than `max_pixels`, or grey values without a range.
        """
        mode = "RGB" if self.channels == 3 else "L"
        # Pillow warns of odd metadata, palettes with transparency and very large pictures; it
        # decodes them all the same.
        with warnings.catch_warnings(), open_regular(self.name(index)) as file:
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(file, formats=FORMATS)
            self._limit(image, file, reduction)
            image = _eight_bits(image, file)
            image.load()
            return image if image.mode == mode else image.convert(mode)

    def _limit(self, image: Image.Image, file: IO[bytes], reduction: Reduction | None) -> None:
        """Choose a JPEG's scale, and refuse what would take too much memory or time."""
        width, height = image.size
        held, what = width * height, f"{width} x {height} pixels"
        if image.format in ("JPEG", "MPO"):
            factor = 1 if reduction is None else reduction(width, height)
            if factor > 1:
                image.draft(None, (width // factor, height // factor))
            # A progressive one's coefficients are all held, whatever the scale.
            if "progressive" in image.info:
                _check_scans(file)
            else:
                held = image.width * image.height
        if isinstance(image, PpmImageFile) and image.tile[0][0] == "ppm_plain":
            held, what = held * TEXT, f"{what} in letters ({TEXT} times the work)"
        if isinstance(image, TiffImageFile):
            tile = [image.tag_v2.get(tag, 0) for tag in (TILE_WIDTH, TILE_LENGTH)]
            if math.prod(tile) > held:
                held, what = math.prod(tile), f"a tile of {tile[0]} x {tile[1]} pixels"
        if held > self.max_pixels:
            raise UnfitImageError(
                "too large",
                f"{what}, more than data.max_pixels = {self.max_pixels}",
            )

    def name(self, index: int) -> str:
        """The path of file `index`."""
        start = int(self.path_ends[index - 1]) if index else 0
        return os.fsdecode(self.path_bytes[start : int(self.path_ends[index])].numpy().tobytes())

    def _digest(self, root: str | None) -> str:
        """Of all names below `root`, and of the sizes of 10,000 files spread over them."""
        above = len(os.fsencode(os.path.join(root, ""))) if root else 0
        paths, ends = self.path_bytes.numpy().tobytes(), self.path_ends.tolist()
        digest = hashlib.sha256()
        step = -(-len(ends) // SIZED_FILES)
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            path = paths[start:end]
            digest.update(path[above:] + b"\0")
            if index % step == 0:
                digest.update(b"%d\0" % os.stat(path).st_size)
        return digest.hexdigest()


def _check_scans(file: IO[bytes]) -> None:
    """Refuse a progressive JPEG of more scans than any encoder writes."""
    position = file.tell()
    file.seek(0)
    scans, last = 0, b""
    while part := file.read(1 << 20):
        # Within a scan, 0xFF is followed by 0.
        scans += (last + part).count(b"\xff\xda")
        last = part[-1:]
    file.seek(position)
    if scans > MAX_SCANS:
        raise UnfitImageError("too large", f"a JPEG of {scans} scans, at most {MAX_SCANS}")


def _netpbm(image: PpmImageFile, file: IO[bytes]) -> Image.Image:
    """A PGM or PPM whose white is not 255, scaled to 8 bits; others as they are.

    Pillow does this in Python, pixel by pixel: 28 s for 33 million.
    """
    codec, _, offset, arguments = image.tile[0]
    width, height = image.size
    if codec != "ppm":
        return image.point(lambda value: value / 256).convert("L") if image.mode == "I" else image
    white = cast("tuple[str, int]", arguments)[1]
    dtype = np.dtype(">u2" if white > 255 else "u1")
    table = (np.minimum(np.arange(256**dtype.itemsize), white) * (255 / white)).round()
    table = table.astype(np.uint8)
    pixels = np.empty((height, width, len(image.getbands())), np.uint8)
    file.seek(offset)
    for row in pixels:
        content = file.read(row.size * dtype.itemsize)
        if len(content) < row.size * dtype.itemsize:
            raise ValueError("the file ends within the image")
        row[:] = table[np.frombuffer(content, dtype)].reshape(row.shape)
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _eight_bits(image: Image.Image, file: IO[bytes]) -> Image.Image:
    """The image with values of more than 8 bits scaled to 8, others as they are.

    Raises:
        UnfitImageError: 32-bit integers or floats, of which no format says where white is.
    """
    if isinstance(image, PpmImageFile):
        return _netpbm(image, file)
    if image.mode.startswith("I;16"):
        bits, is_negative = 16, False
        if isinstance(image, TiffImageFile):
            bits = image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0]
            is_negative = image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
        values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
        return Image.fromarray(~values if is_negative else values)
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise UnfitImageError(
            "too deep", f"32-bit {kind}, of which no format says what is white; save as 16 bits"
        )
    return image


def build_source(
    data: DataConfig, encoder: EncoderConfig, *, split: Literal["train", "test"]
) -> Source:
    """The images of one split, in a fixed order.

    A folder's images are all regular files below it with an image extension, sorted by path; hidden
    files and folders are left out, linked folders followed, and no folder is listed twice. If every
    image lies in a sub-folder and there are at least two of them, the top-level sub-folders are the
    classes; otherwise no image has a label. A test folder's classes are numbered by the training
    folder's names.

    Raises:
        ConfigError: no folder given, the folder is missing or holds no image, its classes do not
            fit those of the training folder, or the encoder's input does not fit the images.
    """
    if data.source == "digits":
        return _digits(encoder, split)
    if data.source == "synthetic":
        return _synthetic(data, encoder, split)
    return _folder(data, encoder, split)


def _folder(data: DataConfig, encoder: EncoderConfig, split: Literal["train", "test"]) -> Source:
    if encoder.in_chans not in (1, 3):
        raise ConfigError(f"encoder.in_chans: expected 3 or 1, got {encoder.in_chans}")
    key, root = ("data.root", data.root) if split == "train" else ("data.test_root", data.test_root)
    files = _list_images(key, root)
    class_names = _classes(files)
    known = _classes(_list_images("data.root", data.root)) if split == "test" and data.root else []
    if known:
        folders = _top_folders(files)
        class_names = known if folders else []
        unknown = [name for name in folders if name not in known]
        if unknown:
            raise ConfigError(
                f"data.test_root: expected the class folders of data.root ({data.root}),"
                f" got {unknown[0]!r} as well"
            )
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[file.split(os.sep, 1)[0]] if class_names else -1 for file in files]
    return FolderSource.from_paths(
        (os.path.join(str(root), file) for file in files),
        labels=torch.tensor(labels),
        class_names=class_names,
        in_chans=encoder.in_chans,
        max_pixels=data.max_pixels,
    )


def _list_images(key: str, root: str | None) -> list[str]:
    """All image files below `root`, relative to it, sorted."""
    if root is None:
        raise ConfigError(
            f"{key}: expected a folder of images, got none; pass {key}=/path/to/images"
        )
    if not Path(root).is_dir():
        raise ConfigError(
            f"{key}: there is no folder {root!r}; pass {key}=/path/to/images"
            " (or data.source=digits for images that need no files)"
        )

    if not is_utf8(root):
        raise ConfigError(f"{key}: expected a path in UTF-8, got {printable(root)!r}")
    files, odd, repeated = _walk(key, root)
    for names, kind in (
        (odd, "pipes, sockets, devices, links that lead nowhere"),
        (repeated, "links to a folder that is listed already, or that is around them"),
    ):
        if names:
            logger.warning("%s: left out %d (%s): %s", key, len(names), kind, listed(sorted(names)))
    if not files:
        raise ConfigError(
            f"{key}: no image in {root!r} or below; expected files that end in"
            f" {', '.join(sorted(EXTENSIONS))}"
        )
    return sorted(files)


def _walk(key: str, root: str) -> tuple[list[str], list[str], list[str]]:
    """All image files below `root`, relative to it, and the names left out of the list.

    Each real directory is listed once, under its own path if that lies below `root`, else under the
    first link to it. A link to a directory around it is not followed: what lies beside `root` is
    not meant.

    Returns:
        Regular files; names that end like images and are none; links not followed.
    """
    files: list[str] = []
    odd: list[str] = []
    repeated: list[str] = []
    links, seen = [""], set()
    real_root = os.path.realpath(root)
    while links:
        # Links wait until everything that is reached without them has its name.
        pending = [heapq.heappop(links)]
        while pending:
            below = pending.pop()
            folder = os.path.join(root, below) if below else root
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    repeated.append(below)
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except OSError as error:
                raise ConfigError(
                    f"{key}: cannot read the folder {error.filename!r}: {error.strerror}"
                ) from error
            for entry in entries:
                path = os.path.join(below, entry.name)
                if entry.name.startswith("."):
                    continue
                if _holds(entry.is_dir):
                    if not entry.is_symlink():
                        pending.append(path)
                    elif _is_around(entry.path, (folder, real_root)):
                        repeated.append(path)
                    else:
                        heapq.heappush(links, path)
                elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    (files if _holds(entry.is_file) else odd).append(path)
    return files, odd, repeated


def _holds(check: Callable[[], bool]) -> bool:
    """The check's answer; no, where it cannot be made, as of a link to itself."""
    try:
        return check()
    except OSError:
        return False


def _is_around(link: str, folders: Iterable[str]) -> bool:
    """True if the link leads to one of the folders, or to one that holds it."""
    target = os.path.realpath(link)
    return any(os.path.commonpath((target, os.path.realpath(f))) == target for f in folders)


def _top_folders(files: list[str]) -> list[str]:
    """The first folder of each relative path, sorted; none if a file lies outside of any."""
    if any(os.sep not in file for file in files):
        return []
    return sorted({file.split(os.sep, 1)[0] for file in files})


def _classes(files: list[str]) -> list[str]:
    """The class names of a set of relative paths."""
    names = _top_folders(files)
    # One folder around everything says nothing about the images.
    return names if len(names) > 1 else []


def _digits(encoder: EncoderConfig, split: Literal["train", "test"]) -> TensorSource:
    """The 1,797 digits of scikit-learn, shuffled once: 1,437 to train and 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.utils import shuffle

    if (encoder.img_size, encoder.in_chans) != (DIGITS_SIZE, 1):
        raise ConfigError(
            "encoder.img_size, encoder.in_chans: expected 8, 1 (the digits are 8x8 and grey),"
            f" got {encoder.img_size}, {encoder.in_chans}"
        )
    pixels, labels = load_digits(return_X_y=True)
    # In their own order the last digits come from other writers than the first. With this seed raw
    # pixels reach 0.983 in k-NN and 0.958 in logistic regression: a baseline that is hard to beat.
    order = torch.tensor(shuffle(range(len(labels)), random_state=1))
    chosen = order[:-DIGITS_TEST] if split == "train" else order[-DIGITS_TEST:]
    # The digits count ink in 0..16.
    images = (torch.from_numpy(pixels) * (255 / 16)).round().to(torch.uint8)
    return TensorSource(
        labels=torch.from_numpy(labels).long()[chosen],
        class_names=[str(digit) for digit in range(10)],
        images=images.view(-1, 1, DIGITS_SIZE, DIGITS_SIZE)[chosen],
    )


def _synthetic(
    data: DataConfig, encoder: EncoderConfig, split: Literal["train", "test"]
) -> TensorSource:
    """Coloured waves.

    Directions and frequencies of three waves belong to the class; their phases and colours, and a
    fourth wave, to the image. A phase moves a wave across the picture, so single pixels say little
    about the class.
    """
    if data.num_images < 1:
        raise ConfigError(f"data.num_images: expected at least 1, got {data.num_images}")
    N = data.num_images if split == "train" else max(1, data.num_images // 4)
    K, C, size = SYNTHETIC_WAVES, encoder.in_chans, encoder.img_size
    classes = torch.Generator().manual_seed(0)
    samples = torch.Generator().manual_seed(1 if split == "train" else 2)
    labels = torch.arange(N) % SYNTHETIC_CLASSES
    waves = torch.cat((_waves(SYNTHETIC_CLASSES, K, classes)[labels], _waves(N, 1, samples)), dim=1)
    phase = torch.rand(N, K + 1, 1, generator=samples) * (2 * math.pi)
    colour = torch.rand(N, K + 1, C, 1, generator=samples) * 2 - 1
    position = torch.arange(size) / size * (2 * math.pi)
    images = torch.empty(N, C, size, size, dtype=torch.uint8)
    for start in range(0, N, SYNTHETIC_CHUNK):
        part = slice(start, start + SYNTHETIC_CHUNK)
        # exp(i (x + y)) = exp(ix) exp(iy): one row and one column per wave instead of a picture of
        # cosines.
        row = torch.exp(1j * (waves[part, :, :1] * position + phase[part]))
        column = torch.exp(1j * (waves[part, :, 1:] * position))[:, :, None] * colour[part]
        pixels = torch.einsum(
            "nkch,nkw->nchw",
            torch.cat((column.real, -column.imag), dim=1),
            torch.cat((row.real, row.imag), dim=1),
        )
        images[part] = pixels.mul_(127.5 / 2).add_(127.5).clamp_(0, 255).to(torch.uint8)
    return TensorSource(
        labels=labels, class_names=[f"waves {c}" for c in range(SYNTHETIC_CLASSES)], images=images
    )


def _waves(num: int, waves: int, generator: torch.Generator) -> Tensor:
    """Random wave vectors in cycles per picture, [num, waves, 2], of a length in [1, 4)."""
    angle = torch.rand(num, waves, generator=generator) * math.pi
    cycles = 1 + 3 * torch.rand(num, waves, generator=generator)
    return torch.stack((cycles * angle.cos(), cycles * angle.sin()), dim=-1)
