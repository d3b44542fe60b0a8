"""Every example runs in a fresh process, ends well and in time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.py"))
# It renders images, which tests/evaluation/test_cluster_shapes.py looks at.
RENDERS = ROOT / "examples" / "shapes.py"
# Those without a library that takes seconds to import, and without timm's models.
FAST = {"official_mae_ct.py"}
# What an example promises is a minute; machines that run tests are slow and busy.
LIMIT_S = 300


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.name in FAST else [pytest.mark.slow])
        for path in EXAMPLES
        if ROOT / path != RENDERS
    ],
)
def test_an_example_runs(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    # An example that a user copies has no interpreted kernels.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(ROOT / path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    missing = re.search(r"No module named '(lightly|open_clip|transformers)'", done.stderr)
    if missing:
        pytest.skip(f"{missing[1]} is not installed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "difference" in done.stdout
    # Nothing is left behind, and nothing is warned of that the example does.
    assert not list(tmp_path.iterdir())
    assert str(path) not in done.stderr


def test_the_readme_lists_every_example() -> None:
    listed = re.findall(r"\]\(([\w/]+\.py)\)", (ROOT / "examples" / "README.md").read_text())
    assert sorted(listed) == sorted(str(path.relative_to("examples")) for path in EXAMPLES)
