"""One process with batch 2n and two processes with n each are the same run."""

import socket
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


def two_machines(arguments: list[str]) -> None:
    """Two launchers that meet over the network, with one process each, as on two machines."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meet = ["--rdzv-backend=c10d", "--rdzv-id=maect", f"--rdzv-endpoint=localhost:{port}"]
    command = [*launcher, *meet, "-m", "maect_fast.cli", *arguments]
    machines = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(errors)


@pytest.mark.slow
def test_two_machines(recipes: dict[Stage, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ["data.source=digits", "batch_size=128", "epochs=1", "optim.eps=1e-2"]
    command = ["tune", "--recipe", str(recipes["tune"]), "--from-scratch", *settings]
    assert main([*command, "--out", str(one)]) == 0
    two_machines([*command, "--out", str(two)])
    assert_close_runs(one, two)


@pytest.mark.parametrize("transposed", [pytest.param("false", marks=pytest.mark.slow), "true"])
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
