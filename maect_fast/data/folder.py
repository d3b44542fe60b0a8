"""A folder of image files."""

import hashlib
import heapq
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from maect_fast.config import ConfigError
from maect_fast.data.decode import EXTENSIONS, decode_image
from maect_fast.data.sources import Reduction, Source
from maect_fast.names import is_utf8, listed, printable
from maect_fast.tensor_file import open_regular

__all__ = ["FolderSource", "open_folder"]

logger = logging.getLogger(__package__)

# Files of which a folder's digest has the size too: asking for all of a million takes minutes on a
# network file system.
SIZED_FILES = 10_000


@dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, decoded on demand.

    The paths are one byte tensor with end positions rather than a list of strings: worker processes
    then share them, where a list of a million strings would be copied to every worker as its
    reference counts change.
    """

    labels: Tensor
    class_names: list[str]
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
        """Read file `index`; see `decode_image`."""
        with open_regular(self.name(index)) as file:
            return decode_image(
                file, channels=self.channels, max_pixels=self.max_pixels, reduction=reduction
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


def open_folder(
    key: str, root: str | None, *, in_chans: int, max_pixels: int, known: Sequence[str] = ()
) -> FolderSource:
    """The image files below `root`.

    Args:
        key: what the setting is called that named the folder.
        root: the folder.
        in_chans: channels to decode to.
        max_pixels: of the largest image that is decoded.
        known: names of classes, by which those of this folder are numbered; none for its own.

    Raises:
        ConfigError: no folder, no image in it, or a class that is not `known`.
    """
    files = _list_images(key, root)
    class_names = list(known) if known and _top_folders(files) else []
    if known:
        unknown = [name for name in _top_folders(files) if name not in known]
        if unknown:
            raise ConfigError(
                f"{key}: expected the class folders of data.root, got {unknown[0]!r} as well"
            )
    else:
        class_names = _classes(files)
    number = {name: label for label, name in enumerate(class_names)}
    labels = [number[file.split(os.sep, 1)[0]] if class_names else -1 for file in files]
    return FolderSource.from_paths(
        (os.path.join(str(root), file) for file in files),
        labels=torch.tensor(labels),
        class_names=class_names,
        in_chans=in_chans,
        max_pixels=max_pixels,
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
