"""Features on disk, with what each row is: a format for each suffix."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from maect_fast.checkpoint import write_atomically
from maect_fast.config import ConfigError
from maect_fast.evaluation.runs import Extracted
from maect_fast.names import is_utf8, printable

__all__ = ["SUFFIXES", "check_suffix", "file_columns", "write_features", "write_table"]

# Matrices, beside which a table of the files lies; and tables, which hold the features.
MATRICES = (".safetensors", ".npy")
TABLES = (".csv", ".parquet")
SUFFIXES = (*MATRICES, *TABLES)


def check_suffix(path: Path) -> None:
    """Refuse a file name that says of no format which it is.

    Raises:
        ConfigError: lists those there are.
    """
    if path.suffix not in SUFFIXES:
        got = printable(path.suffix) or "none"
        raise ConfigError(f"--out: expected a file that ends in {', '.join(SUFFIXES)}, got {got}")


def write_features(extracted: Extracted, path: Path) -> list[Path]:
    """Write features to `path`, in the format of its suffix; each file as a whole or not at all.

    `.csv` and `.parquet` have a row for every image that was asked for: path, id (its place in the
    sorted list of images, by which training knows it), label (empty for none), class, missing (why
    it could not be read) and the feature, which is empty there: a list in Parquet, in CSV columns
    feature_0, feature_1, ... The others hold the features of the images that could be read,
    `.npy` alone, `.safetensors` as `x` with `label` (-1 for none) and `id`; beside them lies a
    table `<name>.files.csv` of all images that were asked for, whose column row is empty for the
    others.

    Returns:
        What was written.

    Raises:
        ConfigError: a suffix that is none of these.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    features, ids = extracted.features, extracted.sample_id
    if path.suffix in TABLES:
        columns = file_columns(extracted)
        columns |= _features(extracted, as_list=path.suffix == ".parquet")
        write_table(columns, path)
        return [path]
    x = features.x.contiguous()
    if path.suffix == ".npy":
        _write(path, lambda file: np.save(file, x.numpy()))
    else:
        content = save({"x": x, "label": features.label.contiguous(), "id": ids})
        _write(path, lambda file: file.write(content))
    row = np.full(len(extracted.source), -1)
    row[ids] = np.arange(len(ids))
    files = path.with_name(f"{path.name}.files.csv")
    write_table({"row": _or_null(row), **file_columns(extracted)}, files)
    return [path, files]


def file_columns(extracted: Extracted) -> dict[str, Any]:
    """Columns with a row for each image of the source."""
    source, missing = extracted.source, extracted.missing
    labels = source.labels.numpy()
    names = [printable(name) for name in source.class_names]
    paths = [source.name(i) for i in range(len(source))]
    return {
        "path": [path if is_utf8(path) else printable(path) for path in paths],
        "id": np.arange(len(source)),
        "label": _or_null(labels),
        "class": [names[label] if label >= 0 else None for label in labels.tolist()],
        "missing": [missing.get(i) for i in range(len(source))],
    }


def _features(extracted: Extracted, *, as_list: bool) -> dict[str, Any]:
    """Columns with the features, null where there are none."""
    import pyarrow as pa

    x, ids = extracted.features.x, extracted.sample_id
    whole = torch.zeros(len(extracted.source), x.shape[1])
    whole[ids] = x
    is_missing = np.ones(len(whole), dtype=bool)
    is_missing[ids] = False
    if as_list:
        values = pa.array(whole.flatten().numpy())
        mask = pa.array(is_missing)
        return {"feature": pa.FixedSizeListArray.from_arrays(values, x.shape[1], mask=mask)}
    return {
        f"feature_{i}": pa.array(column.numpy(), mask=is_missing)
        for i, column in enumerate(whole.T.contiguous())
    }


def _or_null(numbers: Any) -> Any:
    """An array in which what is below 0 is null."""
    import pyarrow as pa

    return pa.array(numbers, mask=numbers < 0)


def write_table(columns: dict[str, Any], path: Path) -> None:
    """Write columns as Parquet or CSV, by the suffix, as a whole or not at all."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    texts = {name: pa.string() for name in ("path", "class", "missing")}
    table = pa.table({k: pa.array(v, texts[k]) if k in texts else v for k, v in columns.items()})
    write = parquet.write_table if path.suffix == ".parquet" else csv.write_csv
    _write(path, lambda file: write(table, file))


def _write(path: Path, fill: Callable[[Any], object]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            fill(file)

    write_atomically(path, write)
