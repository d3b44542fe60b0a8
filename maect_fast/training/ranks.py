"""Watches the ranks of a run: one that dies, hangs or fails is named, and all of them end.

Once a second a thread of each rank writes into the store at which they met that the rank lives and
how many messages its group has begun, and reads what the others wrote. Who is behind the others in
messages keeps them waiting: they are all in the next one.
"""

import atexit
import functools
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import groupby
from types import FrameType
from typing import Literal, NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from maect_fast.config import ConfigError

__all__ = [
    "TIMEOUT",
    "Place",
    "RankWatch",
    "Seen",
    "Sign",
    "join_ranks",
    "messages_of",
    "read_place",
    "verdict",
]

# A rank may wait this long for another that rests, e.g. while rank 0 writes a checkpoint, and for
# all to meet.
TIMEOUT = timedelta(minutes=30)
# Without an answer from the store for so long, its machine is gone.
STORE_TIMEOUT = timedelta(seconds=10)
# In which all ranks come to an error that is theirs alike, and read what others say.
GRACE_SECONDS = 3.0
GOES_ON = "the same command continues from the last checkpoint"
# What the communication of a rank says whose peer is gone.
LOST_PEER = re.compile("gloo|nccl|connection|broken pipe|store", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launcher put this process."""

    rank: int
    """Of all processes."""
    size: int
    """Number of processes."""
    local_rank: int
    """Of those on this machine."""


def read_place() -> Place:
    """RANK, WORLD_SIZE and LOCAL_RANK; without a launcher a world of one.

    Raises:
        ConfigError: numbers that no launcher sets.
    """
    size = _number("WORLD_SIZE", default=1, low=1)
    rank = _number("RANK", default=0 if size == 1 else None, high=size - 1)
    return Place(rank, size, _number("LOCAL_RANK", default=0))


def _number(name: str, *, default: int | None = None, low: int = 0, high: int = 2**31) -> int:
    """A number from the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is not None and text.isdecimal() and low <= int(text) <= high:
        return int(text)
    limits = f"{low} or more" if high == 2**31 else f"{low} to {high}"
    got = "nothing" if text is None else text
    raise ConfigError(
        f"{name}: expected {limits} in the environment, as torchrun sets it, got {got}"
    )


@dataclass(slots=True)
class Sign:
    """What a rank tells of itself."""

    host: str
    """Its machine."""
    state: Literal["rests", "runs", "done", "failed"] = "rests"
    """`rests` where it may take long: in the first update, or when it saves."""
    beat: int = 0
    """Grows as long as the process lives."""
    messages: int = 0
    """Messages that its group has begun; all ranks begin the same."""
    update: int = 0
    """Updates done."""
    where: str = ""
    """The line of Python that its main thread is in."""
    error: str = ""
    """Why it failed."""


@dataclass(slots=True)
class Seen:
    """The last sign of a rank, and when it was new."""

    sign: Sign | None
    lived: float
    """Seconds, when the sign last changed."""
    moved: float
    """When its number of messages last did."""


def verdict(seen: Sequence[Seen], *, own: int, now: float, patience: float) -> str | None:
    """Who has failed, died or hung, and what the user may do; None while all is well.

    Args:
        seen: of every rank.
        own: this rank, which lives.
        now: on the clock of `seen`.
        patience: seconds for a sign of life, twice as many for the next message.
    """
    signs = [one.sign for one in seen]
    for rank, sign in enumerate(signs):
        if sign is not None and sign.state == "failed":
            return f"{_names([rank], signs)} failed: {sign.error}"

    more = f"{GOES_ON} (rank_timeout=SECONDS waits longer)"
    quiet = {
        rank: now - one.lived
        for rank, one in enumerate(seen)
        if rank != own and not (one.sign is not None and one.sign.state == "done")
    }
    absent = [rank for rank in quiet if signs[rank] is None]
    if any(quiet[rank] > 3 * patience for rank in absent):
        return f"{_names(absent, signs)} did not start within {3 * patience:g} s; {more}"
    if any(quiet[rank] > patience for rank in quiet if rank not in absent):
        # And those that went with it, a moment later.
        lost = [rank for rank in quiet if rank not in absent and quiet[rank] > 0.7 * patience]
        return (
            f"{_names(lost, signs)}: no sign of life for {patience:g} s, killed, stopped or cut "
            f"off; {more}"
        )
    here = [rank for rank, sign in enumerate(signs) if sign is not None and sign.state != "done"]
    if len(here) < len(seen):
        return None
    counts = [sign.messages for sign in signs if sign is not None]
    behind = [rank for rank in here if counts[rank] == min(counts)]
    may_rest = any((sign := signs[rank]) is not None and sign.state == "rests" for rank in behind)
    if may_rest and len(behind) == len(seen):
        return None
    waits = TIMEOUT.total_seconds() if may_rest or len(behind) == len(seen) else 2 * patience
    if min(now - seen[rank].moved for rank in behind) <= waits:
        return None
    slow = signs[behind[0]]
    assert slow is not None
    return (
        f"{_names(behind, signs)}: the others waited {waits:g} s for it at update {slow.update}, "
        f"in {slow.where}; {more}"
    )


def _names(ranks: Sequence[int], signs: Sequence[Sign | None]) -> str:
    """`rank 3 on a`, or `ranks 2, 3 on a, rank 4 on b`."""

    def host(rank: int) -> str:
        sign = signs[rank]
        return "" if sign is None else f" on {sign.host}"

    return ", ".join(
        f"rank{'s' * (len(some) > 1)} {', '.join(map(str, some))}{where}"
        for where, some in ((where, list(group)) for where, group in groupby(ranks, host))
    )


class RankWatch:
    """Tells the other ranks that this one lives, and ends the process when one of them does not.

    Args:
        place: this process, of two or more.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.patience = 20.0
        self.group: dist.ProcessGroup | None = None
        self.sign = Sign(host=socket.gethostname())
        # torchrun keeps the store in its own process; other launchers leave that to rank 0.
        uses_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        self.is_host = place.rank == 0 and not uses_agent
        self._closing = threading.Event()
        self._ends_at = math.inf
        # torchrun asks a machine's other ranks to end as soon as one has.
        self._before = signal.signal(signal.SIGTERM, self._terminate)
        self._keys = [str(rank) for rank in range(place.size)]
        self.address = os.environ.get("MASTER_ADDR"), _number("MASTER_PORT", low=1, high=65535)
        attempt = f"maect-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        # Two connections, as one that waits for the group's ranks lets nobody else speak.
        group_store, own_store = (self._connect(is_host) for is_host in (self.is_host, False))
        group_store.set_timeout(TIMEOUT)
        own_store.set_timeout(STORE_TIMEOUT)
        self.group_store = PrefixStore(f"{attempt}/group", group_store)
        self._store = PrefixStore(f"{attempt}/ranks", own_store)
        for key in self._keys:
            # So that reading does not wait for who is not here yet.
            self._store.compare_set(key, "", "null")
        # At once: who is here and dies is not one that never came.
        self._tell()
        self._thread = threading.Thread(target=self._watch, name="rank watch", daemon=True)
        self._thread.start()

    def _connect(self, is_host: bool) -> TCPStore:
        host, port = self.address
        if not host:
            raise ConfigError(
                "MASTER_ADDR: expected rank 0's machine in the environment, got nothing"
            )
        try:
            return TCPStore(host, port, self.place.size, is_host, TIMEOUT, wait_for_workers=False)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"MASTER_ADDR, MASTER_PORT: {host}:{port}: {reason}") from None

    @property
    def name(self) -> str:
        """Of this rank, for the user."""
        return f"rank {self.place.rank} on {self.sign.host}"

    def beat(self, update: int) -> None:
        """`update` updates are done, and the next one should not take long."""
        self.sign.update, self.sign.state = update, "runs"

    def rest(self) -> None:
        """What follows may take long, until the next `beat`."""
        self.sign.state = "rests"

    def close(self) -> None:
        """This rank is done, and the others may go on without it."""
        if self._closing.is_set():
            return
        self._stop()
        signal.signal(signal.SIGTERM, self._before)
        self.sign.state = "done"
        try:
            self._tell()
            deadline = time.monotonic() + self.patience
            # The store goes with its host.
            while self.is_host and time.monotonic() < deadline:
                if all(sign is not None and sign.state == "done" for sign in self._read()):
                    break
                time.sleep(0.05)
        except RuntimeError:
            # Nobody listens any more.
            pass

    def fail(self, text: str, *, report: str, code: int) -> NoReturn:
        """Tell the user and the other ranks why this one ends, and end it.

        Args:
            text: the reason in one line, for the others.
            report: what to print, once where all ranks come to the same text.
            code: exit status.
        """
        self._stop()
        is_told = False
        try:
            self._store.add(f"told/{self.sign.host}", 1)
            self.sign.state, self.sign.error = "failed", text
            self._tell()
            deadline = time.monotonic() + GRACE_SECONDS
            while self.place.rank > 0 and not is_told and time.monotonic() < deadline:
                lower = self._read()[: self.place.rank]
                is_told = any(
                    s is not None and s.state == "failed" and s.error == text for s in lower
                )
                time.sleep(0.05)
        except RuntimeError:
            # The store is gone: the user hears at least the reason.
            pass
        if not is_told:
            _say(report)
        if self.is_host:
            time.sleep(GRACE_SECONDS)
        os._exit(code)

    def fail_of(self, error: Exception) -> NoReturn:
        """`fail` for an error that nobody expected.

        Where it comes of another rank's end, the thread says so first and ends the process.
        """
        if LOST_PEER.search(f"{type(error).__name__} {error}"):
            time.sleep(self.patience + STORE_TIMEOUT.total_seconds())
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        lines = "".join(traceback.format_exception(error))
        self.fail(text, report=f"{lines}maect-fast: {self.name} failed: {text}", code=1)

    def _watch(self) -> None:
        """Until the run is over; ends the process when a rank is lost."""
        now = time.monotonic()
        seen = [Seen(None, now, now) for _ in self._keys]
        while not self._closing.wait(self._interval()):
            try:
                self._tell()
                signs = self._read()
            except RuntimeError:
                host = "its machine" if seen[0].sign is None else seen[0].sign.host
                address = ":".join(map(str, self.address))
                self._end(f"rank 0 on {host} is gone, {address} does not answer; {GOES_ON}")
            now = time.monotonic()
            for one, sign in zip(seen, signs, strict=True):
                if sign is None or sign == one.sign:
                    continue
                if one.sign is None or sign.messages != one.sign.messages:
                    one.moved = now
                one.sign, one.lived = sign, now
            line = verdict(seen, own=self.place.rank, now=now, patience=self.patience)
            if line is not None and not self._closing.is_set():
                self._end(line)
            # Only then: on a busy machine this thread may have slept through both.
            if now > self._ends_at:
                os._exit(128 + signal.SIGTERM)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        """End, but not before it is known whether a rank is lost."""
        self._ends_at = time.monotonic() + self.patience + 2 * GRACE_SECONDS

    def _interval(self) -> float:
        return min(1.0, self.patience / 5)

    def _stop(self) -> None:
        """End the thread."""
        self._closing.set()
        self._thread.join()

    def _tell(self) -> None:
        """Write the own sign."""
        self.sign.beat += 1
        if self.group is not None:
            self.sign.messages = messages_of(self.group)
        main = threading.main_thread().ident
        frame = sys._current_frames().get(main) if main is not None else None
        if frame is not None:
            name = os.path.basename(frame.f_code.co_filename)
            self.sign.where = f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"
        self._store.set(str(self.place.rank), json.dumps(asdict(self.sign)))

    def _read(self) -> list[Sign | None]:
        """Of all ranks; None of those that are not here yet."""
        found = [json.loads(text) for text in self._store.multi_get(self._keys)]
        return [None if fields is None else Sign(**fields) for fields in found]

    def _end(self, line: str) -> NoReturn:
        """End the process, after one line per machine."""
        try:
            is_first = self._store.add(f"told/{self.sign.host}", 1) == 1
        except RuntimeError:
            # Who spoke cannot be known: the first of the machine does, and next to rank 0 the next.
            is_first = self.place.local_rank == 0 or self.place.rank == 1
        if is_first:
            _say(f"maect-fast: {line}")
        # So long, who failed has the word, and the others read from a store in this process.
        time.sleep(GRACE_SECONDS)
        # At Python's own end a group whose peers are gone waits or aborts.
        os._exit(1)


def _say(text: str) -> None:
    """In one piece, below a progress bar."""
    sys.stdout.flush()
    sys.stderr.write(("\n" if sys.stderr.isatty() else "") + text.rstrip() + "\n")
    sys.stderr.flush()


def messages_of(group: dist.ProcessGroup) -> int:
    """Number of messages that the group has begun on this rank, DDP's among them."""
    number: int = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return number


@functools.cache
def join_ranks() -> RankWatch | None:
    """Meet the other ranks, once in a process; None where there are none.

    Raises:
        ConfigError: an environment that no launcher sets.
    """
    place = read_place()
    if place.size == 1:
        return None
    watch = RankWatch(place)
    # For programs that do not say when they are done.
    atexit.register(watch.close)
    return watch
