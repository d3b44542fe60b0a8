"""Weights & Biases and MLflow beside TensorBoard, both without a network."""

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from maect_fast.cli import main
from maect_fast.config import Config, Stage
from maect_fast.training import trackers
from maect_fast.training.log import RunLog, read_metrics

TOTAL = 8


@pytest.fixture
def command(recipes: dict[Stage, Path], tmp_path: Path) -> list[str]:
    recipe = str(recipes["pretrain"])
    return ["pretrain", "--recipe", recipe, "--out", str(tmp_path / "run"), "log_every=1"]


def stop_after(update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, as a scheduler sends it."""
    advance, done = RunLog.advance, iter(range(1, update + 1))

    def advance_and_stop(log: RunLog) -> None:
        advance(log)
        if next(done) == update:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(RunLog, "advance", advance_and_stop)


def stopped_and_continued(command: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which the run is known to its tracker, before and after."""
    path = Path(command[4]) / "trackers.json"
    with monkeypatch.context() as stopping:
        stop_after(3, stopping)
        assert main(command) == 128 + signal.SIGTERM
    (known,) = json.loads(path.read_text()).values()
    assert main(command) == 0
    assert list(json.loads(path.read_text()).values()) == [known]
    return str(known)


# The libraries take ten seconds each to start and end twice.
@pytest.mark.slow
def test_weights_and_biases(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    known = stopped_and_continued([*command, "trackers=[tensorboard,wandb]"], monkeypatch)
    out = Path(command[4])
    files = sorted(out.glob(f"wandb/offline-run-*/run-{known}.wandb"))
    assert len(files) == 2
    for file in files:
        assert b"images_per_second" in file.read_bytes()
    assert len(list(out.glob("events.out.tfevents.*"))) == 2


@pytest.mark.slow
def test_mlflow(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(library)
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    known = stopped_and_continued([*command, "trackers=[mlflow]"], monkeypatch)
    out = Path(command[4])
    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    run = client.get_run(known)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["optim.encoder_lr"] == "0.01"
    found = [(one.step, one.value) for one in client.get_metric_history(known, "loss")]
    assert found == [(line["update"], line["loss"]) for line in read_metrics(out)]
    assert [step for step, _ in found] == list(range(1, TOTAL + 1))


class Broken:
    """A tracker that fails where `at` says."""

    at = ""

    def __init__(self, folder: Path, config: Config, start: int):
        self.do("start")

    def log(self, metrics: dict[str, float], update: int) -> None:
        self.do("log")

    def close(self, *, finished: bool) -> None:
        self.do("close")

    def do(self, what: str) -> None:
        if self.at == what:
            raise ConnectionError("no route\nto host")


@pytest.mark.parametrize("at", ["start", "log", "close"])
def test_a_tracker_that_fails_is_told_once(
    at: str, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Broken, "at", at)
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    assert main(command) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "trackers" in line]
    assert lines == ["trackers: going on without tensorboard: ConnectionError: no route"]


def test_a_tracker_that_hangs_delays_no_update(
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network = threading.Event()
    monkeypatch.setattr(Broken, "do", lambda self, what: what == "log" and network.wait(60))
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    try:
        assert main(command) == 0
        assert not network.is_set()
    finally:
        network.set()
    assert [line["update"] for line in read_metrics(tmp_path / "run")] == list(range(1, TOTAL + 1))
    told = capsys.readouterr().err
    assert told.count("the last metrics were not taken in 0.1 s (tensorboard)") == 1


def test_what_is_not_asked_for_is_not_imported(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, library, None)
    assert main(command) == 0
    assert "trackers" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "missing", "told"),
    [
        ("wandb", "wandb", "pip install wandb"),
        ("mlflow", "mlflow", "pip install mlflow-skinny"),
        ("mlflow", "alembic", "pip install alembic"),
    ],
)
def test_a_missing_library_is_one_line_before_anything(
    name: str,
    missing: str,
    told: str,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def find(module: str) -> Any:
        return None if module == missing else object()

    monkeypatch.setattr(trackers, "find_spec", find)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([*command, f"trackers=[{name}]"]) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"maect-fast pretrain: trackers: {name} needs")
    assert told in line
    assert not (tmp_path / "run").exists()


def test_other_ranks_open_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "at", "start")
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Broken)
    with RunLog(tmp_path, Config(), start=0, total=1, active=False) as log:
        log.advance()
        log.write({"update": 1, "epoch": 1, "loss": 0.0})
    assert list(tmp_path.iterdir()) == []
