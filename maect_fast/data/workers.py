"""Processes that read images, each item of which is a whole batch."""

import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from maect_fast.config import ConfigError
from maect_fast.data.broken import DataError
from maect_fast.data.sources import Source

__all__ = ["Schedule", "Work", "data_loader", "empty", "handed_over", "num_cores"]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 1.0
# Where workers put their batches, on Linux.
SHARED_MEMORY = Path("/dev/shm")
# The DataLoader's own default, of batches that a worker is ahead.
PREFETCH = 2

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Work(Protocol[T_co]):
    """What workers do: of a batch's (epoch, image indices), the batch."""

    @property
    def source(self) -> Source:
        """The images."""

    def __getitem__(self, key: tuple[int, list[int]]) -> T_co:
        """Make a batch."""


class Schedule(Sampler[tuple[int, list[int]]]):
    """The (epoch, image indices) of the batches to come; set anew before each pass."""

    def __init__(self) -> None:
        self.items: list[tuple[int, list[int]]] = []

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor to fill; in a worker in shared memory, where it has to go.

    Left to the queue's thread, the move costs a copy, and where the memory is full the batch is
    lost and the main process waits for it for ever.
    """
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    storage: torch.UntypedStorage = torch.UntypedStorage._new_shared(num_bytes)  # type: ignore[no-untyped-call]
    return torch.tensor([], dtype=dtype).set_(storage).view(shape)


def handed_over(decoded: "DataLoader[T]") -> Iterator[T]:
    """What the workers hand over; their end, or that of their memory, in one line."""
    try:
        with _without_main():
            batches = iter(decoded)
        yield from batches
    except RuntimeError as error:
        what = str(error).strip().splitlines()[-1]
        if "DataLoader worker" not in what and "shared memory" not in what:
            raise
        room = ""
        if SHARED_MEMORY.is_dir():
            total, _, free = shutil.disk_usage(SHARED_MEMORY)
            room = f" ({SHARED_MEMORY} has {free / 2**20:.0f} of {total / 2**20:.0f} MiB free)"
        raise DataError(
            f"a worker that reads images ended: {what}{room}; lower data.workers, or give "
            f"{SHARED_MEMORY} and the process more memory"
        ) from error


def _check_shared_memory(workers: int, batch_bytes: int) -> None:
    """Refuse workers whose batches do not fit where they have to go."""
    if not SHARED_MEMORY.is_dir():
        return
    # Those that workers are ahead, the one that is used and the one that is on its way.
    needed = (PREFETCH * workers + 2) * batch_bytes
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed > free:
        raise ConfigError(
            f"data.workers: the batches of {workers} workers take {needed / 2**20:.0f} MiB of "
            f"{SHARED_MEMORY}, which has {free / 2**20:.0f} MiB free; lower data.workers "
            "(0 takes none) or make it larger (docker run --shm-size)"
        )


def data_loader(
    work: Work[T],
    schedule: Schedule,
    *,
    workers: int,
    batch_bytes: int,
    persistent: bool,
) -> DataLoader[T]:
    """A DataLoader whose items are whole batches, each made by one worker."""
    # More processes than cores only take turns, and torch warns of them.
    workers = min(workers, num_cores())
    context = None
    if workers:
        work.source.check_workers()
        _check_shared_memory(workers, batch_bytes)
        # Forking this process would copy its locks, of CUDA and of OpenMP among others, in whatever
        # state they are. The fork server imports what follows once, so that a worker starts in
        # milliseconds all the same.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["maect_fast.data"])
        _start_fork_server()
    return DataLoader(
        cast("Dataset[T]", work),
        batch_size=None,
        sampler=schedule,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_init_worker,
        multiprocessing_context=context,
        persistent_workers=persistent and workers > 0,
        # An own generator, or the DataLoader would advance the global one.
        generator=torch.Generator(),
    )


@contextmanager
def _without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not run the main program's file again.

    They need nothing of it: what a Dataset needs goes to them by value. So a script may train at
    its top level.
    """
    main: Any = sys.modules["__main__"]
    spec, file = main.__spec__, main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start_fork_server() -> None:
    """Start the fork server, if there is none, with the stop signals blocked.

    Ctrl-C, launchers and schedulers send them to the whole process group. The main process decides
    what they mean; without the server, workers would take themselves for orphans and end while the
    main process still waits for their batches. What is blocked here stays blocked in the server,
    and waits for this process.
    """
    # It lifts the block again when it has to start, so it comes first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    """Let the main process, and nobody else, stop this worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """Wait until the main process is gone, or asks for the end as it does when it exits.

    The DataLoader watches the process that forked the worker, which is the fork server, and the
    server lives as long as its workers.
    """
    main = multiprocessing.parent_process()
    assert main is not None
    if sys.platform == "linux":
        asked = False
        while main.is_alive() and not asked:
            received = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
            asked = received is not None and received.si_pid == main.pid
    else:
        # No word on who sent a signal here: a worker ends on anybody's request.
        main.join()
    os._exit(0)
