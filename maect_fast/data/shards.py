"""Tar shards, as webdataset writes them, read at random.

The `webdataset` library reads shards as streams: an approximate shuffle within a buffer, of which
neither an exact resume nor a sample's seed by its number can be had. A tar file is not compressed,
so a list of its members' places is all that reading any image takes; then shards behave as a folder
does in everything.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from maect_fast.config import ConfigError
from maect_fast.data.decode import EXTENSIONS, EncodedSource
from maect_fast.data.sources import Names, number_labels
from maect_fast.names import one_line, printable
from maect_fast.tensor_file import open_regular

__all__ = ["ShardSource", "list_shards", "open_shards"]

# A sample's members have one name up to the first dot of its last part.
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
# Where a sample's .json has the label, unless `data.label_column` says so.
LABEL_KEYS = ("label", "cls", "class")
# A label is a few bytes; captions and such are not read.
MAX_LABEL = 1 << 20


@dataclass(frozen=True, eq=False)
class ShardSource(EncodedSource):
    """Images in tar files."""

    labels: Tensor
    class_names: list[str]
    shards: list[str]
    shard: Tensor
    """[N] int64, the number of each image's shard."""
    start: Tensor
    """[N] int64, where it begins there, in bytes."""
    size: Tensor
    """[N] int64, its bytes."""
    members: Names
    """Its name there."""
    channels: int
    max_pixels: int
    ignored: Mapping[str, int] = field(default_factory=dict)

    def open(self, index: int) -> IO[bytes]:
        """Image `index`, in memory."""
        with open_regular(self.shards[int(self.shard[index])]) as file:
            file.seek(int(self.start[index]))
            return io.BytesIO(file.read(int(self.size[index])))

    def name(self, index: int) -> str:
        """The shard's path, with the member's name as if the shard were a folder."""
        return f"{self.shards[int(self.shard[index])]}/{self.members[index]}"

    def _digest(self, root: str | None) -> str:
        """Of the names of shards and members, and the members' sizes."""
        digest = hashlib.sha256()
        sizes, shards = self.size.tolist(), self.shard.tolist()
        for member, size, shard in zip(self.members.encoded(), sizes, shards, strict=True):
            name = os.path.basename(self.shards[shard]).encode()
            digest.update(b"%s\0%s\0%d\0" % (name, member, size))
        return digest.hexdigest()


def list_shards(key: str, root: str) -> list[str]:
    """The paths that `shard-{000..009}.tar`, one tar file or a folder of them names.

    Raises:
        ConfigError: one of them is missing.
    """
    if Path(root).is_dir():
        return sorted(str(path) for path in Path(root).glob("*.tar"))
    paths = [root]
    while found := BRACES.search(paths[0]):
        low, high = found.groups()
        numbers = [str(i).zfill(len(low)) for i in range(int(low), int(high) + 1)]
        if not numbers:
            raise ConfigError(f"{key}: {found[0]} holds no number, expected as {{000..009}}")
        paths = [BRACES.sub(number, path, count=1) for path in paths for number in numbers]
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        count = f"{len(missing)} of {len(paths)} shards are missing, the first is "
        raise ConfigError(f"{key}: {count}{printable(missing[0])!r}")
    return paths


def open_shards(
    key: str,
    root: str,
    *,
    in_chans: int,
    max_pixels: int,
    label_column: str | None = None,
    known: Sequence[str] = (),
) -> ShardSource:
    """The images of tar shards, in the order in which they stand there.

    A sample's image is its first member that ends like one; its label is its `.cls`, a number or a
    name, or in its `.json` the value of `label_column`, else of label, cls or class.

    Args:
        key: what the setting is called that named the shards.
        root: see `list_shards`.
        in_chans: channels to decode to.
        max_pixels: of the largest image that is decoded.
        label_column: key in a sample's `.json`.
        known: names of classes, by which these are numbered; none for their own.

    Raises:
        ConfigError: a shard that is missing, damaged or compressed, or no image in any.
    """
    shards = list_shards(key, root)
    places: list[tuple[int, int, int]] = []
    members: list[str] = []
    labels: list[int | str | None] = []
    ignored: Counter[str] = Counter()
    for number, shard in enumerate(shards):
        rows: dict[str, int] = {}
        label_of: dict[str, int | str] = {}
        for member, content in _members(key, shard):
            sample, suffix = _split(member.name)
            if content is not None:
                label = _label(suffix, content, label_column)
                if label is not None:
                    label_of.setdefault(sample, label)
            elif f".{suffix.rpartition('.')[2]}" in EXTENSIONS and sample not in rows:
                rows[sample] = len(members)
                places.append((number, member.offset_data, member.size))
                members.append(member.name)
            else:
                ignored[f".{suffix}" if suffix else ""] += 1
        labels += [label_of.get(sample) for sample in rows]
    if not members:
        raise ConfigError(f"{key}: no image in {printable(root)!r}, in {len(shards)} tar files")
    shard_of, start, size = torch.tensor(places).T.contiguous()
    numbered, class_names = number_labels(key, labels, known=known)
    return ShardSource(
        labels=numbered,
        class_names=class_names,
        shards=shards,
        shard=shard_of,
        start=start,
        size=size,
        members=Names.of(members),
        channels=in_chans,
        max_pixels=max_pixels,
        ignored=dict(ignored),
    )


def _members(key: str, shard: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """All files of a shard, with the content of those that may hold a label."""
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # The module would keep them all.
                tar.members.clear()  # type: ignore[attr-defined]
                if not member.isfile():
                    continue
                content = None
                if member.name.endswith((".cls", ".json")) and member.size <= MAX_LABEL:
                    taken = tar.extractfile(member)
                    assert taken is not None  # a regular file
                    content = taken.read()
                yield member, content
    except (tarfile.TarError, EOFError) as error:
        raise ConfigError(
            f"{key}: {printable(shard)} is no whole, uncompressed tar file ({one_line(error)})"
        ) from error


def _split(name: str) -> tuple[str, str]:
    """The sample's name, and what follows its first dot."""
    match = SAMPLE.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _label(suffix: str, content: bytes, column: str | None) -> int | str | None:
    """What a sample's `.cls` or `.json` says; None where it says nothing of the kind."""
    found: Any = None
    if suffix == "cls":
        found = content.decode(errors="replace").strip()
        found = int(found) if re.fullmatch(r"-?\d{1,9}", found) else found
    elif suffix == "json":
        try:
            fields = json.loads(content)
        except ValueError:
            return None
        keys = LABEL_KEYS if column is None else (column,)
        if isinstance(fields, dict):
            found = next((fields[key] for key in keys if key in fields), None)
    return found if type(found) in (int, str) else None
