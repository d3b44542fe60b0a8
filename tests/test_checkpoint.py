import os
import random
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from maect_fast.checkpoint import (
    CheckpointError,
    load_checkpoint,
    random_states,
    save_checkpoint,
    seed_generators,
    set_random_states,
    write_atomically,
)


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random()  # noqa: NPY002


def test_generators_continue_through_a_file(tmp_path: Path) -> None:
    seed_generators(3)
    draws()
    np.random.randn()  # noqa: NPY002 (leaves a second normal number in NumPy's state)
    save_checkpoint(tmp_path / "x.pt", {"random_states": random_states()})
    expected = [draws(), draws()]
    seed_generators(4)
    set_random_states(load_checkpoint(tmp_path / "x.pt")["random_states"])
    assert [draws(), draws()] == expected


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"value": 1})

    def fail(temporary: Path) -> NoReturn:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert load_checkpoint(path)["value"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_the_file_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(number: int) -> None:
        order.append("fsync")
        fsync(number)

    def watched_replace(path: Path, target: Path) -> Path:
        order.append("replace")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    save_checkpoint(tmp_path / "x.pt", {})
    assert order == ["fsync", "replace", "fsync"]


def test_damage_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(path)
    save_checkpoint(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of maect-fast"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(CheckpointError, match="format 99 is newer"):
        load_checkpoint(path)
