"""Where the time of an update goes: named ranges in the code, and a profile of some updates.

While no profile is taken a range costs one function call. While one is, `torch` records a Chrome
trace and counts what every range launched, and `nsight` leaves the recording to Nsight Systems or
Nsight Compute, which read NVTX.
"""

import csv
import gzip
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

import torch

__all__ = ["Profile", "RangeName", "RangeTime", "profile_range", "range_times"]

RangeName = Literal[
    "data",
    "frozen blocks",
    "tuned blocks",
    "decoder",
    "head",
    "search",
    "loss",
    "backward",
    "optimiser",
    "EMA",
    "enqueue",
]
WINDOW = "profiled updates"
OTHER = "other"

Range: TypeAlias = AbstractContextManager[object]
Event: TypeAlias = dict[str, Any]
BatchT = TypeVar("BatchT")

_OFF: Range = nullcontext()
# The one switch of all ranges; a profile sets it for as long as it lasts.
_open: Callable[[str], Range] | None = None


def profile_range(name: RangeName) -> Range:
    """Whatever runs inside belongs to this part of the update, if a profile is being taken.

    Code that torch.compile compiles has no ranges inside.
    """
    if torch.compiler.is_compiling() or _open is None:
        return _OFF
    return _open(name)


class Profile:
    """A profile of some updates of one run, taken by one process.

    `torch` writes trace.json.gz (a Chrome trace) and ranges.csv (see `range_times`) and tells the
    table. `nsight` opens NVTX ranges between cudaProfilerStart and cudaProfilerStop and writes
    nothing: two programs cannot both have CUPTI.

    Args:
        updates: their numbers; an empty range for no profile.
        profiler: who records.
        folder: where the files go.
        device: where the updates are computed.
        tell: shows a text to the user.
    """

    def __init__(
        self,
        updates: range,
        profiler: Literal["torch", "nsight"],
        *,
        folder: Path,
        device: torch.device,
        tell: Callable[[str], None],
    ) -> None:
        self.updates = updates
        self.profiler = profiler
        self.folder = folder
        self.device = device
        self.tell = tell
        self._session = ExitStack()
        self._trace: torch.profiler.profile | None = None
        self._taken: list[int] = []
        self._is_open = False

    def batches(self, batches: Iterator[BatchT], update: int) -> Iterator[BatchT]:
        """Pass on the batches of updates `update`, `update + 1`, ...; waiting for one is "data"."""
        while True:
            if self._is_open and update not in self.updates:
                self._finish()
            elif not self._is_open and update in self.updates:
                self._begin()
            with profile_range("data"):
                batch = next(batches, None)
            if batch is None:
                return
            if self._is_open:
                self._taken.append(update)
            yield batch
            update += 1

    def __enter__(self) -> Self:
        """Return the profile itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish what has begun; a run that failed leaves no profile."""
        if kind is not None:
            self._session.close()
        elif self._is_open and self._taken:
            self._finish()
        elif self.updates and not self._taken:
            self._session.close()
            start, stop = self.updates.start, self.updates.stop
            self.tell(f"profile={start}:{stop}: this process made none of these updates")

    def _begin(self) -> None:
        """Start the recorder, then open the ranges."""
        self._synchronize()
        if self.profiler == "nsight":
            self._session.enter_context(torch.cuda.profiler.profile())
            # NVTX ranges belong to a thread: autograd must launch the backward from this one.
            self._session.enter_context(torch.autograd.set_multithreading_enabled(False))
        else:
            self._trace = self._session.enter_context(_torch_profiler(self.device))
        # The device's work belongs to the profile even if it ends after the host's.
        self._session.callback(self._synchronize)
        self._session.enter_context(_ranges(self.profiler))
        self._is_open = True

    def _finish(self) -> None:
        """Stop, write the files and tell the table."""
        self._session.close()
        self._is_open = False
        profiled = f"profiled updates {self._taken[0]} to {self._taken[-1]}"
        if self._trace is None:
            self.tell(f"{profiled} for {self.profiler}")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "trace.json.gz"
        self._trace.export_chrome_trace(str(path))
        with gzip.open(path) as trace:
            events = json.load(trace)["traceEvents"]
        times = range_times(events, num_updates=len(self._taken))
        is_cuda = self.device.type == "cuda"
        if is_cuda and not any(time.launches for time in times):
            self.tell("no kernel was recorded: under another profiler use profiler=nsight")
        header, rows = _table(times, is_cuda=is_cuda)
        with (self.folder / "ranges.csv").open("w", newline="") as file:
            csv.writer(file).writerows([[title.replace(" ", "_") for title in header], *rows])
        self.tell(f"{profiled}: {path}\n\n{_markdown(header, rows)}\n")

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeTime:
    """What belongs to one range alone, not to a range inside it; averages per update."""

    name: str
    """A `RangeName`, or "other": what lies in no range."""
    host_ms: float
    """Wall time."""
    device_ms: float
    """Time of the device activities that were launched in the range; 0 on a CPU."""
    launches: float
    """Kernels, copies and fills on a device."""
    operators: float
    """Operator calls, those inside others and autograd's nodes included."""


