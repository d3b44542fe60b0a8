"""One process with batch 2n and two processes with n each are the same run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maect_fast.checkpoint import load_checkpoint
from maect_fast.cli import main
from maect_fast.config import Stage
from maect_fast.training.log import read_metrics
from maect_fast.training.stages import last_checkpoint


def two_processes(arguments: list[str]) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "maect_fast.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("transposed", ["false", "true"])
def test_all_stages(recipes: dict[Stage, Path], tmp_path: Path, transposed: str) -> None:
    init: list[str] = []
    for stage in ("pretrain", "prepare-head", "tune"):
        one, two = tmp_path / f"{stage}-1", tmp_path / f"{stage}-2"
        # A large eps keeps AdamW from blowing up gradients that are zero but for rounding (the
        # keys' bias, and in 16 updates of tuning the encoder's last bias, which a batch norm
        # follows); they would differ between any two orders of summation.
        eps = 1e-2 if stage == "tune" else 1e-3
        settings = [f"head.transposed={transposed}", f"optim.eps={eps}"]
        command = [stage, "--recipe", str(recipes[stage]), *init, *settings]
        assert main([*command, "--out", str(one)]) == 0
        # The other stages do not look at `transposed`, or once is enough.
        if transposed == "false" or stage == "tune":
            two_processes([*command, "--out", str(two)])
            assert_close_runs(one, two)
        init = ["--init", str(one)]


def assert_close_runs(one: Path, two: Path) -> None:
    first, second = load_checkpoint(last_checkpoint(one)), load_checkpoint(last_checkpoint(two))
    assert first["update"] == second["update"] > 0
    assert len(second["random_states"]) == 2
    for name, value in first["model"].items():
        other = second["model"][name]
        if value.is_floating_point():
            torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(other, value), name
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert a["update"] == b["update"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        if "nn_accuracy" in a:
            assert a["nn_accuracy"] == pytest.approx(b["nn_accuracy"], abs=1e-6)
