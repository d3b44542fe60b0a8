"""Packs: images made small once, side by side in one file that is mapped to memory.

A pack is a safetensors file, so that other programs can read it:

    pixels [bytes] uint8           of each image rows of RGB or, where it has no colour, of grey
    end [N] int64                  where its pixels end
    size [N, 2] int64              its width and height here
    original_size [N, 2] int64     those that it had
    label [N] int64                -1 = none
    name, name_end                 all names one after another, and where each ends
    classes                        names of the classes, JSON

and as metadata `format` and `short_side`.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from maect_fast.checkpoint import write_atomically
from maect_fast.config import ConfigError
from maect_fast.data.augment import BICUBIC, reduction_to
from maect_fast.data.broken import Broken, BrokenImages, DataError, read_image
from maect_fast.data.sources import (
    ORIGINAL_SIZE,
    Names,
    Reduction,
    Source,
    number_labels,
    original_size,
)
from maect_fast.data.workers import Schedule, data_loader, empty, handed_over
from maect_fast.names import one_line, printable

__all__ = ["SUFFIX", "PackSource", "open_pack", "write_pack"]

SUFFIX = ".pack"
FORMAT = "maect-fast pack 1"
# Images that a worker packs at a time.
CHUNK = 16
# For the description of the tensors, which is written last and stands first: 9 entries of less than
# 100 characters.
HEADER = 4096
# A JPEG is decoded at a scale at which the short side is at least so many times as long as wanted.
GAP = 2


@dataclass(frozen=True, eq=False)
class PackSource(Source):
    """The images of a pack."""

    labels: Tensor
    class_names: list[str]
    names: Names
    path: str
    end: Tensor
    """[N] int64, where the pixels of each end."""
    size: Tensor
    """[N, 2] int64, width and height as stored."""
    original_size: Tensor
    """[N, 2] int64, those of the image that was packed."""
    channels: int
    """Channels to convert to: 3 or 1."""

    def __getstate__(self) -> dict[str, Any]:
        """All but the mapped memory, which every process has of its own."""
        return {name: value for name, value in vars(self).items() if name != "_pixels"}

    @cached_property
    def _pixels(self) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = _tensors(self.path, "pixels")["pixels"].numpy()
        return pixels

    @property
    def in_chans(self) -> int:
        """Channels of every image."""
        return self.channels

    def decode(self, index: int, reduction: Reduction | None = None) -> Image.Image:
        """Image `index` as it is stored; its `info` has the size that it had."""
        width, height = self.size[index].tolist()
        start = int(self.end[index - 1]) if index else 0
        pixels = self._pixels[start : int(self.end[index])].reshape(height, width, -1)
        is_grey = pixels.shape[2] == 1
        image = Image.fromarray(pixels[..., 0] if is_grey else pixels)
        if is_grey != (self.channels == 1):
            image = image.convert("L" if self.channels == 1 else "RGB")
        image.info[ORIGINAL_SIZE] = tuple(self.original_size[index].tolist())
        return image

    def name(self, index: int) -> str:
        """What the image was called where it was packed from."""
        return self.names[index]

    def _digest(self, root: str | None) -> str:
        """Of everything but the pixels."""
        digest = hashlib.sha256(json.dumps(self.class_names).encode())
        for tensor in (self.names.content, self.names.ends, self.size, self.original_size):
            digest.update(tensor.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def open_pack(
    key: str,
    path: str,
    *,
    in_chans: int,
    img_size: int | None = None,
    known: Sequence[str] = (),
) -> PackSource:
    """The images of a pack.

    Args:
        key: what the setting is called that named it.
        path: of the file.
        in_chans: channels to convert to.
        img_size: side of the views that will be made; None for none.
        known: names of classes, by which those of the pack are numbered; none for its own.

    Raises:
        ConfigError: no such file, no pack, or images that were made smaller than `img_size`.
    """
    tables = ("end", "size", "original_size", "label", "name", "name_end", "classes")
    try:
        found = _tensors(path, *tables)
        end, size, original = found["end"], found["size"], found["original_size"]
        labels: list[int] = found["label"].tolist()
        class_names = json.loads(found["classes"].numpy().tobytes())
    except (ValueError, LookupError, OSError) as error:
        raise ConfigError(
            f"{key}: {printable(path)} is no pack that `maect-fast pack` wrote ({one_line(error)})"
        ) from error
    is_smaller = (size < original).any(dim=1)
    short = int(size.amin(dim=1)[is_smaller].amin()) if bool(is_smaller.any()) else None
    if img_size is not None and short is not None and short < img_size:
        raise ConfigError(
            f"{key}: the pack {printable(path)} holds images made smaller, to a short side of "
            f"{short}, and encoder.img_size is {img_size}; pack them again with "
            f"--short-side {img_size} or more"
        )
    numbered, names = number_labels(key, labels, class_names, known=known)
    return PackSource(
        labels=numbered,
        class_names=names,
        names=Names(found["name"], found["name_end"]),
        path=path,
        end=end,
        size=size,
        original_size=original,
        channels=in_chans,
    )


def _tensors(path: str, *names: str) -> dict[str, Tensor]:
    """Some of a pack's tensors, in mapped memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("format")
            if kind != FORMAT:
                raise ValueError(f"its format is {kind}, expected {FORMAT}")
            return {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(one_line(error)) from error


@dataclass(frozen=True, slots=True)
class _Packed:
    """What a worker hands over."""

    pixels: Tensor
    """[bytes] uint8, of all images one after another."""
    rows: list[tuple[int, int, int, int, int, int, int]]
    """Of each image id, label, bytes, width, height, original width, original height."""
    broken: dict[int, Broken]

    def pin_memory(self) -> "_Packed":
        """Itself; no GPU reads it."""
        return self


@dataclass(frozen=True)
class _Packing:
    """Decodes images and makes them small; runs in a worker."""

    source: Source
    short_side: int

    def __getitem__(self, key: tuple[int, list[int]]) -> _Packed:
        broken: dict[int, Broken] = {}
        arrays, rows = [], []
        for index in key[1]:
            read = read_image(self.source, index, partial(_reduction, self.short_side), broken)
            if read is None:
                continue
            image, label = read
            pixels = _small(image, self.short_side)
            height, width = pixels.shape[:2]
            rows.append((index, label, pixels.size, width, height, *original_size(image)))
            arrays.append(pixels.reshape(-1))
        packed = empty(sum(array.size for array in arrays), dtype=torch.uint8)
        if arrays:
            np.concatenate(arrays, out=packed.numpy())
        return _Packed(packed, rows, broken)


def _reduction(short_side: int, width: int, height: int) -> int:
    return reduction_to(width, height, min(width, height) / (GAP * short_side))


def _small(image: Image.Image, short_side: int) -> NDArray[np.uint8]:
    """[h, w, C] with the short side at most `short_side` (bicubic), of one channel where all agree.

    The size is torchvision's, so that evaluation at a short side of `short_side` changes nothing.
    """
    if min(image.size) > short_side:
        image = transforms.resize(image, [short_side], interpolation=BICUBIC)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    is_grey = bool((pixels == pixels[..., :1]).all())
    return pixels[..., :1] if is_grey else pixels


def write_pack(
    source: Source,
    path: Path,
    *,
    short_side: int = 256,
    workers: int = 0,
    max_broken: int = 10,
    progress: Callable[[Iterable[_Packed], int], Iterable[_Packed]] = lambda items, total: items,
) -> PackSource:
    """Pack images; the file is there as a whole or not at all.

    Args:
        source: the images; those that cannot be read are left out, with a line in the log for each
            kind.
        path: of the pack.
        short_side: length in pixels to which the short side is resized where it is longer, with
            Pillow's antialiased bicubic resampling.
        workers: processes that decode.
        max_broken: images that may be left out.
        progress: takes what workers hand over, and how often they will, and gives it on.

    Returns:
        The pack, open.

    Raises:
        ConfigError: a name without the suffix of packs.
        DataError: too many images cannot be read.
    """
    if path.suffix != SUFFIX:
        raise ConfigError(f"--out: expected a file that ends in {SUFFIX}, got {path.name}")
    broken = BrokenImages(source, max_broken)
    schedule = Schedule()
    parts = torch.split(torch.arange(len(source)), CHUNK)
    schedule.items = [(0, part.tolist()) for part in parts]
    loader = data_loader(
        _Packing(source, short_side),
        schedule,
        workers=workers,
        batch_bytes=CHUNK * 4 * short_side**2,
        persistent=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        rows: list[tuple[int, ...]] = []
        with temporary.open("wb") as file:
            file.seek(8 + HEADER)
            for item in progress(handed_over(loader), len(parts)):
                broken.add(item.broken)
                file.write(item.pixels.numpy().data)
                rows += item.rows
            if not rows:
                raise DataError("no image could be packed")
            _finish(file, source, torch.tensor(rows), short_side)

    try:
        write_atomically(path, write)
    finally:
        broken.tell()
    return open_pack("--out", str(path), in_chans=source.in_chans)


def _finish(file: IO[bytes], source: Source, rows: Tensor, short_side: int) -> None:
    """Write the tables behind the pixels, and the description in front of them."""
    index, label, num_bytes = rows[:, 0], rows[:, 1], rows[:, 2]
    names = Names.of(source.name(i) for i in index.tolist())
    classes = torch.frombuffer(
        bytearray(json.dumps(source.class_names).encode()), dtype=torch.uint8
    )
    num_pixels = int(num_bytes.sum())
    # Numbers of eight bytes stand at multiples of eight.
    pixels_end = -(-num_pixels // 8) * 8
    file.write(bytes(pixels_end - num_pixels))
    entries: dict[str, Any] = {
        "__metadata__": {"format": FORMAT, "short_side": str(short_side)},
        "pixels": {"dtype": "U8", "shape": [pixels_end], "data_offsets": [0, pixels_end]},
    }
    position = pixels_end
    tables = {
        "end": num_bytes.cumsum(0),
        "size": rows[:, 3:5],
        "original_size": rows[:, 5:7],
        "label": label,
        "name_end": names.ends,
        "name": names.content,
        "classes": classes,
    }
    for name, table in tables.items():
        kind = "U8" if table.dtype == torch.uint8 else "I64"
        after = position + table.nbytes
        entries[name] = {
            "dtype": kind,
            "shape": list(table.shape),
            "data_offsets": [position, after],
        }
        file.write(table.contiguous().numpy().tobytes())
        position = after
    header = json.dumps(entries).encode()
    assert len(header) <= HEADER
    file.seek(0)
    file.write(HEADER.to_bytes(8, "little") + header.ljust(HEADER))
