"""A folder of image files."""

import hashlib
import heapq
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from maect_fast.config import ConfigError
from maect_fast.data.decode import EXTENSIONS, EncodedSource
from maect_fast.data.sources import Names
from maect_fast.names import is_utf8, listed, printable
from maect_fast.tensor_file import open_regular

__all__ = ["FolderSource", "open_folder"]

logger = logging.getLogger(__package__)

# Files of which a folder's digest has the size too: asking for all of a million takes minutes on a
# network file system.
SIZED_FILES = 10_000


@dataclass(frozen=True, eq=False)
class FolderSource(EncodedSource):
    """Image files."""

    labels: Tensor
    class_names: list[str]
    paths: Names
    channels: int
    max_pixels: int
    ignored: Mapping[str, int] = field(default_factory=dict)

    def open(self, index: int) -> IO[bytes]:
        """File `index`."""
        return open_regular(self.name(index))

    def name(self, index: int) -> str:
        """The path of file `index`."""
        return self.paths[index]

    def _digest(self, root: str | None) -> str:
        """Of all names below `root`, and of the sizes of 10,000 files spread over them."""
        above = len(os.fsencode(os.path.join(root, ""))) if root else 0
        digest = hashlib.sha256()
        step = -(-len(self) // SIZED_FILES)
        for index, path in enumerate(self.paths.encoded()):
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
    files, ignored = _list_images(key, root)
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
    return FolderSource(
        labels=torch.tensor(labels),
        class_names=class_names,
        paths=Names.of(os.path.join(str(root), file) for file in files),
        channels=in_chans,
        max_pixels=max_pixels,
        ignored=ignored,
    )


def _list_images(key: str, root: str | None) -> tuple[list[str], dict[str, int]]:
    """All image files below `root`, relative to it, sorted; and other files by their suffix."""
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
    files, odd, repeated, ignored = _walk(key, root)
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
    return sorted(files), ignored


def _walk(key: str, root: str) -> tuple[list[str], list[str], list[str], dict[str, int]]:
    """All image files below `root`, relative to it, and the names left out of the list.

    Each real directory is listed once, under its own path if that lies below `root`, else under the
    first link to it. A link to a directory around it is not followed: what lies beside `root` is
    not meant.

    Returns:
        Regular files; names that end like images and are none; links not followed; the number of
        other files of each suffix.
    """
    ignored: Counter[str] = Counter()
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
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix in EXTENSIONS:
                    (files if _holds(entry.is_file) else odd).append(path)
                else:
                    ignored[suffix] += 1
    return files, odd, repeated, dict(ignored)


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
