"""Measurements as CSV files, one line each: `benchmarks/results/<device>/<op>.csv`.

The line's columns are `Row`'s fields. Tables and pictures are made from these files alone.
"""

import csv
import io
import math
import os
import platform
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

import torch

from maect_fast.checkpoint import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "FLOORS",
    "KEY",
    "OURS",
    "WIDE",
    "Environment",
    "Row",
    "append_rows",
    "best_peer",
    "by_case",
    "cpu_name",
    "device_folder",
    "device_name",
    "environment_columns",
    "is_wide",
    "provenance",
    "read_folder",
    "read_rows",
    "timed",
]

OURS = "maect-fast"
"""The provider that everything else is a peer of."""

FLOORS = "floors"
"""The op whose rows are the machine's measured rates."""

KEY = ("op", "provider", "mode", "dtype", "B", "H", "M", "N", "D", "Q", "K")
"""Columns that say what was measured: a file holds the newest measurement of each."""

# From p20 to p80 over p50: a measurement that spreads wider is to be repeated. About what
# torch.utils.benchmark warns of, whose quartiles are to be within 10 % of the median.
WIDE = 0.2

# Within an op: models (H, D), neighbours, then the sizes that scaling curves run over.
SIZE_ORDER = "HDKQNMB"
MODE_ORDER = ("fwd", "bwd", "full", "topk", "find_nn")


class Environment(TypedDict):
    """The columns of a row that depend on machine and checkout only."""

    gpu: str
    torch: str
    triton: str
    commit: str
    date: str
    cpu: str
    threads: int


def is_wide(p20: float, p50: float, p80: float) -> bool:
    """Whether repetitions differ so much that their median says little."""
    return p80 - p20 > WIDE * p50


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One provider on one shape. Sizes the op does not have, and what was not measured, are None.

    The dimension letters are those of the op's `reference.py`.
    """

    op: str
    provider: str
    mode: str = ""
    dtype: str = ""
    B: int | None = None
    H: int | None = None
    M: int | None = None
    N: int | None = None
    D: int | None = None
    Q: int | None = None
    K: int | None = None
    p50_ms: float | None = None
    """Of an eager call; on a GPU, too, with what the host needs for it."""
    p20_ms: float | None = None
    p80_ms: float | None = None
    gbps: float | None = None
    """The formula's bytes over p50, in GB/s."""
    tflops: float | None = None
    """The formula's FLOPs over p50, in TFLOP/s."""
    peak_mib: float | None = None
    """Largest memory above that of inputs and outputs, in MiB."""
    gpu: str = ""
    """Empty when measured on a CPU."""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    """Short hash, with + when tracked files were changed."""
    date: str = ""
    """UTC."""
    graph_ms: float | None = None
    """p50 of the replayed CUDA graph."""
    floor_ms: float | None = None
    """The larger of bytes over measured bandwidth and FLOPs over measured matrix rate."""
    floor_kind: str = ""
    """Which of the two: "bytes" or "FLOPs"."""
    reason: str = ""
    """Why there are no times, in one line."""
    cpu: str = ""
    threads: int | None = None

    @property
    def shape(self) -> str:
        """The sizes as text: "B512 H12 N197 D64"."""
        return " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that the op has, by letter."""
        sizes = {letter: getattr(self, letter) for letter in "BHMNDQK"}
        return {letter: size for letter, size in sizes.items() if size is not None}

    @property
    def kernels_ms(self) -> float | None:
        """Time on the device: of the replayed graph, without one that of the call."""
        return self.p50_ms if self.graph_ms is None else self.graph_ms

    @property
    def of_floor(self) -> float | None:
        """Fraction of the floor that was reached: 1 is as fast as the machine allows."""
        return self.floor_ms / self.kernels_ms if self.floor_ms and self.kernels_ms else None

    @property
    def is_wide(self) -> bool:
        """Whether the repetitions differ so much that p50 says little."""
        if self.p50_ms is None or self.p20_ms is None or self.p80_ms is None:
            return False
        return is_wide(self.p20_ms, self.p50_ms, self.p80_ms)


