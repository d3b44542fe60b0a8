"""Parquet files and folders of Hugging Face `datasets`, read at random.

Both are read with pyarrow, of which `datasets` makes use, too. An Arrow file is mapped to memory,
so any row is there; of a Parquet file a whole row group is read for one image.
"""

import hashlib
import io
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal, Protocol

from torch import Tensor

from maect_fast.config import ConfigError
from maect_fast.data.decode import EncodedSource
from maect_fast.data.sources import UnfitImageError, number_labels
from maect_fast.names import listed, one_line, printable
from maect_fast.tensor_file import open_regular

__all__ = ["TableSource", "find_tables", "open_tables"]

logger = logging.getLogger(__package__)

# The names of files, or of parts of a DatasetDict, that belong to a split; the first that is there.
SPLITS = {"train": ("train",), "test": ("test", "validation", "val")}
LABEL_NAMES = ("label", "labels", "class", "cls", "target", "fine_label")
# Bytes of a row group from which reading one for each image is told to be slow.
LARGE_GROUP = 4 << 20


class _Rows(Protocol):
    """One file's image column."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...


class _ArrowRows:
    """Of an Arrow stream, as `save_to_disk` writes it, in mapped memory."""

    def __init__(self, path: str, column: str) -> None:
        self.column = _arrow_table(path).column(column)

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, row: int) -> Any:
        return self.column[row].as_py()


class _ParquetRows:
    """Of a Parquet file; the row group that was read last is kept."""

    def __init__(self, path: str, column: str) -> None:
        from pyarrow.parquet import ParquetFile

        self.file, self.column = ParquetFile(path), column
        metadata = self.file.metadata
        self.ends = [0]
        for group in range(metadata.num_row_groups):
            self.ends.append(self.ends[-1] + metadata.row_group(group).num_rows)
        self.number, self.group = -1, None

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Any:
        number = bisect_right(self.ends, row) - 1
        if number != self.number:
            table = self.file.read_row_group(number, columns=[self.column])
            self.number, self.group = number, table.column(self.column)
        assert self.group is not None
        return self.group[row - self.ends[number]].as_py()


@dataclass(frozen=True, eq=False)
class TableSource(EncodedSource):
    """Images in a column of files of tables."""

    labels: Tensor
    class_names: list[str]
    files: list[str]
    ends: list[int]
    """Rows up to the end of each file."""
    column: str
    channels: int
    max_pixels: int

    def __getstate__(self) -> dict[str, Any]:
        """All but open files, which every process has of its own."""
        return {name: value for name, value in vars(self).items() if name != "_opened"}

    @cached_property
    def _opened(self) -> dict[int, _Rows]:
        return {}

    def open(self, index: int) -> IO[bytes]:
        """The image of row `index`; its bytes, or the file that a path names."""
        file, row = self._place(index)
        if file not in self._opened:
            self._opened[file] = _rows(self.files[file], self.column)
        cell = self._opened[file][row]
        content, path = (
            (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        )
        if content is not None:
            return io.BytesIO(content)
        if path:
            return open_regular(os.path.join(os.path.dirname(self.files[file]), path))
        raise UnfitImageError("no image", "its cell is empty")

    def name(self, index: int) -> str:
        """File and row."""
        file, row = self._place(index)
        return f"{self.files[file]}#{row}"

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect_right(self.ends, index)
        return file, index - (self.ends[file - 1] if file else 0)

    def _digest(self, root: str | None) -> str:
        """Of the files' names, rows and sizes."""
        digest = hashlib.sha256(self.column.encode())
        for path, end in zip(self.files, self.ends, strict=True):
            name = os.path.basename(path).encode()
            digest.update(b"%s\0%d\0%d\0" % (name, end, os.stat(path).st_size))
        return digest.hexdigest()


def find_tables(key: str, root: str, split: Literal["train", "test"]) -> list[str]:
    """The files of one split: of `save_to_disk`, or Parquet as in the hub's layout; or none.

    Parquet files lie in the folder or in its `data/`; where their names begin with those of splits,
    as `train-00000-of-00002.parquet`, those of this one are taken, else all.

    Raises:
        ConfigError: a `DatasetDict` without this split, or a folder that misses its files.
    """
    path = Path(root)
    if path.is_file():
        return [root]
    if (path / "dataset_dict.json").is_file():
        parts = [path / name for name in SPLITS[split] if (path / name).is_dir()]
        if not parts:
            there = sorted(part.name for part in path.iterdir() if part.is_dir())
            raise ConfigError(
                f"{key}: expected a split {' or '.join(SPLITS[split])} in {printable(root)!r}, "
                f"which has {listed(there)}; give the folder of one of them"
            )
        path = parts[0]
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        state = _read_json(key, path / "state.json")
        return [str(path / file["filename"]) for file in state["_data_files"]]
    for folder in (path, path / "data"):
        files = sorted(str(file) for file in folder.glob("*.parquet"))
        names = {name for names in SPLITS.values() for name in names}
        if any(_split_of(file) in names for file in files):
            wanted = (name for name in SPLITS[split] if any(_split_of(f) == name for f in files))
            chosen = next(wanted, None)
            files = [file for file in files if _split_of(file) == chosen]
            if not files:
                raise ConfigError(
                    f"{key}: no Parquet file in {printable(str(folder))!r} has a name that begins "
                    f"with {' or '.join(SPLITS[split])}"
                )
        if files:
            return files
    return []


