"""`maect-fast bench`, `python -m benchmarks` and the GPU script, as a user calls them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maect_fast.benchmarks import cli, floors
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.results import read_folder
from maect_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_bench_writes_rows_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maect_fast.benchmarks.timing.SECONDS_PER_CALL", 0.0)
    monkeypatch.setattr(floors, "STREAM_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(floors, "GEMM_SIDE", {"cpu": 64})
    floors.bandwidth.cache_clear()
    floors.matrix_rate.cache_clear()
    words = ["--op", "queue_topk", "--shape", "B=8,Q=64,D=32,K=3", "--out", str(tmp_path)]
    assert main(["bench", *words, "--provider", "maect-fast", "eager", "faiss-gpu"]) == 0
    (folder,) = tmp_path.iterdir()
    rows = [row for row in read_folder(folder) if row.op == "queue_topk"]
    assert [(row.provider, row.mode) for row in rows] == [
        (provider, mode)
        for mode in ("topk", "find_nn")
        for provider in ("maect-fast", "eager", "faiss-gpu")
    ]
    names = {path.name for path in folder.iterdir()}
    assert {"floors.csv", "queue_topk.csv", "queue_topk_fp32_bars.png", "roofline.png"} <= names
    assert "| `queue_topk` | fp32" in capsys.readouterr().out
    assert cli.main(["table", str(folder)]) == 0
    assert "### queue_topk, fp32" in capsys.readouterr().out
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "roofline.png").is_file()


def test_bench_starts_no_shape_after_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["--op", "info_nce", "--minutes", "0", "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert "left out after 0 minutes: info_nce {'B': 512, 'N': 512, 'D': 256}" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--op", "info_nce", "--shape", "B=4"], "--shape: expected B=..,N=..,D=.., got B=4"),
        (["--op", "info_nce", "--shape", "B=4,N=x,D=3"], "expected LETTER=SIZE, got 'N=x'"),
        (["--shape", "B=4,N=4,D=4"], "--shape: expected exactly one --op with it"),
        (["--set", "huge"], "--set: expected one of"),
        (["table", "nowhere"], "nowhere: expected benchmark rows in CSV files, found none"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_usage_errors_are_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


def test_doctor_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--check"]) == 0
    assert capsys.readouterr().out.count("cases right") == len(OPS) + 1


def test_without_an_install() -> None:
    """From the root, by the folder's own name."""
    environment = {**os.environ, "PYTHONSAFEPATH": "", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "benchmarks", "check"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cases right") == len(OPS) + 1


STEPS = [
    "check",
    "bench",
    "step-l16",
    "step-h14",
    "host",
    "bench-compiled",
    "tests",
    "trace",
    "gluon",
]


def run_gpu_script(folder: Path, *options: str) -> str:
    """On a machine without a GPU."""
    environment = {
        **os.environ,
        "OUT": str(folder),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_gpu_script_says_what_it_skips(tmp_path: Path) -> None:
    out = run_gpu_script(tmp_path / "out")
    skipped = [line.split()[1] for line in out.splitlines() if ": skipped: " in line]
    assert skipped == [f"{name}:" for name in STEPS]
    assert "torch" in (tmp_path / "out" / "machine.log").read_text()


def test_gpu_script_needs_torch(tmp_path: Path) -> None:
    """A Python without packages."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "No module named 'torch'" in done.stdout
    assert "set PYTHON to one that has PyTorch" in done.stderr


def test_gpu_script_knows_its_options(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--fast"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "usage: bash benchmarks/gpu.sh [--quick | --dry-run]\n"


@pytest.mark.slow
def test_gpu_script_dry_runs_every_step(tmp_path: Path) -> None:
    out = run_gpu_script(tmp_path / "out", "--dry-run")
    planned = dict(re.findall(r"^== (\S+): has (\d+) s on a GPU; here ", out, re.MULTILINE))
    skipped = re.findall(r"^== (\S+): skipped: ", out, re.MULTILINE)
    assert sorted([*planned, *skipped]) == sorted(STEPS)
    # What is not there yet, or not installed, is told; the rest starts and ends well.
    assert set(skipped) <= {"host"}
    ended = re.findall(r"^== (\S+): exit 0 after ", out, re.MULTILINE)
    assert ended == list(planned)
    assert sum(map(int, planned.values())) <= 410
    assert "| `info_nce` | fp32 " in out
    names = {path.name for path in (tmp_path / "out" / "results").glob("*/*.csv")}
    assert names >= {"info_nce.csv", "floors.csv", "step.csv"}
    assert list((tmp_path / "out" / "trace").glob("*.json.gz"))
