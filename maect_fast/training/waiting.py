"""For how long updates wait for their batches."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

__all__ = ["DataWait"]

T = TypeVar("T")


class DataWait:
    """Counts the seconds in which a device has nothing to do because a batch is awaited.

    On a GPU the host runs ahead and may wait for a batch while there is work: there the wait counts
    for no longer than the device lay idle between two updates, by events on its stream. The first
    batch, for which workers start, does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        self._is_first = True
        self._gaps: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []

    def __call__(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that each is awaited."""
        iterator = iter(batches)
        while True:
            ended, began = self._mark(), time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            waited = time.monotonic() - began
            if self._is_first:
                self._is_first = False
            elif ended is None:
                self._seconds += waited
            else:
                starts = self._mark()
                assert starts is not None
                self._gaps.append((ended, starts, waited))
            yield batch

    def _mark(self) -> torch.cuda.Event | None:
        """When the device comes by here."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def read(self) -> float:
        """Seconds since the last call; on a GPU after a synchronisation."""
        seconds = self._seconds
        for ended, starts, waited in self._gaps:
            idle: float = ended.elapsed_time(starts) / 1e3
            seconds += min(waited, idle)
        self._seconds = 0.0
        self._gaps.clear()
        return seconds
