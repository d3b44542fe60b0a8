"""A rank that dies, hangs or fails is named in one line, and all ranks end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maect_fast.checkpoint import load_checkpoint
from maect_fast.config import ConfigError, Stage
from maect_fast.training.ranks import Place, Seen, Sign, read_place, verdict
from maect_fast.training.stages import last_checkpoint

PATIENCE = 4.0
HOST = socket.gethostname()
# The command line as torchrun starts it; rank 1 goes wrong after some updates in the way asked for.
PROGRAM = """
import os, sys, time
from maect_fast.cli import main
from maect_fast.data import DataError
from maect_fast.training.update import Update

rank, fault = int(os.environ["RANK"]), sys.argv.pop(1)
update = Update.__call__

def go_wrong(self, batch):
    outputs, state = update(self, batch), self.state
    if state.update == 20:
        os.write(1, f"{rank} {os.getpid()}\\n".encode())
    if rank == 1 and state.update == 25:
        if fault == "data":
            raise DataError("no more images")
        if fault == "raises":
            raise ZeroDivisionError("an error of ours")
        if fault == "hangs":
            time.sleep(600)
    return outputs

Update.__call__ = go_wrong
sys.exit(main())
"""


class Run:
    """A stage under torchrun, two processes on one machine."""

    def __init__(self, command: list[str], folder: Path, fault: str = "none") -> None:
        program = folder / "program.py"
        program.write_text(PROGRAM)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.process = subprocess.Popen(
            [*launcher, "--nproc-per-node=2", str(program), fault, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def pids(self) -> dict[int, int]:
        """Of the ranks, once they train."""
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline().split() for _ in range(2)]
        assert all(lines), self.process.communicate()[1]
        return {int(rank): int(pid) for rank, pid in lines}

    def end(self) -> tuple[float, list[str], str]:
        """Seconds until the launcher and so all ranks are gone, lines of ours, all of stderr."""
        began = time.monotonic()
        _, text = self.process.communicate(timeout=120)
        assert self.process.returncode != 0
        ours = [line for line in text.splitlines() if line.startswith("maect-fast")]
        return time.monotonic() - began, ours, text


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """A run whose processes are gone after the test, however it ends."""
    runs: list[Run] = []

    def start(command: list[str], fault: str = "none") -> Run:
        runs.append(Run(command, tmp_path, fault))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.terminate()
            run.process.communicate(timeout=60)


def endless(recipe: Path, out: Path) -> list[str]:
    """A run that takes hours."""
    settings = ["epochs=1000000", f"rank_timeout={PATIENCE}", "save_minutes=60"]
    return ["pretrain", "--recipe", str(recipe), "--out", str(out), *settings]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_stopped_run_is_saved_and_no_success(
    recipes: dict[Stage, Path], tmp_path: Path, launch: Callable[..., Run]
) -> None:
    """A signal to one rank ends both, after the first has saved."""
    out = tmp_path / "run"
    run = launch(endless(recipes["pretrain"], out))
    os.kill(run.pids()[1], signal.SIGTERM)
    _, _, text = run.end()
    assert text.count("stopped by SIGTERM and saved; the same command continues") == 1
    assert "exitcode  : 143" in text
    assert load_checkpoint(last_checkpoint(out))["update"] >= 20


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_rank_that_dies_is_named(
    number: signal.Signals, launch: Callable[..., Run], recipes: dict[Stage, Path], tmp_path: Path
) -> None:
    run = launch(endless(recipes["pretrain"], tmp_path / "run"))
    pids = run.pids()
    os.kill(pids[1], number)
    seconds, ours, text = run.end()
    assert seconds < 60
    assert all(is_gone(pid) for pid in pids.values())
    assert ours == [
        f"maect-fast: rank 1 on {HOST}: no sign of life for 4 s, killed, stopped or cut off; "
        "the same command continues from the last checkpoint (rank_timeout=SECONDS waits longer)"
    ], text
    # torchrun's own; ours have none.
    assert text.count("Traceback") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(
    launch: Callable[..., Run], recipes: dict[Stage, Path], tmp_path: Path
) -> None:
    """Though its process lives and says so."""
    run = launch(endless(recipes["pretrain"], tmp_path / "run"), "hangs")
    pids = run.pids()
    seconds, ours, text = run.end()
    assert seconds < 60
    assert all(is_gone(pid) for pid in pids.values())
    (line,) = ours
    expected = f"rank 1 on {HOST}: the others waited 8 s for it at update 24, in program.py:"
    assert line.startswith(f"maect-fast: {expected}"), text
    assert "(go_wrong)" in line
    assert text.count("Traceback") == 1


@pytest.mark.slow
def test_a_rank_that_raises_says_where(
    launch: Callable[..., Run], recipes: dict[Stage, Path], tmp_path: Path
) -> None:
    run = launch(endless(recipes["pretrain"], tmp_path / "run"), "raises")
    pids = run.pids()
    seconds, ours, text = run.end()
    assert seconds < 60
    assert all(is_gone(pid) for pid in pids.values())
    expected = f"maect-fast: rank 1 on {HOST} failed: ZeroDivisionError: an error of ours"
    assert ours == [expected], text
    # Its own and torchrun's.
    assert text.count("Traceback") == 2
    assert "in go_wrong" in text


@pytest.mark.slow
def test_an_error_of_one_rank_is_its_own_line(
    launch: Callable[..., Run], recipes: dict[Stage, Path], tmp_path: Path
) -> None:
    run = launch(endless(recipes["pretrain"], tmp_path / "run"), "data")
    run.pids()
    seconds, ours, text = run.end()
    assert seconds < 60
    assert ours == [f"maect-fast pretrain: rank 1 on {HOST}: no more images"], text
    assert text.count("Traceback") == 1


@pytest.mark.slow
def test_an_error_of_all_ranks_is_told_once(
    launch: Callable[..., Run], recipes: dict[Stage, Path], tmp_path: Path
) -> None:
    command = endless(recipes["pretrain"], tmp_path / "run")
    _, ours, text = launch([*command, "batch_size=1"]).end()
    expected = "batch_size: expected a number in [2, 16777216], got 1"
    assert ours == [f"maect-fast pretrain: {expected}"], text
    _, ours, text = launch([*command, "--no-such-option"]).end()
    assert text.count("does not know: --no-such-option") == 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("WORLD_SIZE", "abc", "1 or more"),
        ("WORLD_SIZE", "0", "1 or more"),
        ("WORLD_SIZE", "-2", "1 or more"),
        ("RANK", "two", "0 to 3"),
        ("RANK", "4", "0 to 3"),
        ("RANK", None, "0 to 3"),
        ("LOCAL_RANK", "1.5", "0 or more"),
    ],
)
def test_an_environment_of_no_launcher_is_one_line(
    name: str, value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, number in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, number)
    assert read_place() == Place(rank=3, size=4, local_rank=1)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    text = (
        f"{name}: expected {expected} in the environment, as torchrun sets it, "
        f"got {value or 'nothing'}"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        read_place()


def seen(now: float = 100.0, **changes: Any) -> Seen:
    """A rank that lives at `now`."""
    sign = Sign(host="a", state="runs", messages=7, update=3, where="engine.py:9 (_loop)")
    return Seen(replace(sign, **changes), lived=now, moved=now)


def judge(*ranks: Seen, now: float = 100.0, own: int = 0) -> str | None:
    return verdict(ranks, own=own, now=now, patience=10.0)


def test_ranks_that_live_are_let_be() -> None:
    assert judge(seen(), seen(89.0 + 1.5)) is None
    # Nobody waits for anybody, however long an update takes.
    slow = [Seen(one.sign, lived=100.0, moved=0.0) for one in (seen(), seen())]
    assert judge(*slow) is None
    assert judge(seen(), seen(0.0, state="done")) is None


def test_the_silent_are_named_with_those_that_went_with_them() -> None:
    ranks = [seen(), seen(89.5, host="b"), seen(90.5, host="b"), seen(99.0), seen(89.9)]
    line = judge(*ranks)
    assert line is not None
    assert line.startswith("ranks 1, 2 on b, rank 4 on a: no sign of life for 10 s")
    # Who was stopped itself has not seen the others for as long.
    assert judge(*ranks[1:2]) is None


def test_who_never_came_has_three_times_as_long() -> None:
    absent = Seen(None, lived=70.5, moved=70.5)
    assert judge(seen(), absent) is None
    line = judge(seen(), absent, now=101.0)
    assert line is not None
    assert line.startswith("rank 1 did not start within 30 s")


def behind(moved: float, **changes: Any) -> Seen:
    """A rank that lives and began its last message at `moved`, one less than `seen`."""
    return replace(seen(messages=6, host="b", **changes), moved=moved)


def test_who_keeps_the_others_waiting_is_named() -> None:
    assert judge(seen(), behind(80.5)) is None
    for own in (0, 1):
        line = judge(seen(), behind(79.5), own=own)
        assert line is not None
        assert line.startswith(
            "rank 1 on b: the others waited 20 s for it at update 3, in engine.py:9 (_loop)"
        )


def test_who_rests_may_take_long() -> None:
    assert judge(seen(), behind(-1600.0, state="rests")) is None
    line = judge(seen(), behind(-1701.0, state="rests"))
    assert line is not None
    assert line.startswith("rank 1 on b: the others waited 1800 s")


def test_a_failure_is_passed_on() -> None:
    line = judge(seen(89.0), seen(state="failed", error="data.root: no images"))
    assert line == "rank 1 on a failed: data.root: no images"
