"""Bars: what kills, damaged files and second writers leave of a run. Figures are printed (-s)."""

import multiprocessing
import random
import shutil
import sys
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from maect_fast.checkpoint import CheckpointError, load_checkpoint
from maect_fast.cli import main
from maect_fast.config import Stage
from maect_fast.training.log import read_metrics
from maect_fast.training.stages import last_checkpoint

pytestmark = pytest.mark.slow

STAGES: tuple[Stage, ...] = ("pretrain", "prepare-head", "tune")
KILLS = 51
# After its start a run is killed within so many; a whole one takes two to ten.
SECONDS = 4.0
DAMAGED = 200
RACES = 20
# A fork server that has imported everything starts a run in milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [__name__, "maect_fast.training.engine", "torch.utils.tensorboard", "tests.training"]
)


def run_main(arguments: list[str], told: Path, start: float = 0.0) -> None:
    """The command line in a process of its own, from `start` of the monotonic clock on."""
    torch.set_num_threads(1)
    with told.open("w") as sys.stderr:
        while time.monotonic() < start:
            pass
        code = main(arguments)
    sys.exit(code)


def spawn(arguments: list[str], told: Path, start: float = 0.0) -> ForkServerProcess:
    process = FORKS.Process(target=run_main, args=(arguments, told, start))
    process.start()
    return process


@pytest.fixture
def commands(recipes: dict[Stage, Path], tmp_path: Path) -> dict[Stage, list[str]]:
    """A run of 80 updates per stage that saves each one; the finished ones are in `whole-*`."""
    made: dict[Stage, list[str]] = {}
    init: list[str] = []
    for stage in STAGES:
        settings = ["epochs=20", "checkpoint_every=2", "save_minutes=0", "log_every=3"]
        made[stage] = [stage, "--recipe", str(recipes[stage]), *init, *settings]
        whole = tmp_path / f"whole-{stage}"
        assert main([*made[stage], "--out", str(whole)]) == 0
        init = ["--init", str(whole)]
    return made


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a tree that have a comparison, by where they are."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from leaves(value, f"{path}.{i}")
    elif isinstance(node, torch.Tensor):
        yield path, (node.dtype, tuple(node.shape), node.numpy().tobytes())
    else:
        yield path, node


def assert_same_checkpoint(a: Path, b: Path) -> None:
    first, second = (dict(leaves(load_checkpoint(path))) for path in (a, b))
    assert first == second, [key for key in first if first[key] != second.get(key)][:5]


def metrics(out: Path) -> list[dict[str, float]]:
    return [
        {
            name: value
            for name, value in line.items()
            if name not in ("images_per_second", "data_wait")
        }
        for line in read_metrics(out)
    ]


def temporaries(out: Path) -> list[Path]:
    return [*out.glob(".*.tmp"), *out.glob("checkpoints/.*.tmp")]


def kill(process: ForkServerProcess, out: Path, delay: float, *, in_write: bool) -> bool:
    """Kill after `delay` seconds, or from then on in the next write; True if that came first."""
    deadline = time.monotonic() + delay
    while process.is_alive() and (time.monotonic() < deadline or in_write):
        if time.monotonic() >= deadline and temporaries(out):
            break
    process.kill()
    process.join()
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def test_kills(commands: dict[Stage, list[str]], tmp_path: Path) -> None:
    moments = random.Random(0)
    kills = in_writes = runs = 0
    for number, stage in enumerate(STAGES):
        whole = tmp_path / f"whole-{stage}"
        names = sorted(path.name for path in (whole / "checkpoints").iterdir())
        assert len(names) == 10
        enough = KILLS * (number + 1) // len(STAGES)
        while kills < enough:
            out = tmp_path / f"killed-{runs}"
            runs += 1
            was_killed = True
            while was_killed:
                process = spawn([*commands[stage], "--out", str(out)], tmp_path / "told")
                if kills == enough:
                    process.join()
                    assert process.exitcode == 0, (tmp_path / "told").read_text()
                    break
                delay = moments.uniform(0, SECONDS)
                was_killed = kill(process, out, delay, in_write=2 * in_writes <= kills)
                kills += was_killed
                in_writes += was_killed and bool(temporaries(out))
            assert_same_checkpoint(last_checkpoint(out), last_checkpoint(whole))
            assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names
            for name in names:
                assert_same_checkpoint(out / "checkpoints" / name, whole / "checkpoints" / name)
            assert temporaries(out) == []
            assert metrics(out) == metrics(whole)
            shutil.rmtree(out)
    print(  # noqa: T201 (the figures)
        f"\n{kills} kills in {runs} runs of {len(STAGES)} stages, {in_writes} of them with a "
        "temporary file there: all ended bit-identically, with all kept checkpoints and metrics"
    )
    assert kills == KILLS
    assert in_writes >= KILLS // 3


def test_damage(commands: dict[Stage, list[str]], tmp_path: Path) -> None:
    path = last_checkpoint(tmp_path / "whole-tune")
    whole = path.read_bytes()
    expected = dict(leaves(load_checkpoint(path)))
    moments = random.Random(0)
    refused = 0
    for _ in range(DAMAGED):
        damaged = bytearray(whole)
        damaged[moments.randrange(len(whole))] ^= moments.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            found = dict(leaves(load_checkpoint(path)))
        except CheckpointError:
            refused += 1
            continue
        assert found == expected
    print(  # noqa: T201 (the figures)
        f"\n{DAMAGED} checkpoints of {len(whole)} bytes with one changed byte: {refused} refused, "
        f"{DAMAGED - refused} identical in value"
    )
    # The others hit padding, zip times and the like.
    assert refused > DAMAGED // 3


def test_two_writers(commands: dict[Stage, list[str]], tmp_path: Path) -> None:
    whole = tmp_path / "whole-tune"
    moments = random.Random(0)
    reads = 0
    for number in range(RACES):
        out = tmp_path / f"race-{number}"
        start = time.monotonic() + 0.5
        told = [tmp_path / f"told-{number}-{i}" for i in range(2)]
        processes = [
            spawn(
                [*commands["tune"], "--out", str(out)], told[i], start + i * moments.random() / 100
            )
            for i in range(2)
        ]
        while any(process.is_alive() for process in processes):
            if last_checkpoint(out).exists():
                load_checkpoint(last_checkpoint(out))
                reads += 1
        for process in processes:
            process.join()
        codes = [process.exitcode for process in processes]
        assert codes in ([0, 2], [2, 0]), [path.read_text() for path in told]
        holder, other = (processes[codes.index(code)] for code in (0, 2))
        (line,) = told[processes.index(other)].read_text().splitlines()
        assert f"--out: {out} is in use by process {holder.pid} on " in line
        assert_same_checkpoint(last_checkpoint(out), last_checkpoint(whole))
        assert metrics(out) == metrics(whole)
        assert temporaries(out) == []
        shutil.rmtree(out)
    print(  # noqa: T201 (the figures)
        f"\n{RACES} times two writers: one ran, one said in one line who holds the directory; "
        f"{reads} reads meanwhile, none of a damaged file"
    )
