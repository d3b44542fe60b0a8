"""`knn_every`: features are measured while a run trains, which changes none of its bits."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maect_fast.checkpoint import load_checkpoint
from maect_fast.cli import main
from maect_fast.config import ConfigError, load_config
from maect_fast.evaluation.knn import knn_accuracy
from maect_fast.evaluation.runs import load_run, run_encoder, split_features
from maect_fast.training import feature_check
from maect_fast.training.log import read_metrics
from maect_fast.training.stages import last_checkpoint

TINY = [
    *("encoder.embed_dim=16", "encoder.depth=2", "encoder.num_heads=2", "decoder.depth=1"),
    *("decoder.embed_dim=16", "data.source=synthetic", "data.num_images=64", "batch_size=16"),
    *("threads=1", "epochs=3", "log_every=100", "encoder_ema=0.5"),
]
TOTAL = 12


@pytest.fixture
def pretrain() -> Callable[..., int]:
    def run(out: Path, *words: str) -> int:
        return main(["pretrain", "--recipe", "digits", "--out", str(out), *TINY, *words])

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = load_checkpoint(last_checkpoint(run))
    return {**state["model"], **{f"ema.{k}": v for k, v in state["encoder_ema"].items()}}


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_it_is_what_evaluate_has_and_changes_no_bit(
    pretrain: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, measured = tmp_path / "plain", tmp_path / "measured"
    assert pretrain(plain) == 0
    assert pretrain(measured, "knn_every=2") == 0
    told = capsys.readouterr().err
    assert "knn_every: k-NN accuracy of 16 test images among 64 for training" in told
    assert_same_weights(plain, measured)

    lines = read_metrics(measured)
    assert [(line["update"], "knn" in line) for line in lines] == [(8, True), (TOTAL, True)]
    config, state = load_run(measured)
    encoder = run_encoder(config, state)
    train, test = (split_features(config, part, encoder).features for part in ("train", "test"))
    assert lines[-1]["knn"] == knn_accuracy(train, test)
    # A run may begin with it, or leave it, on the way.
    assert main(["pretrain", "--out", str(plain), "knn_every=1"]) == 0


def test_without_test_images_a_tenth_of_the_others_is_asked_about(
    pretrain: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And without classes it is said, and two views are compared."""
    rng = np.random.default_rng(0)
    for i in range(32):
        path = tmp_path / "images" / ("ab"[i % 2]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    folder = ["data.source=folder", "data.workers=0", "epochs=1", "knn_every=1"]
    assert pretrain(tmp_path / "a", *folder, f"data.root={tmp_path / 'images'}") == 0
    assert "k-NN accuracy of 3 training images among 29 others" in capsys.readouterr().err
    assert 0 <= read_metrics(tmp_path / "a")[-1]["knn"] <= 1

    assert pretrain(tmp_path / "b", *folder, f"data.root={tmp_path / 'images' / 'a'}") == 0
    assert "knn_every: no labels: the images lie in no class folders" in capsys.readouterr().err
    line = read_metrics(tmp_path / "b")[-1]
    assert "knn" not in line
    assert 0 < line["view_agreement"] <= 1


def test_a_signal_ends_the_measurement_and_saves(
    pretrain: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(items: Any, title: str, *, total: int) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from items

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pretrain(whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(feature_check, "progress", stop)
        assert pretrain(stopped, "knn_every=1") == 128 + signal.SIGTERM
    assert load_checkpoint(last_checkpoint(stopped))["update"] == 4
    assert pretrain(stopped, "knn_every=1") == 0
    lines = read_metrics(stopped)
    assert [line["update"] for line in lines if "knn" in line] == [8, TOTAL]
    assert_same_weights(whole, stopped)


def test_a_frozen_encoder_is_not_measured() -> None:
    with pytest.raises(ConfigError, match="knn_every: expected 0 in prepare-head, which does not"):
        load_config({"stage": "prepare-head"}, overrides=["knn_every=1"])


@pytest.mark.slow
def test_several_processes_wait_for_the_one_that_measures(tmp_path: Path) -> None:
    """For longer than a rank may be silent."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time\n"
        "from maect_fast.cli import main\n"
        "from maect_fast.training.feature_check import FeatureCheck\n"
        "measure = FeatureCheck.measure\n"
        "def slowly(self, state, **options):\n"
        "    time.sleep(6)\n"
        "    return measure(self, state, **options)\n"
        "FeatureCheck.measure = slowly\n"
        "sys.exit(main())\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    runs = tmp_path / "plain", tmp_path / "measured"
    for out, words in zip(runs, ([], ["knn_every=2", "rank_timeout=2"]), strict=True):
        command = ["pretrain", "--recipe", "digits", "--out", str(out), *TINY, *words]
        subprocess.run([*launcher, str(program), *command], check=True, timeout=300)
    assert_same_weights(*runs)
    assert [line["update"] for line in read_metrics(runs[1]) if "knn" in line] == [8, TOTAL]
