"""Files that mean harm: one line each, in bounded time and memory."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hostile_files import KINDS, MIB, SECONDS, Kind, Measured, measuring

Measure = Callable[[Kind, Path], Measured]


@pytest.fixture(scope="module")
def measure() -> Iterator[Measure]:
    with measuring() as server:
        yield server


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if kind.slow else []) for n, kind in KINDS.items()],
)
def test_a_line_in_bounded_time_and_memory(name: str, measure: Measure, tmp_path: Path) -> None:
    kind = KINDS[name]
    found = measure(kind, tmp_path)
    (line,) = found.lines or [""]
    assert re.search(kind.outcome, line), line
    assert line.isprintable()
    assert "weights_only" not in line
    assert len(line) < 600
    assert found.seconds < SECONDS
    assert found.mib < MIB
    assert not (tmp_path / "harm").exists()