def open_tables(
    key: str,
    files: Sequence[str],
    *,
    in_chans: int,
    max_pixels: int,
    image_column: str | None = None,
    label_column: str | None = None,
    known: Sequence[str] = (),
) -> TableSource:
    """The images of the files, row by row.

    The image column is the one of the feature type Image, else the one of structs with `bytes`,
    else the only one of binary type; the label column the one of the type ClassLabel, else one of
    integers or texts called label, labels, class, cls, target or fine_label.

    Args:
        key: what the setting is called that named the files.
        files: see `find_tables`.
        in_chans: channels to decode to.
        max_pixels: of the largest image that is decoded.
        image_column: name of the column; None finds it.
        label_column: the same of the labels.
        known: names of classes, by which these are numbered; none for their own.

    Raises:
        ConfigError: a file that cannot be read, or in which the columns cannot be told.
    """
    schema = _schema(key, files[0])
    features = _features(schema)
    image = image_column or _image_column(key, schema, features)
    label = label_column or _label_column(schema, features)
    for name, setting in ((image, "image_column"), (label, "label_column")):
        if name is not None and name not in schema.names:
            raise ConfigError(
                f"data.{setting}: there is no column {name!r} in {printable(files[0])}, it has "
                f"{listed(schema.names)}"
            )
    ends: list[int] = []
    found: list[int | str | None] = []
    for path in files:
        try:
            values = _column(path, label) if label is not None else None
            rows = _rows(path, image)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{key}: {printable(path)}: {one_line(error)}") from error
        ends.append(len(rows) + (ends[-1] if ends else 0))
        found += [None] * len(rows) if values is None else values
        if isinstance(rows, _ParquetRows) and path == files[0]:
            _tell_of_groups(key, path, rows)
    if not ends[-1]:
        raise ConfigError(f"{key}: no row in {listed(files)}")
    names = features.get(label or "", {}).get("names")
    labels, class_names = number_labels(key, found, names, known=known)
    return TableSource(labels, class_names, list(files), ends, image, in_chans, max_pixels)


def _tell_of_groups(key: str, path: str, rows: _ParquetRows) -> None:
    groups = len(rows.ends) - 1
    size = os.stat(path).st_size // max(1, groups)
    if size > LARGE_GROUP:
        most = max(b - a for a, b in pairwise(rows.ends))
        logger.warning(
            "%s: for each image of a Parquet file a row group is read, here of %d rows and %d MiB; "
            "`maect-fast pack` makes a file that is read at random",
            key,
            most,
            size >> 20,
        )


def _rows(path: str, column: str) -> _Rows:
    return _ParquetRows(path, column) if path.endswith(".parquet") else _ArrowRows(path, column)


def _arrow_table(path: str) -> Any:
    import pyarrow as pa

    return pa.ipc.open_stream(pa.memory_map(path)).read_all()


def _schema(key: str, path: str) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        if path.endswith(".parquet"):
            return parquet.read_schema(path)
        return pa.ipc.open_stream(pa.memory_map(path)).schema
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {printable(path)}: {one_line(error)}") from error


def _column(path: str, name: str) -> list[Any]:
    from pyarrow import parquet

    is_parquet = path.endswith(".parquet")
    table = parquet.read_table(path, columns=[name]) if is_parquet else _arrow_table(path)
    values: list[Any] = table.column(name).to_pylist()
    return values


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What `datasets` notes of its columns' types."""
    try:
        noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)}


def _image_column(key: str, schema: Any, features: dict[str, dict[str, Any]]) -> str:
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def has_bytes(kind: Any) -> bool:
        return bool(pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)

    stated = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    structs = [field.name for field in schema if has_bytes(field.type)]
    binary = [field.name for field in schema if is_binary(field.type)]
    for names in (stated, structs, binary):
        if len(names) == 1:
            return names[0]
        if names:
            break
    raise ConfigError(
        f"{key}: expected one column of images, got {listed(names) if names else 'none'} of the "
        f"columns {listed(schema.names)}; say which with data.image_column=NAME"
    )


def _label_column(schema: Any, features: dict[str, dict[str, Any]]) -> str | None:
    import pyarrow as pa

    stated = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    if stated:
        named = [name for name in LABEL_NAMES if name in stated]
        return (named or stated)[0]
    fits = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    usable = [field.name for field in schema if any(check(field.type) for check in fits)]
    return next((name for name in LABEL_NAMES if name in usable), None)


def _split_of(path: str) -> str:
    """What a file's name begins with."""
    return os.path.basename(path).split(".")[0].split("-")[0].split("_")[0]


def _read_json(key: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {printable(path)}: {one_line(error)}") from error
