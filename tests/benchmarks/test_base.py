"""`--base REV`: what is run where, and what is compared."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from maect_fast.benchmarks import base
from maect_fast.benchmarks.base import compare, without_option
from maect_fast.benchmarks.results import Row, append_rows


def row(ms: float, commit: str, *, graph: float | None = None) -> Row:
    what: dict[str, Any] = {"op": "info_nce", "provider": "maect-fast", "mode": "fwd"}
    return Row(**what, B=8, N=8, D=16, dtype="fp32", p50_ms=ms, graph_ms=graph, commit=commit)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit, in the place of this one."""
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(base, "ROOT", tmp_path / "here")
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init"], [*author, "commit", "--allow-empty", "-m", "one"]):
        subprocess.run(["git", "-C", str(base.ROOT), *command], check=True, capture_output=True)
    return base.ROOT


def test_both_take_turns_and_medians_are_compared(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = base._git("rev-parse", "--short", "HEAD")
    runs = []
    times = {True: iter([2.0, 9.0, 2.1]), False: iter([1.0, 1.05, 1.1])}

    def run(tree: Path, words: list[str]) -> None:
        is_base = tree != checkout
        runs.append((is_base, words[:-1]))
        measured = row(next(times[is_base]), commit if is_base else "other+")
        append_rows(Path(words[-1]) / "device" / "info_nce.csv", [measured])
        assert tree.is_dir()

    monkeypatch.setattr(base, "_run", run)
    told: list[str] = []
    words = ["--op", "info_nce", "--base", "HEAD", "--out", "x", "--provider", "eager", "official"]
    text = compare("HEAD", words, told.append)
    assert [is_base for is_base, _ in runs] == [True, False] * 3
    assert all(w == ["--op", "info_nce", "--provider", "maect-fast", "--out"] for _, w in runs)
    header, _, line = text.splitlines()
    assert "kernels" not in header
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # Median 2.1, spread over the turns by more than a fifth of it; 1.05 / 2.1.
    assert cells == ["`info_nce`", "fp32", "B8 N8 D16", "fwd", "2.10 wide", "1.05", "0.500"]
    listed = base._git("worktree", "list").splitlines()
    assert len(listed) == 1, "the other worktree is gone"


def test_rows_must_be_of_the_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(tree: Path, words: list[str]) -> None:
        append_rows(Path(words[-1]) / "device" / "info_nce.csv", [row(1.0, "other")])

    monkeypatch.setattr(base, "_run", run)
    with pytest.raises(ValueError, match=r"expected rows of .*, got other"):
        compare("HEAD", [], print)


@pytest.mark.usefixtures("checkout")
def test_an_unknown_commit_is_one_line() -> None:
    with pytest.raises(ValueError, match="--base: git rev-parse --short: no such commit"):
        compare("nowhere", [], print)


def test_a_failed_process_says_why(checkout: Path) -> None:
    with pytest.raises(ValueError, match=r"--base: -m benchmarks: .*No module named benchmarks"):
        base._run(checkout, [])


def test_without_option() -> None:
    words = ["--op", "a", "b", "--base", "HEAD~1", "--base=x", "--threads", "2"]
    assert without_option(words, "--base") == ["--op", "a", "b", "--threads", "2"]
    assert without_option(words, "--op") == ["--base", "HEAD~1", "--base=x", "--threads", "2"]
