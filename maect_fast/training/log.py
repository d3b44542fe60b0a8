"""What a run tells: metrics.jsonl, trackers, and a progress bar or plain lines."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from tqdm.auto import tqdm

from maect_fast.checkpoint import write_atomically
from maect_fast.config import Config
from maect_fast.training.trackers import Trackers

__all__ = ["METRICS", "RunLog", "progress", "read_metrics"]

T = TypeVar("T")

METRICS = "metrics.jsonl"

SECONDS_BETWEEN_LINES = 10.0
# Shares of the time in which updates wait for data: one that is shown, one that is warned of.
SHOWN_WAIT, LONG_WAIT = 0.05, 0.2


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl that can be read; a kill may cut off the last one."""
    return _read(folder / METRICS)[0]


def _read(path: Path) -> tuple[list[dict[str, float]], int]:
    """The lines that hold metrics, and how many of the others are whole."""
    if not path.exists():
        return [], 0
    *lines, _ = path.read_text(errors="replace").split("\n")
    found = [metrics for metrics in map(_parse, lines) if metrics is not None]
    return found, len(lines) - len(found)


def _parse(line: str) -> dict[str, float] | None:
    """The metrics of a line, None where it holds something else."""
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    if not isinstance(metrics, dict) or not metrics.keys() >= {"update", "epoch", "loss"}:
        return None
    is_number = (type(value) in (int, float) for value in metrics.values())
    return metrics if all(is_number) else None


def progress(items: Iterable[T], title: str, *, total: int) -> Iterator[T]:
    """The items, with a bar on a terminal; elsewhere with a line whenever some seconds passed."""
    bar = tqdm(items, desc=title, total=total, unit="batch", disable=None, leave=False)
    last = began = time.monotonic()
    for done, item in enumerate(bar):
        now = time.monotonic()
        if done and bar.disable and now - last >= SECONDS_BETWEEN_LINES:
            last, left = now, (now - began) / done * (total - done)
            print(f"{title}  {done}/{total}  ETA {left:.0f} s", file=sys.stderr, flush=True)  # noqa: T201
        yield item


class RunLog:
    """Writes one run's metrics from update `start` of `total` on.

    A resumed run drops what an earlier process wrote beyond `start`, so that every update appears
    once, and lines that are damaged. `active=False` (ranks above 0) writes nothing.
    """

    def __init__(
        self, folder: Path, config: Config, *, start: int, total: int, active: bool = True
    ):
        self.active = active
        if not active:
            return
        self.path = path = folder / METRICS
        lines, num_damaged = _read(path)
        if num_damaged:
            print(f"{path}: {num_damaged} damaged lines were left out", file=sys.stderr)  # noqa: T201
        kept = [line for line in lines if line["update"] <= start]
        text = "".join(f"{json.dumps(line)}\n" for line in kept)
        write_atomically(path, lambda temporary: temporary.write_text(text))
        self.title = title = config.stage
        self.update = start
        self.total = total
        self.file = path.open("a")
        self.trackers = Trackers(config.trackers, folder, config, start=start)
        self.bar = tqdm(total=total, initial=start, desc=title, unit="update", disable=None)
        self.began = self.last_line = time.monotonic()
        self.start = start
        self.has_warned = False

    def __enter__(self) -> Self:
        """Return the log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close what was opened."""
        if self.active:
            self.bar.close()
            self.trackers.close(finished=self.update == self.total)
            self.file.close()

    def advance(self) -> None:
        """One more update is done."""
        if self.active:
            self.bar.update()

    def write(self, metrics: dict[str, float]) -> None:
        """Record the averages since the last call; `metrics` holds update, epoch, loss, ..."""
        if not self.active:
            return
        try:
            self.file.write(f"{json.dumps(metrics)}\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.update = update = int(metrics["update"])
        self.trackers.log(
            {name: value for name, value in metrics.items() if name not in ("update", "epoch")},
            update,
        )
        shown = {"loss": f"{metrics['loss']:.4f}"}
        if "nn_accuracy" in metrics:
            shown["nn_accuracy"] = f"{metrics['nn_accuracy']:.3f}"
        for name in ("knn", "view_agreement"):
            if name in metrics:
                shown[name] = f"{metrics[name]:.3f}"
        if metrics.get("searched_again", 0) > 0:
            shown["searched_again"] = f"{metrics['searched_again']:.0%}"
        shown["images/s"] = f"{metrics['images_per_second']:.0f}"
        wait = metrics.get("data_wait", 0.0)
        if wait >= SHOWN_WAIT:
            shown["waits for data"] = f"{wait:.0%}"
        if wait > LONG_WAIT and not self.has_warned:
            self.has_warned = True
            tqdm.write(
                f"updates wait for data {wait:.0%} of the time; `maect-fast bench loader` says "
                "what limits loading, and what would help",
                file=sys.stderr,
            )
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable:
            self._line(update, shown)

    def _line(self, update: int, shown: dict[str, str]) -> None:
        """A plain line for files and pipes, where a bar would be noise."""
        now = time.monotonic()
        if now - self.last_line < SECONDS_BETWEEN_LINES and update < self.total:
            return
        self.last_line = now
        left = (now - self.began) / (update - self.start) * (self.total - update)
        figures = "  ".join(f"{name} {value}" for name, value in shown.items())
        line = f"{self.title}  update {update}/{self.total}  {figures}  ETA {left:.0f} s"
        print(line, file=sys.stderr, flush=True)  # noqa: T201 (the progress display)