def append_rows(
    path: Path, rows: Sequence["DataclassInstance"], *, key: Sequence[str] = KEY
) -> None:
    """Add rows to a CSV file, in place of older ones that measured the same.

    Args:
        path: made, with its folder, if there is none; replaced as a whole.
        rows: dataclasses of one type, whose fields are the columns.
        key: the columns that say what was measured; those whose fields have a default may be
            missing in an older file.

    Raises:
        ValueError: the file is another kind of table.
    """
    if not rows:
        return
    columns = [field.name for field in fields(rows[0])]
    defaults = {
        field.name: _text(field.default)
        for field in fields(rows[0])
        if field.default is not MISSING
    }
    required = [name for name in key if name not in defaults]
    lines = [defaults | line for line in _read(path, required)] if path.exists() else []
    lines += [{name: _text(getattr(row, name)) for name in columns} for row in rows]
    newest = {tuple(line.get(name, "") for name in key): line for line in lines}
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(newest.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(table.getvalue()))


def read_rows(path: Path) -> list[Row]:
    """Rows of one file, in its order.

    Raises:
        ValueError: another kind of table, or a number that is none.
    """
    kinds = get_type_hints(Row)
    rows = []
    for number, line in enumerate(_read(path, KEY), start=2):
        try:
            values = {name: _value(line.get(name, ""), kinds[name]) for name in kinds}
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        rows.append(Row(**values))
    return rows


def read_folder(folder: Path) -> list[Row]:
    """Rows of all files of a device's folder; other kinds of tables there are passed over.

    Raises:
        ValueError: there is no row.
    """
    rows = [
        row for path in sorted(folder.glob("*.csv")) if _is_rows(path) for row in read_rows(path)
    ]
    if not rows:
        raise ValueError(f"{folder}: expected benchmark rows in CSV files, found none; bench first")
    return rows


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that compete (one op, dtype, shape and mode) together, in reading order.

    Within a case ours comes first, then peers by time, then who has no time. Floors are left out.
    """
    cases = defaultdict(list)
    for row in rows:
        if row.op != FLOORS:
            sizes = tuple(row.sizes.get(letter, 0) for letter in SIZE_ORDER)
            modes = (*MODE_ORDER, row.mode)
            cases[row.op, row.dtype, sizes, modes.index(row.mode), row.mode].append(row)
    return [
        sorted(cases[key], key=lambda row: (row.provider != OURS, row.p50_ms or math.inf))
        for key in sorted(cases)
    ]


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.p50_ms is not None]


def best_peer(case: Iterable[Row], time: str = "p50_ms") -> Row | None:
    """The fastest provider but ours, by a column; "maect-fast int8" and the like are ours, too."""
    peers = [row for row in timed(case) if row.provider.split()[0] != OURS]
    peers = [row for row in peers if getattr(row, time) is not None]
    return min(peers, key=lambda row: getattr(row, time), default=None)


def device_name(rows: Iterable[Row]) -> str:
    """The rows' devices in words."""
    return _distinct(
        row.gpu or f"{row.cpu}, {row.threads} thread{'s' * (row.threads != 1)}" for row in rows
    )


def provenance(rows: Sequence[Row]) -> str:
    """Versions, commit and date of the rows in words."""
    labels = {"torch": "torch ", "triton": "triton ", "commit": "commit ", "date": ""}
    values = {name: _distinct(getattr(row, name) for row in rows) for name in labels}
    return ", ".join(labels[name] + value for name, value in values.items() if value)


def device_folder(device: torch.device) -> str:
    """Name of the folder of a device's results: nvidia-h200, cpu-amd-epyc-2-cores."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {cpu_name()} {os.cpu_count()} cores"
    name = re.sub(r"\((r|tm)\)", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def environment_columns(device: torch.device) -> Environment:
    """Machine, versions, commit and date, the same for all rows of a run."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(Path(__file__).resolve()),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The processor as its maker calls it."""
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _commit(file: Path) -> str:
    """Short hash of the checkout that tracks `file`, with + when it was changed; "" without one."""

    def git(*command: str) -> str:
        run = ["git", "-C", str(file.parent), *command]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        # A run's own results are no change of what it measures.
        paths = (":/", ":(top,exclude)benchmarks/results")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *paths)
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _read(path: Path, key: Sequence[str]) -> list[dict[str, str]]:
    """Lines of a CSV file that has the columns of `key`."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file, restval="")
        got = reader.fieldnames or ()
        if not set(key) <= set(got):
            raise ValueError(f"{path}: expected columns {', '.join(key)}, got {', '.join(got)}")
        return list(reader)


def _is_rows(path: Path) -> bool:
    with path.open(newline="") as file:
        return set(KEY) <= set(next(csv.reader(file), ()))


def _text(value: object) -> str:
    """A field's text; no clock is good for more than five digits."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if not text:
        return None
    return int(text) if kind == int | None else float(text)


def _distinct(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(filter(None, values)))
