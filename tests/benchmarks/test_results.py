import csv
import os
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maect_fast.benchmarks import results
from maect_fast.benchmarks.results import (
    KEY,
    Row,
    append_rows,
    best_peer,
    by_case,
    device_folder,
    device_name,
    environment_columns,
    provenance,
    read_folder,
    read_rows,
)

CPU = torch.device("cpu")
ROW = Row(
    op="info_nce",
    provider="maect-fast",
    mode="bwd",
    dtype="fp32",
    B=512,
    N=4096,
    D=256,
    p50_ms=1.25,
    p20_ms=1.125,
    p80_ms=1.5,
    gbps=3.5,
    tflops=0.75,
    peak_mib=16.0,
    floor_ms=0.5,
    floor_kind="FLOPs",
    torch="2.11.0",
    cpu="a, b",
    threads=2,
)


def test_the_first_columns_are_the_agreed_ones_in_their_order() -> None:
    agreed = "op provider mode dtype B H M N D Q K p50_ms p20_ms p80_ms gbps tflops peak_mib gpu"
    names = [field.name for field in fields(Row)]
    assert names[:22] == [*agreed.split(), "torch", "triton", "commit", "date"]


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "device" / "info_nce.csv"
    failed = Row(op="info_nce", provider="eager", reason='failed: "dq", 3e-3 > 1e-3', B=1)
    append_rows(path, [ROW, failed])
    assert read_rows(path) == [ROW, failed]


def test_a_new_measurement_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "info_nce.csv"
    other = replace(ROW, N=8192)
    append_rows(path, [ROW, other])
    again = replace(ROW, p50_ms=9.0, torch="2.12.0", commit="abc1234", date="2030-01-01", threads=1)
    append_rows(path, [again, replace(ROW, mode="fwd")])
    assert read_rows(path) == [again, other, replace(ROW, mode="fwd")]
    assert path.read_text().count("provider") == 1


@pytest.mark.parametrize("name", KEY)
def test_every_key_column_tells_rows_apart(tmp_path: Path, name: str) -> None:
    path = tmp_path / "info_nce.csv"
    other: dict[str, Any] = {name: 7}
    append_rows(path, [ROW, replace(ROW, **other)])
    assert len(read_rows(path)) == 2


def test_times_are_written_with_five_digits(tmp_path: Path) -> None:
    path = tmp_path / "info_nce.csv"
    append_rows(path, [replace(ROW, p50_ms=1 / 3, gbps=None)])
    with path.open(newline="") as file:
        line = next(csv.DictReader(file))
    assert (line["p50_ms"], line["gbps"], line["B"]) == ("0.33333", "", "512")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "info_nce.csv"
    append_rows(path, [ROW])

    def fail(self: Path, text: str) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            append_rows(path, [replace(ROW, N=1)])
    assert read_rows(path) == [ROW]
    assert os.listdir(tmp_path) == ["info_nce.csv"]


@dataclass(frozen=True, kw_only=True)
class Step:
    recipe: str
    images_per_second: float