def range_times(events: Sequence[Event], *, num_updates: int) -> list[RangeTime]:
    """Sum up the events of a Chrome trace by range, in the order of `RangeName`.

    An operator or a kernel belongs to the innermost range that is open when it is launched,
    whatever the thread: autograd may launch the backward from its own.

    Args:
        events: `traceEvents` of a trace that `Profile` wrote.
        num_updates: how many updates it holds.
    """
    starts, owners = _pieces(events)
    host: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    operators: Counter[str] = Counter()
    for start, end, owner in zip(starts, starts[1:], owners, strict=False):
        host[owner] += end - start

    def owner_at(time: float) -> str:
        # Before the first piece this is the last one, which is nobody's either.
        return owners[bisect_right(starts, time) - 1]

    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
    }
    for event in events:
        if event.get("cat") == "cpu_op":
            operators[owner_at(event["ts"])] += 1
        elif event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            owner = owner_at(launched.get(event["args"]["correlation"], -inf))
            device[owner] += event["dur"]
            launches[owner] += 1
    return [
        RangeTime(
            name=name,
            host_ms=host[name] / 1e3 / num_updates,
            device_ms=device[name] / 1e3 / num_updates,
            launches=launches[name] / num_updates,
            operators=operators[name] / num_updates,
        )
        for name in (*get_args(RangeName), OTHER)
        if host[name]
    ]


def _pieces(events: Sequence[Event]) -> tuple[list[float], list[str]]:
    """Cut the wall clock where a range begins or ends: starts of the pieces, and their owners."""
    names = {*get_args(RangeName), WINDOW}
    edges = []
    for event in events:
        if event.get("cat") == "user_annotation" and event["name"] in names:
            start, duration, name = event["ts"], event["dur"], event["name"]
            # Of two that begin together the longer one is outside.
            edges += [(start, False, -duration, name), (start + duration, True, 0.0, name)]
    starts, owners = [], []
    is_open: list[str] = []
    for time, ends, _, name in sorted(edges):
        if ends:
            is_open.remove(name)
        else:
            is_open.append(name)
        starts.append(time)
        owners.append(OTHER if is_open in ([], [WINDOW]) else is_open[-1])
    return starts, owners


def _table(times: Sequence[RangeTime], *, is_cuda: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows: on a GPU the device's time beside the host's, on a CPU the wall time."""
    header = ["range", "ms per update", "share", "operator calls per update"]
    columns = [(time.host_ms, time.operators) for time in times]
    if is_cuda:
        header = ["range", "device ms per update", "share", "launches per update"]
        columns = [(time.device_ms, time.launches) for time in times]
    whole = sum(ms for ms, _ in columns) or 1.0
    rows = [
        [time.name, f"{ms:.3f}", f"{ms / whole:.3f}", f"{count:.1f}"]
        for time, (ms, count) in zip(times, columns, strict=True)
    ]
    if is_cuda:
        header.append("host ms per update")
        rows = [[*row, f"{time.host_ms:.3f}"] for row, time in zip(rows, times, strict=True)]
    return header, rows


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, alignment, *rows))


def _torch_profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # acc_events: without it the profiler warns that it forgets what it recorded before.
    return torch.profiler.profile(activities=activities, acc_events=True)


@contextmanager
def _ranges(profiler: Literal["torch", "nsight"]) -> Iterator[None]:
    """Switch the ranges on, inside one around them all."""
    import nvtx

    @contextmanager
    def nvtx_and_torch(name: str) -> Iterator[None]:
        with nvtx.annotate(name), torch.profiler.record_function(name):
            yield

    global _open
    _open = nvtx.annotate if profiler == "nsight" else nvtx_and_torch
    try:
        with _open(WINDOW):
            yield
    finally:
        _open = None
