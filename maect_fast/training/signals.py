"""Signals that ask a run to save and leave."""

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Self, TypeVar

__all__ = ["StopSignal"]

T = TypeVar("T")

RETRY_SECONDS = 0.1
WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class _WaitEndedError(BaseException):
    """Ends a wait from within a signal handler; no handler of `Exception` may swallow it."""


class StopSignal:
    """Receives SIGTERM, SIGUSR1 and the first Ctrl-C; a second Ctrl-C interrupts.

    A signal only leaves a mark, which is looked at between updates, unless it comes, or has come,
    while a batch is awaited: then the wait ends, at once or after a while.

    Args:
        patience: seconds for which a batch is still awaited. 0 where the process is alone; ranks of
            a run need each other to save, so each goes on for as long as it gets its data.
    """

    def __init__(self, *, patience: float = 0.0) -> None:
        self.patience = patience
        self.number = 0
        """Of the first signal that came, 0 while there is none."""
        self.ended_wait = False
        self._is_waiting = False

    def __enter__(self) -> Self:
        """Take the signals over; Python delivers them to the main thread only."""
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in WATCHED}
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_wait)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def awaiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, until a wait for one is ended by a signal."""
        iterator = iter(batches)
        while True:
            try:
                try:
                    self._is_waiting = True
                    if self.number:
                        self._hurry()
                    batch = next(iterator)
                finally:
                    self._is_waiting = False
                    if self._before:
                        signal.setitimer(signal.ITIMER_REAL, 0)
            except StopIteration:
                return
            except _WaitEndedError:
                self.ended_wait = True
                return
            yield batch

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number
        if self._is_waiting:
            self._hurry()

    def _hurry(self) -> None:
        # Again and again: an exception is lost where Python happens to finalise an object.
        signal.setitimer(signal.ITIMER_REAL, max(self.patience, RETRY_SECONDS), RETRY_SECONDS)

    def _end_wait(self, number: int, frame: FrameType | None) -> None:
        if self._is_waiting:
            raise _WaitEndedError
