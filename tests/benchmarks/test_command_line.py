"""`maect-fast bench`, `python -m benchmarks` and the GPU script, as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from maect_fast.benchmarks import cli
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.results import read_folder
from maect_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_bench_writes_rows_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maect_fast.benchmarks.timing.SECONDS_PER_CALL", 0.0)
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


def test_gpu_script_goes_through_every_step(tmp_path: Path) -> None:
    """Without a GPU: every step says that it is skipped, and nothing fails."""
    environment = {
        **os.environ,
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.endswith("skipped: no GPU")]
    assert [line.split()[1] for line in skipped] == ["check:", "tests:", "bench:", "trace:"]
    assert "torch" in (tmp_path / "out" / "machine.log").read_text()
