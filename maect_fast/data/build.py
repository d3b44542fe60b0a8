"""The images that a configuration names."""

import os
from collections.abc import Sequence
from typing import Any, Literal

from maect_fast.config import ConfigError, DataConfig, EncoderConfig
from maect_fast.data.decode import EXTENSIONS
from maect_fast.data.folder import open_folder
from maect_fast.data.generated import make_digits, make_synthetic
from maect_fast.data.pack import SUFFIX as PACK
from maect_fast.data.pack import open_pack
from maect_fast.data.shards import open_shards
from maect_fast.data.sources import Source
from maect_fast.data.tables import find_tables, open_tables

__all__ = ["build_source", "open_source"]

# What `save_to_disk` of Hugging Face's `datasets` writes.
OF_DATASETS = ("dataset_dict.json", "dataset_info.json")


def build_source(
    data: DataConfig, encoder: EncoderConfig, *, split: Literal["train", "test"]
) -> Source:
    """The images of one split, in a fixed order.

    A folder's images are all regular files below it with an image extension, sorted by path; hidden
    files and folders are left out, linked folders followed, and no folder is listed twice. If every
    image lies in a sub-folder and there are at least two of them, the top-level sub-folders are the
    classes; otherwise no image has a label. Shards, tables and packs: see `open_shards`,
    `open_tables` and `open_pack`.
    A test set's classes are numbered by the names of the training set's.

    Raises:
        ConfigError: no images given, they are missing, there is none among them, their classes do
            not fit those of the training set, or the encoder's input does not fit the images.
    """
    if data.source == "digits":
        return make_digits(encoder, split)
    if data.source == "synthetic":
        return make_synthetic(data, encoder, split)
    if data.source == "dataset":
        raise ConfigError(
            "data.source: the images of a Dataset come from Python (maect_fast.data.from_dataset); "
            "give others here, as data.source=folder data.root=/path/to/images"
        )
    if encoder.in_chans not in (1, 3):
        raise ConfigError(f"encoder.in_chans: expected 3 or 1, got {encoder.in_chans}")
    in_chans, img_size = encoder.in_chans, encoder.img_size
    if split == "train":
        return open_source("data.root", data.root, data, in_chans=in_chans, img_size=img_size)
    known: Sequence[str] = ()
    if data.root:
        known = open_source("data.root", data.root, data, in_chans=in_chans).class_names
    return open_source(
        "data.test_root",
        data.test_root,
        data,
        in_chans=in_chans,
        img_size=img_size,
        split="test",
        known=known,
    )


def open_source(
    key: str,
    root: str | None,
    data: DataConfig,
    *,
    in_chans: int,
    img_size: int | None = None,
    split: Literal["train", "test"] = "train",
    known: Sequence[str] = (),
) -> Source:
    """Images on disk, of whatever kind they are.

    Args:
        key: what the setting is called that names them.
        root: a folder of images, of tar shards or of tables; files of these; or a pack.
        data: the other settings.
        in_chans: channels to decode to.
        img_size: side of the views that will be made; None for none.
        split: which files of tables are taken, where their names say so.
        known: names of classes, by which those found are numbered; none for their own.

    Raises:
        ConfigError: see `build_source`.
    """
    kind = "" if root is None else _kind(root)
    if root is not None and kind == PACK:
        return open_pack(key, root, in_chans=in_chans, img_size=img_size, known=known)
    common: dict[str, Any] = {"in_chans": in_chans, "max_pixels": data.max_pixels, "known": known}
    if root is None or not kind:
        return open_folder(key, root, **common)
    if kind == ".tar":
        return open_shards(key, root, label_column=data.label_column, **common)
    files = find_tables(key, root, split)
    columns: dict[str, Any] = {"image_column": data.image_column, "label_column": data.label_column}
    return open_tables(key, files, **common, **columns)


def _kind(root: str) -> str:
    """`.tar`, `.parquet` or `.pack` by a file's name, or by what a folder holds; "" for images."""
    if not os.path.isdir(root):
        suffix = os.path.splitext(root)[1]
        return suffix if suffix in (".tar", ".parquet", PACK) else ""
    if any(os.path.isfile(os.path.join(root, f)) for f in OF_DATASETS):
        return ".parquet"
    for folder in (root, os.path.join(root, "data")):
        found = _suffixes(folder)
        if not found & EXTENSIONS and found & {".tar", ".parquet"}:
            return ".tar" if ".tar" in found and folder == root else ".parquet"
    return ""


def _suffixes(folder: str) -> set[str]:
    """Those of a folder's files; the first image's ends the list."""
    found: set[str] = set()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.add(os.path.splitext(entry.name)[1].lower())
                if found & EXTENSIONS:
                    break
    except OSError:  # told where the folder is listed
        return set()
    return found
