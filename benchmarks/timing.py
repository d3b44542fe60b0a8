"""How long calls take, on their device, taking turns."""

import ctypes
import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch

from maect_fast.benchmarks.registry import Call

__all__ = ["Timing", "measure"]

MIN_ROUNDS, MAX_ROUNDS = 7, 50
SECONDS_PER_CALL = 1.5
"""Rounds end after this long per provider, once there are enough of them."""
GPU_SECONDS_PER_CALL = 0.1
"""The same on a GPU, where a run of all shapes is to end in minutes."""
FLUSH_BYTES = 256 << 20
"""Written between two calls on a GPU: several times the L2 cache of an H200 (50 MB)."""
SETTLE_SECONDS = 0.01
"""Between two calls on a CPU: threads of one program's OpenMP spin for a few ms after its work and
would take the cores from the next program's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Milliseconds of one call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    graph_ms: float | None
    """Median of CUDA graph replays; None on a CPU or where the call cannot be captured."""
    peak_mib: float | None
    """Memory that a call needs beyond its inputs; on a CPU the growth of the resident set."""


def measure(
    calls: Mapping[str, Call], device: torch.device, capturable: frozenset[str] = frozenset()
) -> dict[str, Timing]:
    """Time every call; they take turns, so that what else the machine does meets all alike.

    On a GPU by events, with the L2 cache flushed before each call.

    Args:
        calls: by provider; each has run before, so that nothing compiles now.
        device: where they run.
        capturable: the providers whose calls a CUDA graph can hold.
    """
    peaks = {name: _peak_mib(call, device) for name, call in calls.items()}
    seconds = _gpu_rounds(calls, device) if device.type == "cuda" else _cpu_rounds(calls)
    graphs: dict[str, float] = {}
    if device.type == "cuda":
        for name in capturable & calls.keys():
            replay = _capture(calls[name])
            if replay is not None:
                graphs[name] = _percentiles(_gpu_rounds({name: replay}, device)[name])[1]
    timings = {}
    for name, values in seconds.items():
        p20, p50, p80 = _percentiles(values)
        timings[name] = Timing(
            p20_ms=p20, p50_ms=p50, p80_ms=p80, graph_ms=graphs.get(name), peak_mib=peaks[name]
        )
    return timings


def _percentiles(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80 in ms of seconds."""
    deciles = quantiles(values, n=10, method="inclusive")
    return 1e3 * deciles[1], 1e3 * deciles[4], 1e3 * deciles[7]


def _enough(rounds: int, began: float, seconds: float) -> bool:
    if rounds < MIN_ROUNDS:
        return False
    return rounds >= MAX_ROUNDS or time.monotonic() - began > seconds


def _cpu_rounds(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds per call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, began = 0, time.monotonic()
    # A collection in the middle of a call would be timed with it.
    gc.collect()
    gc.disable()
    try:
        while not _enough(rounds, began, SECONDS_PER_CALL * len(calls)):
            for name, call in calls.items():
                time.sleep(SETTLE_SECONDS)
                # As in a program that calls the op again and again: right after a pause a call of
                # 0.8 ms takes 1.1 ms, and one with more Python around it 1.5 instead of 0.9.
                call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            rounds += 1
    finally:
        gc.enable()
    return times


def _gpu_rounds(calls: Mapping[str, Call], device: torch.device) -> dict[str, list[float]]:
    """Seconds per call, by events."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds, began = 0, time.monotonic()
    while not _enough(rounds, began, GPU_SECONDS_PER_CALL * len(calls)):
        events = {}
        for name, call in calls.items():
            # The flush also keeps the device busy while the host prepares the call's launches.
            flush.zero_()
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            call()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize(device)
        for name, (start, end) in events.items():
            times[name].append(start.elapsed_time(end) / 1e3)
        rounds += 1
    return times


def _capture(call: Call) -> Call | None:
    """Replay of the call as a CUDA graph; None where it cannot be captured."""
    try:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay() -> dict[str, torch.Tensor]:
        graph.replay()
        return outputs

    return replay


def _peak_mib(call: Call, device: torch.device) -> float | None:
    """Peak memory of one call beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        # Memory that malloc kept from an earlier call would hide what this one needs.
        ctypes.CDLL(None).malloc_trim(0)
        # Resets the high-water mark of the resident set, see proc(5).
        Path("/proc/self/clear_refs").write_text("5")
        before_kib = _status_kib("VmRSS")
        call()
        return max(0.0, (_status_kib("VmHWM") - before_kib) / 2**10)
    except (OSError, AttributeError):
        # Not a Linux with glibc.
        return None


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")
