"""One process writes in a run directory, nothing in it is lost, and a run stays one run."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from errno import ENOLCK
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from maect_fast.checkpoint import load_checkpoint, save_checkpoint
from maect_fast.cli import main
from maect_fast.config import ConfigError, Stage
from maect_fast.data import Batch
from maect_fast.training.log import read_metrics
from maect_fast.training.run_directory import LOCK, check_writable, run_directory
from maect_fast.training.stages import last_checkpoint
from maect_fast.training.update import Update

TOTAL = 8


@pytest.fixture
def pretrain(recipes: dict[Stage, Path], tmp_path: Path) -> Callable[..., int]:
    """Runs stage 1 in a directory, an update per line of metrics; a checkpoint each epoch stays."""

    def run(out: Path, *words: str) -> int:
        recipe = ["--recipe", str(recipes["pretrain"]), "log_every=1", "checkpoint_every=1"]
        return main(["pretrain", "--out", str(out), *recipe, *words])

    return run


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """The last line on stderr."""
    return lambda: capsys.readouterr().err.splitlines()[-1]


# What shells and schedulers know a process by that SIGTERM has ended.
STOPPED = 128 + signal.SIGTERM
# Metrics that differ from run to run.
TIMED = ("images_per_second", "data_wait")


def stop_after(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Let the next run end with a signal after so many updates."""
    update = Update.__call__
    left = [updates]

    def update_then_term(self: Update, batch: Batch) -> dict[str, Tensor]:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, batch)

    monkeypatch.setattr(Update, "__call__", update_then_term)