def test_other_tables_have_their_own_columns_and_key(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    append_rows(path, [Step(recipe="l16", images_per_second=4.0)], key=["recipe"])
    append_rows(path, [Step(recipe="b16", images_per_second=9.0)], key=["recipe"])
    append_rows(path, [Step(recipe="l16", images_per_second=5.0)], key=["recipe"])
    assert path.read_text() == "recipe,images_per_second\nl16,5\nb16,9\n"


@dataclass(frozen=True, kw_only=True)
class LaterStep(Step):
    provider: str = "maect-fast"


def test_a_newer_key_column_counts_as_its_default_in_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    path.write_text("recipe,images_per_second\nl16,5\nb16,9\n")
    key = ["recipe", "provider"]
    stock = LaterStep(recipe="l16", images_per_second=6.0, provider="stock")
    append_rows(path, [stock, LaterStep(recipe="b16", images_per_second=8.0)], key=key)
    assert path.read_text() == (
        "recipe,images_per_second,provider\nl16,5,maect-fast\nb16,8,maect-fast\nl16,6,stock\n"
    )


def test_rows_never_overwrite_another_kind_of_table(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    path.write_text("recipe,images_per_second\nl16,5\n")
    with pytest.raises(ValueError, match=r"expected columns op, .*got recipe, images_per_second"):
        append_rows(path, [ROW])
    assert path.read_text().endswith("l16,5\n")


def test_a_file_of_an_older_version_gains_the_new_columns(tmp_path: Path) -> None:
    path = tmp_path / "info_nce.csv"
    path.write_text(f"{','.join(KEY)},p50_ms\ninfo_nce,eager,fwd,fp32,8,,,8,4,,,2.5\n")
    append_rows(path, [ROW])
    old, new = read_rows(path)
    assert (old.provider, old.p50_ms, old.N, old.cpu, old.threads) == ("eager", 2.5, 8, "", None)
    assert new == ROW


def test_a_damaged_number_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "info_nce.csv"
    append_rows(path, [ROW])
    path.write_text(path.read_text().replace("1.25", "fast"))
    with pytest.raises(ValueError, match=r"info_nce.csv, line 2: .*'fast'"):
        read_rows(path)


def test_a_folder_gives_its_rows_and_passes_other_tables_over(tmp_path: Path) -> None:
    (tmp_path / "digits_demo.csv").write_text("seed,knn\n0,0.9\n")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(ValueError, match="expected benchmark rows"):
        read_folder(tmp_path)
    append_rows(tmp_path / "info_nce.csv", [ROW])
    append_rows(tmp_path / "floors.csv", [Row(op="floors", provider="copy", gbps=20.0)])
    assert [row.op for row in read_folder(tmp_path)] == ["floors", "info_nce"]


def test_competitors_stand_together_ours_first_then_by_time() -> None:
    times = {"slow": 3.0, "none": None, "maect-fast": 2.0, "fast": 1.0}
    shapes = [(197, 8), (50, 512)]
    rows = [
        replace(ROW, provider=provider, p50_ms=ms, mode=mode, N=N, B=B)
        for provider, ms in times.items()
        for mode in ("full", "fwd")
        for N, B in shapes
    ]
    cases = by_case([*rows, Row(op="floors", provider="copy")])
    assert [(case[0].N, case[0].mode) for case in cases] == [
        (50, "fwd"), (50, "full"), (197, "fwd"), (197, "full"),
    ]  # fmt: skip
    for case in cases:
        assert [row.provider for row in case] == ["maect-fast", "fast", "slow", "none"]
    peer = best_peer(cases[0])
    assert peer is not None
    assert peer.provider == "fast"
    assert best_peer([ROW, replace(ROW, provider="maect-fast int8")]) is None


def test_shape_and_fraction_of_the_floor() -> None:
    assert ROW.shape == "B512 N4096 D256"
    assert ROW.of_floor == 0.4
    assert replace(ROW, p50_ms=None).of_floor is None


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("AMD EPYC", "cpu-amd-epyc-2-cores"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "cpu-intel-xeon-cpu-2-20ghz-2-cores"),
    ],
)
def test_folder_of_a_cpu(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "cpu_name", lambda: name)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert device_folder(CPU) == folder


def test_folder_and_environment_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    cuda = torch.device("cuda")
    assert device_folder(cuda) == "nvidia-a100-sxm4-80gb"
    row = Row(op="info_nce", provider="eager", **environment_columns(cuda))
    assert device_name([row]) == "NVIDIA A100-SXM4-80GB"


def test_environment_of_a_cpu() -> None:
    row = Row(op="info_nce", provider="eager", **environment_columns(CPU))
    assert row.gpu == ""
    assert row.torch == torch.__version__
    assert device_name([row]) == f"{results.cpu_name()}, {torch.get_num_threads()} thread" + (
        "s" if torch.get_num_threads() > 1 else ""
    )


def test_provenance_names_every_commit_once() -> None:
    rows = [replace(ROW, commit=commit, date="2026-11-21") for commit in ("a", "b+", "a")]
    assert provenance(rows) == "torch 2.11.0, commit a and b+, 2026-11-21"


def test_commit_is_of_the_checkout_that_tracks_the_file(tmp_path: Path) -> None:
    file = tmp_path / "benchmarks" / "results.py"
    result = tmp_path / "benchmarks" / "results" / "cpu" / "info_nce.csv"
    result.parent.mkdir(parents=True)
    result.touch()
    file.touch()

    def git(*command: str) -> str:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        run = ["git", "-C", str(tmp_path), *author, *command]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert results._commit(file) == ""
    git("add", ".")
    git("commit", "-m", "all")
    head = git("rev-parse", "--short", "HEAD")
    result.write_text("new measurements")
    (tmp_path / "untracked").touch()
    assert results._commit(file) == head
    file.write_text("changed")
    assert results._commit(file) == f"{head}+"
    installed = tmp_path / "site-packages" / "results.py"
    installed.parent.mkdir()
    installed.touch()
    assert results._commit(installed) == ""
