"""Ours beside another commit's: `maect-fast bench --base REV`.

The other commit stands in a git worktree of its own. Processes of both take turns, because what
else a machine does changes from minute to minute; compared are the medians over the turns.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from maect_fast.benchmarks.results import OURS, WIDE, Row, by_case, read_folder
from maect_fast.benchmarks.table import columns_table, number

__all__ = ["compare", "without_option"]

ROOT = Path(__file__).resolve().parents[1]
TURNS = 3
LIBRARY = Path("kernels", "_C.so")
CPP_SOURCES = ("CMakeLists.txt", "setup.py", ":(glob)kernels/**/*.cpp", ":(glob)kernels/**/*.h")


def compare(revision: str, words: Sequence[str], tell: Callable[[str], None]) -> str:
    """Measure both and return a table.

    Args:
        revision: a commit, as git calls it.
        words: the benchmark's command line.
        tell: gets lines of progress.

    Raises:
        ValueError: no such commit, or a process of either failed.
    """
    commit = _git("rev-parse", "--short", "--verify", "--quiet", f"{revision}^{{commit}}")
    for option in ("--base", "--out", "--provider"):
        words = without_option(words, option)
    rows: dict[str, list[Row]] = {"base": [], "here": []}
    with _worktree(commit, tell) as base:
        for turn in range(TURNS):
            for side, tree in (("base", base), ("here", ROOT)):
                tell(f"turn {turn + 1} of {TURNS}: {commit if side == 'base' else 'here'}")
                out = base.parent / f"{side}-{turn}"
                _run(tree, [*words, "--provider", OURS, "--out", str(out)])
                (folder,) = out.iterdir()
                rows[side] += [row for row in read_folder(folder) if row.provider == OURS]
    found = {row.commit for row in rows["base"]}
    if found != {commit}:
        # The other tree's own rows say what was measured.
        raise ValueError(f"--base: expected rows of {commit}, got {', '.join(sorted(found))}")
    return _table(rows, commit)


def without_option(words: Sequence[str], option: str) -> list[str]:
    """The command line without an option and its values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("-"):
            dropping = word == option or word.startswith(f"{option}=")
        if not dropping:
            kept.append(word)
    return kept


@contextmanager
def _worktree(commit: str, tell: Callable[[str], None]) -> Iterator[Path]:
    """A checkout of the commit, with its C++ library where this one has one."""
    parent = Path(tempfile.mkdtemp(prefix="maect-fast-base-"))
    tree = parent / commit
    _git("worktree", "add", "--detach", str(tree), commit)
    try:
        if (ROOT / LIBRARY).exists():
            changed = _git("diff", "--name-only", commit, "--", *CPP_SOURCES)
            if changed:
                tell(f"building the C++ library of {commit}")
                _run(tree, ["build_ext", "--inplace"], program=["setup.py"])
            else:
                shutil.copy2(ROOT / LIBRARY, tree / LIBRARY)
            if not (tree / LIBRARY).exists():
                raise ValueError(f"--base: the C++ library of {commit} was not built")
        yield tree
    finally:
        _git("worktree", "remove", "--force", str(tree))
        shutil.rmtree(parent)


def _run(
    tree: Path, words: Sequence[str], *, program: Sequence[str] = ("-m", "benchmarks")
) -> None:
    """Run a checkout's own program."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(tree)
    command = [sys.executable, *program, *words]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ValueError(f"--base: {' '.join(command[1:])}: {lines[-1] if lines else 'failed'}")


def _table(rows: dict[str, list[Row]], commit: str) -> str:
    """One line per op, dtype, shape and mode, with the medians over the turns."""
    lines = []
    for case in by_case(rows["here"]):
        first = case[0]
        key = (first.op, first.dtype, first.shape, first.mode)
        others = [row for row in rows["base"] if (row.op, row.dtype, row.shape, row.mode) == key]
        line = [f"`{first.op}`", *key[1:]]
        for column in ("p50_ms", "graph_ms"):
            before, now = (_times(members, column) for members in (others, case))
            ratio = median(now) / median(before) if now and before else None
            line += [_middle(before), _middle(now), number(ratio)]
        lines.append(line)
    header = ["op", "dtype", "shape", "mode", f"{commit}, ms", "here, ms", "here / base"]
    header += [f"{commit}, kernels, ms", "here, kernels, ms", "kernels, here / base"]
    return columns_table(header, lines, left=4)


def _times(rows: Sequence[Row], column: str) -> list[float]:
    """Of all turns."""
    return [getattr(row, column) for row in rows if getattr(row, column) is not None]


def _middle(times: Sequence[float]) -> str:
    """The median; "wide" where the turns differ too much for a comparison."""
    if not times:
        return ""
    wide = " wide" if max(times) - min(times) > WIDE * median(times) else ""
    return f"{number(median(times))}{wide}"


def _git(*command: str) -> str:
    run = ["git", "-C", str(ROOT), *command]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"--base: git {' '.join(command[:2])}: {done.stderr.strip() or 'no such commit'}"
        )
    return done.stdout.strip()