def test_a_directory_has_one_writer(
    pretrain: Callable[..., int], tmp_path: Path, told: Callable[[], str]
) -> None:
    out = tmp_path / "run"
    with run_directory(out):
        assert pretrain(out) == 2
        line = told()
        assert f"--out: {out} is in use by process {os.getpid()} on " in line
    assert not out.exists()
    assert pretrain(out) == 0
    assert not (out / LOCK).exists()


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from maect_fast.training.run_directory import run_directory\n"
        "with run_directory(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(out)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on"), run_directory(out):
        pass
    holder.kill()
    holder.communicate()
    with run_directory(out):
        pass


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Callable[[], str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_directory(tmp_path / "run"):
        assert "this file system has no locks" in told()


def test_out_is_a_file(
    pretrain: Callable[..., int], tmp_path: Path, told: Callable[[], str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert pretrain(file) == 2
    assert f"--out: {file} is a file, expected a folder" in told()
    assert pretrain(file / "run") == 2
    assert f"--out: {file} is not a folder" in told()


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    check_writable(file, folder=False)
    check_writable(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match=f"--out: {file} is a file, expected a folder"):
        check_writable(file)
    with pytest.raises(ConfigError, match=f"--out: {tmp_path} is a folder, expected a file"):
        check_writable(tmp_path, folder=False)
    with pytest.raises(ConfigError, match=f"--out: {file} is not a folder"):
        check_writable(file / "b")
    # A read-only file system; root may write everywhere else.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=f"cannot be written, as {tmp_path} is not writable"):
        check_writable(tmp_path / "a" / "b")


def test_a_disk_that_is_too_small_is_found_before_the_first_update(
    pretrain: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[], str],
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert pretrain(tmp_path / "run") == 2
    assert "--out: a checkpoint takes" in told()
    assert not (tmp_path / "run").exists()


def test_a_kill_while_a_kept_checkpoint_is_written_loses_none(
    pretrain: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, between and after the two writes."""
    for number, name in enumerate(("update-0000004.pt", "last.pt", None)):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch:
            replace, left = Path.replace, []

            def stop(path: Path, target: Path) -> Path:
                left.append(target.name)  # noqa: B023
                if left[-1] == name and "update-0000004.pt" in left:  # noqa: B023
                    raise KeyboardInterrupt
                return replace(path, target)  # noqa: B023

            patch.setattr(Path, "replace", stop)
            assert pretrain(out) == (130 if name else 0)
        (out / "checkpoints" / ".last.pt.12345678.tmp").write_text("half")
        assert pretrain(out) == 0
        names = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert names == ["last.pt", "update-0000004.pt"]
        kept = load_checkpoint(out / "checkpoints" / "update-0000004.pt")
        assert kept["update"] == 4


def test_a_missing_last_checkpoint_is_told_and_nothing_is_truncated(
    pretrain: Callable[..., int], tmp_path: Path, told: Callable[[], str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(out) == 0
    last, kept = last_checkpoint(out), out / "checkpoints" / "update-0000004.pt"
    end = load_checkpoint(last)
    last.unlink()
    before = (out / "metrics.jsonl").read_text()
    assert pretrain(out) == 2
    line = told()
    assert f"{last} is missing beside metrics up to update 8 and 1 kept checkpoints" in line
    assert f"cp {kept} {last}" in line
    assert main(["pretrain", "--out", str(out)]) == 2
    assert "is missing beside" in told()
    assert (out / "metrics.jsonl").read_text() == before

    shutil.copyfile(kept, last)
    assert pretrain(out) == 0
    again = load_checkpoint(last)
    assert again["update"] == TOTAL
    for name, value in end["model"].items():
        assert torch.equal(value, again["model"][name])
    assert [line["update"] for line in read_metrics(out)] == list(range(1, TOTAL + 1))

    last.unlink()
    kept.unlink()
    assert pretrain(out) == 2
    assert told().endswith("--restart starts the run anew")
    assert pretrain(out, "--restart", "epochs=1") == 0
    assert len(read_metrics(out)) == 4
    assert len(read_metrics(out / "earlier-1")) == TOTAL


def test_a_damaged_last_checkpoint_is_told(
    pretrain: Callable[..., int], tmp_path: Path, told: Callable[[], str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(out) == 0
    last = last_checkpoint(out)
    last.write_bytes(last.read_bytes()[:-1000])
    kept = out / "checkpoints" / "update-0000004.pt"
    commands = (["pretrain"], ["evaluate"], ["extract"], ["prepare-head"])
    for (command,) in commands:
        words = {
            "evaluate": [str(out)],
            "extract": [str(out), "--out", str(tmp_path / "x.safetensors")],
            "prepare-head": ["--out", str(tmp_path / "head"), "--init", str(out)],
        }.get(command, ["--out", str(out)])
        if command == "prepare-head":
            words += ["--recipe", str(tmp_path / "prepare-head.yaml")]
        assert main([command, *words]) == 2
        assert f"{last}: not a readable checkpoint" in (line := told())
        assert f"cp {kept} {last}" in line


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("record", {"odd": 1}),
        ("record", [1]),
        ("record", {"init": {"path": "a"}}),
        ("record", {"images": "all"}),
        ("record", {"changes": [{"update": 2}]}),
        ("meters", [{}]),
        ("meters", [{"sums": {"loss": 1.0}, "count": 1}]),
        ("random_states", [{"torch": 1}]),
        ("optimizer", {"state": {}}),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    part: str,
    value: object,
    pretrain: Callable[..., int],
    tmp_path: Path,
    told: Callable[[], str],
) -> None:
    out = tmp_path / "run"
    assert pretrain(out) == 0
    state = load_checkpoint(last_checkpoint(out))
    save_checkpoint(last_checkpoint(out), state | {part: value})
    assert pretrain(out) == 2
    assert f"{out}: {part} does not fit (" in told()


def test_damaged_side_files_stop_nothing(
    pretrain: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pretrain(out) == 0
    metrics = read_metrics(out)
    path = out / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    garbage = [b"\0" * 50 + b"\n", b"\xff\xfe{\n", b"3\n", b'{"update": "x"}\n', b"[]\n", b"\n"]
    path.write_bytes(b"".join([*lines[:3], *garbage, *lines[3:], b'{"update": 9, "lo']))
    config = (out / "config.yaml").read_text()
    (out / "config.yaml").write_bytes(b"\0\xff: [")
    assert read_metrics(out) == metrics
    capsys.readouterr()
    assert main(["pretrain", "--out", str(out)]) == 0
    assert f"{path}: 6 damaged lines were left out" in capsys.readouterr().err
    assert path.read_bytes() == b"".join(lines)
    assert (out / "config.yaml").read_text() == config


def test_a_changed_setting_is_named_used_and_recorded(
    pretrain: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[], str],
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert pretrain(out) == STOPPED
    assert pretrain(out, "optim.encoder_lr=0.005") == 2
    assert "or with --change optim.encoder_lr=0.005" in told()
    assert pretrain(out, "encoder.depth=3", "--change", "encoder.depth=3") == 2
    assert "choose another --out" in told()
    change = ("--change", "optim.encoder_lr=0.005", "--change", "optim.betas=[0.8,0.9]")
    assert main(["pretrain", "--out", str(out), *change]) == 0
    # The same command, and the one without it, now say the same.
    assert main(["pretrain", "--out", str(out), *change]) == 0
    assert main(["pretrain", "--out", str(out)]) == 0
    state = load_checkpoint(last_checkpoint(out))
    assert state["config"]["optim"]["encoder_lr"] == 0.005
    changes = state["record"]["changes"]
    assert [(c["update"], c["setting"], c["before"], c["after"]) for c in changes] == [
        (3, "optim.encoder_lr", 0.01, 0.005),
        (3, "optim.betas", (0.9, 0.95), (0.8, 0.9)),
    ]
    text = (out / "config.yaml").read_text()
    assert text.startswith("# from update 3 on: optim.encoder_lr was 0.01, is 0.005\n")
    assert OmegaConf.load(out / "config.yaml").optim.encoder_lr == 0.005
    groups = {group["name"]: group for group in state["optimizer"]["param_groups"]}
    scale = 16 * 2 / 256
    assert groups["encoder"]["base_lr"] == pytest.approx(0.005 * scale)
    assert groups["decoder"]["base_lr"] == pytest.approx(0.01 * scale)
    assert all(group["betas"] == (0.8, 0.9) for group in groups.values())
    # The original command asks for what the run no longer has.
    assert pretrain(out) == 2
    assert "has 0.005, now 0.01 was asked for" in told()


def test_nothing_to_change(
    pretrain: Callable[..., int], tmp_path: Path, told: Callable[[], str]
) -> None:
    assert pretrain(tmp_path / "run", "--change", "optim.encoder_lr=1") == 2
    assert "--change: there is no run in" in told()
    assert not (tmp_path / "run").exists()


def test_a_diverged_run_prints_the_command_that_continues_it(
    pretrain: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Callable[[], str],
) -> None:
    out = tmp_path / "run"
    update, bad = Update.__call__, [3]

    def diverge(self: Update, batch: Batch) -> dict[str, Tensor]:
        metrics = update(self, batch)
        if self.state.update == bad[0]:
            metrics["loss"] *= math.nan
        return metrics

    monkeypatch.setattr(Update, "__call__", diverge)
    assert pretrain(out, "save_minutes=0") == 2
    line = told()
    assert "the run diverged: the loss is nan at update 3" in line
    command = f"maect-fast pretrain --out {out} --change optim.encoder_lr=0.005 --change optim."
    assert command in line
    bad[0] = -1
    words = line.partition("maect-fast pretrain --out")[2].partition(" continues from it")[0]
    assert main(["pretrain", "--out", *words.split()]) == 0
    assert load_checkpoint(last_checkpoint(out))["config"]["optim"]["other_lr"] == 0.005


def test_weights_that_are_not_finite_are_no_divergence(
    pretrain: Callable[..., int],
    recipes: dict[Stage, Path],
    tmp_path: Path,
    told: Callable[[], str],
) -> None:
    mae = tmp_path / "mae"
    assert pretrain(mae) == 0
    state = load_checkpoint(last_checkpoint(mae))
    state["model"]["encoder.blocks.0.mlp.fc1.weight"][3, 2] = math.nan
    save_checkpoint(last_checkpoint(mae), state)
    recipe = ("--recipe", str(recipes["prepare-head"]), "--out", str(tmp_path / "head"))
    assert main(["prepare-head", *recipe, "--init", str(mae)]) == 2
    assert f"{mae}: encoder.blocks.0.mlp.fc1.weight holds NaN or infinity" in told()


def test_another_start_is_refused(
    pretrain: Callable[..., int],
    recipes: dict[Stage, Path],
    tmp_path: Path,
    told: Callable[[], str],
) -> None:
    first, second, moved = tmp_path / "first", tmp_path / "second", tmp_path / "moved"
    assert pretrain(first) == 0
    assert pretrain(second, "seed=7") == 0
    out = str(tmp_path / "head")
    command = ["prepare-head", "--recipe", str(recipes["prepare-head"]), "--out", out]
    assert main([*command, "--init", str(first)]) == 0
    assert main([*command, "--init", str(first)]) == 0
    assert main(command) == 0
    assert main([*command, "--init", str(second)]) == 2
    assert f"--init: the run in {out} was started from {first}; continue it without" in told()
    assert main([*command, "--from-scratch"]) == 2
    assert f"--from-scratch: the run in {out} was started from {first}" in told()
    state = load_checkpoint(last_checkpoint(Path(out)))
    record = state.pop("record")
    save_checkpoint(last_checkpoint(Path(out)), state)
    # A run of before records it only from now on.
    assert main([*command, "--init", str(first)]) == 0
    save_checkpoint(last_checkpoint(Path(out)), state | {"record": record})
    first.rename(moved)
    assert main([*command, "--init", str(moved)]) == 0
    # It is gone, but this is the same command.
    assert main([*command, "--init", str(first)]) == 0
    second.rename(first)
    assert main([*command, "--init", str(first)]) == 2
    assert "was started from other weights than" in told()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(17):
        Image.new("L", (9, 9), 3 * i).save(folder / f"m{i:02d}.png")
    return folder


def test_other_images_are_refused_or_recorded(
    images: Path, recipes: dict[Stage, Path], tmp_path: Path, told: Callable[[], str]
) -> None:
    mae, out = tmp_path / "mae", tmp_path / "head"
    data = ["data.source=folder", "data.workers=0", "epochs=3"]
    words = ["pretrain", "--recipe", str(recipes["pretrain"]), "--out", str(mae)]
    assert main([*words, *data, f"data.root={images}"]) == 0
    command = ["prepare-head", "--recipe", str(recipes["prepare-head"]), "--out", str(out), *data]
    assert main([*command, f"data.root={images}", "--init", str(mae)]) == 0
    moved = tmp_path / "moved"
    images.rename(moved)
    assert main([*command, f"data.root={moved}"]) == 0
    # Sorts first, so that every id names another image; the number of updates stays.
    Image.new("L", (9, 9)).save(moved / "a.png")
    assert main([*command, f"data.root={moved}"]) == 2
    assert "data.root: these 18 images are not the 17 that the run" in told()
    (moved / "a.png").unlink()
    (moved / "m03.png").write_bytes((moved / "m03.png").read_bytes() + b" ")
    assert main([*command, f"data.root={moved}"]) == 2
    assert "names or sizes differ" in told()

    state = load_checkpoint(last_checkpoint(out))
    assert (state["model"]["head.loss.queue.queue_id"] >= 0).any()
    state["update"] = 2
    save_checkpoint(last_checkpoint(out), state)
    assert main([*command, "--change", f"data.root={moved}"]) == 0
    after = load_checkpoint(last_checkpoint(out))
    # Of the old rows none has an id; the last update's have theirs.
    assert (after["model"]["head.loss.queue.queue_id"] >= 0).sum() == 16
    (change,) = after["record"]["changes"]
    assert (change["update"], change["setting"]) == (2, "images")
    assert main([*command, f"data.root={moved}"]) == 0


def test_logged_averages_cover_the_updates_before_a_stop(
    recipes: dict[Stage, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines every 4 updates, stops after 1, 2 and 3 more: the same lines."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["pretrain", "--recipe", str(recipes["pretrain"]), "log_every=4", "--out"]
    assert main([*command, str(whole)]) == 0
    for updates in (1, 2, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, updates)
            assert main([*command, str(parts)]) == STOPPED
    assert main([*command, str(parts)]) == 0

    def lines(out: Path) -> list[dict[str, float]]:
        found = read_metrics(out)
        return [{k: v for k, v in line.items() if k not in TIMED} for line in found]

    assert lines(parts) == lines(whole)
    assert [line["update"] for line in lines(whole)] == [4, 8]


def test_a_restart_sets_the_run_aside(pretrain: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "run").mkdir()
    (out / "notes.txt").write_text("mine")
    assert pretrain(out) == 0
    before = {path.name for path in out.iterdir()} - {"notes.txt"}
    assert pretrain(out, "--restart", "seed=9") == 0
    assert {path.name for path in (out / "earlier-1").iterdir()} == before
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["update"] == 1
    assert load_checkpoint(last_checkpoint(out))["config"]["seed"] == 9
    assert pretrain(out, "--restart") == 0
    assert load_checkpoint(last_checkpoint(out / "earlier-2"))["config"]["seed"] == 9


def test_a_signal_ends_a_wait_for_images(
    pretrain: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that does not come, as from a file system that does not answer."""
    from maect_fast.data.augment import tensor_views

    count = [0]

    def stuck(*arguments: Any, **settings: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)
        return tensor_views(*arguments, **settings)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("maect_fast.data.loader.tensor_views", stuck)
        began = time.monotonic()
        assert pretrain(out) == STOPPED
        assert time.monotonic() - began < 60
    assert load_checkpoint(last_checkpoint(out))["update"] == 3
    assert pretrain(out) == 0
    assert [line["update"] for line in read_metrics(out)] == list(range(1, TOTAL + 1))


# A module, which workers import; the main program they do not.
STUCK = """
import time
from maect_fast.data import FolderSource, build_source

class Stuck(FolderSource):
    def decode(self, index, reduction=None):
        if index == 11:
            print("stuck", flush=True)
            time.sleep(600)
        return super().decode(index, reduction)

def build(*arguments, **settings):
    source = build_source(*arguments, **settings)
    return Stuck(**vars(source))
"""
PROGRAM = """
import sys
import stuck
from maect_fast.cli import main
from maect_fast.training import engine

engine.build_source = stuck.build
code = main(sys.argv[1:])
print("left", flush=True)
sys.exit(code)
"""


def test_a_signal_ends_a_wait_for_workers(
    images: Path, recipes: dict[Stage, Path], tmp_path: Path
) -> None:
    """Two workers, one of which waits for a file system that does not answer."""
    program, out = tmp_path / "program.py", tmp_path / "run"
    program.write_text(PROGRAM)
    (tmp_path / "stuck.py").write_text(STUCK)
    command = ["pretrain", "--recipe", str(recipes["pretrain"]), "--out", str(out)]
    command += ["data.source=folder", f"data.root={images}", "data.workers=2", "batch_size=2"]
    process = subprocess.Popen(
        [sys.executable, str(program), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "stuck\n"
    time.sleep(3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "left\n"
    seconds = time.monotonic() - began
    _, told = process.communicate(timeout=120)
    assert process.returncode == STOPPED, told
    assert "stopped by SIGTERM and saved" in told
    assert last_checkpoint(out).exists()
    assert seconds < 10
