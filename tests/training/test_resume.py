import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maect_fast.checkpoint import load_checkpoint, save_checkpoint
from maect_fast.cli import main
from maect_fast.config import Stage
from maect_fast.data import Batch, TensorSource
from maect_fast.training.log import read_metrics
from maect_fast.training.stages import last_checkpoint
from maect_fast.training.update import Update

TOTAL = 16


@pytest.fixture
def head(recipes: dict[Stage, Path], tmp_path: Path) -> Path:
    """A finished prepare-head run."""
    mae, head = tmp_path / "mae", tmp_path / "head"
    assert main(["pretrain", "--recipe", str(recipes["pretrain"]), "--out", str(mae)]) == 0
    command = ["prepare-head", "--recipe", str(recipes["prepare-head"]), "--out", str(head)]
    assert main([*command, "--init", str(mae)]) == 0
    return head


def tune(recipe: Path, init: Path, out: Path, *overrides: str) -> list[str]:
    return ["tune", "--recipe", str(recipe), "--init", str(init), "--out", str(out), *overrides]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "maect_fast.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )


def wait_for_update(out: Path, update: int, process: subprocess.Popen[str]) -> None:
    """Until the run has saved `update` updates; every update is saved."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = last_checkpoint(out)
        if path.exists() and load_checkpoint(path)["update"] >= update:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)
    raise AssertionError("the run does not advance")


def assert_same_state(a: object, b: object, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_state(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple)
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}.{i}")
    elif isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, queue, pointer, EMAs, optimiser, generators."""
    first, second = load_checkpoint(last_checkpoint(a)), load_checkpoint(last_checkpoint(b))
    for part in ("update", "model", "optimizer", "encoder_ema", "random_states"):
        assert_same_state(first[part], second[part], part)


def test_a_killed_run_continues_bit_identically(
    recipes: dict[Stage, Path], head: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(tune(recipes["tune"], head, whole)) == 0
    # Every update is saved, so that any moment of the kill has a checkpoint to race with.
    arguments = tune(recipes["tune"], head, killed, "save_minutes=0")
    moments = random.Random(os.urandom(8))
    process = start(arguments)
    wait_for_update(killed, moments.randint(1, TOTAL - 2), process)
    time.sleep(moments.random() * 0.03)
    process.kill()
    process.communicate()
    done = load_checkpoint(last_checkpoint(killed))["update"]
    assert 1 <= done <= TOTAL
    assert main(arguments) == 0
    assert_same_run(whole, killed)
    updates = [line["update"] for line in read_metrics(killed)]
    assert updates == sorted(set(updates))
    assert updates[-1] == TOTAL


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_and_is_the_exit_code(
    recipes: dict[Stage, Path], head: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """A scheduler must not take a stopped run for a finished one."""
    out = tmp_path / "stopped"
    arguments = tune(recipes["tune"], head, out, "epochs=400", "save_minutes=0")
    process = start(arguments)
    wait_for_update(out, 3, process)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number, told
    assert f"stopped by {number.name} and saved; the same command continues" in told
    assert 3 <= load_checkpoint(last_checkpoint(out))["update"] < 1600


def test_resume_in_process_at_every_position(
    recipes: dict[Stage, Path], head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop after 1, 2, ... updates, across epoch borders, and continue each time."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(tune(recipes["tune"], head, whole)) == 0
    call = Update.__call__

    def update_then_term(update: Update, batch: Batch) -> dict[str, Tensor]:
        result = call(update, batch)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(Update, "__call__", update_then_term)
    for done in range(1, TOTAL + 1):
        # The last update finishes the run, whoever asks for its end.
        code = 0 if done == TOTAL else 128 + signal.SIGTERM
        assert main(tune(recipes["tune"], head, parts)) == code
        assert load_checkpoint(last_checkpoint(parts))["update"] == done
    assert_same_run(whole, parts)


def test_the_next_stage_refuses_half_a_run(
    recipes: dict[Stage, Path],
    head: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = load_checkpoint(last_checkpoint(head))
    state["update"] -= 1
    save_checkpoint(last_checkpoint(head), state)
    assert main(tune(recipes["tune"], head, tmp_path / "run")) == 2
    assert "unfinished (7 of 8 updates); continue it first" in capsys.readouterr().err


def test_continuing_needs_neither_recipe_nor_init(
    recipes: dict[Stage, Path], head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(tune(recipes["tune"], head, out)) == 0
    assert main(["tune", "--out", str(out)]) == 0
    assert f"continuing {out} at update {TOTAL} of {TOTAL}" in capsys.readouterr().err


def test_other_images_are_refused(
    recipes: dict[Stage, Path],
    head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    assert main(tune(recipes["tune"], head, out)) == 0
    fewer = TensorSource(
        labels=torch.zeros(40).long(),
        class_names=[],
        images=torch.zeros(40, 1, 8, 8, dtype=torch.uint8),
    )
    monkeypatch.setattr("maect_fast.training.engine.build_source", lambda *_, **__: fewer)
    assert main(["tune", "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"the run in {out} has 16 updates, these images give 8" in error


def test_other_settings_are_refused(
    recipes: dict[Stage, Path], head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(tune(recipes["tune"], head, out)) == 0
    before = json.dumps(read_metrics(out))
    assert main(tune(recipes["tune"], head, out, "optim.encoder_lr=1")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        f"maect-fast tune: optim.encoder_lr: the run in {out} has 0.01, now 1.0"
    )
    assert json.dumps(read_metrics(out)) == before
