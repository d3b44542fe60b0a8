"""`profile=START:STOP` in whole runs of the tiny recipes."""

import csv
import gzip
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maect_fast.checkpoint import load_checkpoint
from maect_fast.cli import main
from maect_fast.config import ConfigError, Stage, load_config
from maect_fast.data import Batch
from maect_fast.training import engine
from maect_fast.training.distributed import World
from maect_fast.training.stages import last_checkpoint
from maect_fast.training.update import Update

PRETRAIN = {"data", "tuned blocks", "decoder", "loss", "backward", "optimiser", "EMA", "other"}
TUNE = PRETRAIN - {"decoder"} | {"frozen blocks", "head", "search", "enqueue"}


def run(recipes: dict[Stage, Path], stage: Stage, out: Path, *overrides: str) -> int:
    arguments = [stage, "--recipe", str(recipes[stage]), "--out", str(out), *overrides]
    return main([*arguments, *([] if stage == "pretrain" else ["--from-scratch"])])


def read_table(out: Path) -> list[dict[str, str]]:
    with (out / "profile" / "ranges.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_trace(out: Path) -> list[dict[str, Any]]:
    with gzip.open(out / "profile" / "trace.json.gz") as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


@pytest.mark.parametrize(
    ("stage", "ranges"),
    [
        ("pretrain", PRETRAIN),
        ("prepare-head", TUNE - {"tuned blocks"}),
        ("tune", TUNE),
    ],
)
def test_every_part_of_the_update_has_its_range(
    recipes: dict[Stage, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    stage: Stage,
    ranges: set[str],
) -> None:
    assert run(recipes, stage, tmp_path, "profile=2:5") == 0
    rows = read_table(tmp_path)
    assert {row["range"] for row in rows} == ranges
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=0.01)
    # The ranges and what lies between them are all of the time that the window took.
    (window,) = [e for e in read_trace(tmp_path) if e.get("name") == "profiled updates"]
    whole = sum(float(row["ms_per_update"]) for row in rows)
    assert 3 * whole == pytest.approx(window["dur"] / 1e3, rel=1e-3)
    for row in rows:
        # Two EMAs in tune; none in the other stages of this recipe.
        calls = float(row["operator_calls_per_update"])
        assert (calls > 0) is (row["range"] != "EMA" or stage == "tune"), row
    told = capfd.readouterr().err
    assert f"profiled updates 2 to 4: {tmp_path}/profile/trace.json.gz" in told
    assert "| range | ms per update | share | operator calls per update |" in told
    assert (
        f"| backward | {next(r['ms_per_update'] for r in rows if r['range'] == 'backward')} |"
        in told
    )


def test_three_updates_are_in_the_trace(recipes: dict[Stage, Path], tmp_path: Path) -> None:
    assert run(recipes, "tune", tmp_path, "profile=6:9") == 0
    names = [e["name"] for e in read_trace(tmp_path) if e.get("cat") == "user_annotation"]
    # The window spans two epochs of four: at the end of the first one there is no batch.
    assert names.count("data") == 3 + 1
    assert names.count("search") == names.count("backward") == names.count("optimiser") == 3


def test_a_profile_changes_no_result(recipes: dict[Stage, Path], tmp_path: Path) -> None:
    plain, profiled = tmp_path / "plain", tmp_path / "profiled"
    assert run(recipes, "tune", plain) == 0
    assert run(recipes, "tune", profiled, "profile=3:9") == 0
    first, second = (load_checkpoint(last_checkpoint(out)) for out in (plain, profiled))
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_a_window_counts_the_updates_of_the_whole_run(
    recipes: dict[Stage, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = Update.__call__

    def update_then_term(update: Update, batch: Batch) -> dict[str, Tensor]:
        result = call(update, batch)
        if update.state.update in (5, 6, 16):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Update, "__call__", update_then_term)
    told = []
    for window, code in (("4:6", 143), ("4:6", 143), ("7:9", 0), ("4:6", 0)):
        assert run(recipes, "tune", tmp_path, f"profile={window}") == code
        lines = capsys.readouterr().err.splitlines()
        told += [line.partition(": /")[0] for line in lines if line.startswith("profile")]
    assert told == [
        "profiled updates 4 to 4",
        "profiled updates 5 to 5",
        "profiled updates 7 to 8",
        "profile=4:6: this process made none of these updates",
    ]


def test_a_window_beyond_the_end(
    recipes: dict[Stage, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipes, "pretrain", tmp_path, "profile=8:20") == 0
    told = capsys.readouterr().err
    assert "profile=8:20: this process made none of these updates" in told
    assert not (tmp_path / "profile").exists()


def test_a_window_that_the_end_cuts_short(
    recipes: dict[Stage, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipes, "pretrain", tmp_path, "profile=6:20") == 0
    assert "profiled updates 6 to 7: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["20:10", "10:10", "10", "-1:3", "a:b", "1:2:3", ":5"])
def test_a_window_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^profile: expected START:STOP, .*, got ") as error:
        load_config(overrides=[f"profile={text}"])
    assert "\n" not in str(error.value)


def test_yaml_does_not_count_in_base_60() -> None:
    """YAML 1.1 reads 10:20 as 10 * 60 + 20."""
    assert load_config(overrides=["profile=10:20"]).profile == "10:20"
    assert load_config(overrides=["profile="]).profile is None


def test_nsight_needs_a_gpu(
    recipes: dict[Stage, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(recipes, "pretrain", tmp_path, "profile=1:2", "profiler=nsight") == 2
    told = capsys.readouterr().err
    expected = (
        "maect-fast pretrain: profiler: expected torch on a CPU, got nsight, which needs a GPU"
    )
    assert told.splitlines() == [expected]


def test_rank_0_alone_takes_a_profile(tmp_path: Path) -> None:
    config = load_config(overrides=["profile=1:3"])
    for rank in (0, 1):
        world = World(rank=rank, size=2, local_rank=rank, group=None, device=torch.device("cpu"))
        profile = engine._profile(config, world, tmp_path)
        assert list(profile.updates) == ([1, 2] if rank == 0 else [])
