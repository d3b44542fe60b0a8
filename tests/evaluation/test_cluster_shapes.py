"""The images of examples/shapes.py."""

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "shapes.py"


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shapes", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: Image.open(path).tobytes() for path in folder.rglob("*.png")}


def test_a_seed_gives_the_same_pixels(shapes: ModuleType, tmp_path: Path) -> None:
    """With or without sub-folders, whose names say the kind."""
    shapes.write_shapes(tmp_path / "flat", number=40)
    shapes.write_shapes(tmp_path / "kinds", number=40, labels=True)
    shapes.write_shapes(tmp_path / "others", number=40, seed=1)
    kinds = Counter(path.parent.name for path in (tmp_path / "kinds").rglob("*.png"))
    assert kinds == dict.fromkeys(shapes.SHAPES, 4)
    assert len(kinds) == 10
    assert len(list((tmp_path / "flat").glob("*.png"))) == 40
    first = pixels(tmp_path / "flat")
    assert pixels(tmp_path / "kinds") == first
    assert len(set(first.values())) == 40
    assert not set(pixels(tmp_path / "others").values()) & set(first.values())


def test_shapes_lie_in_the_middle_that_evaluation_looks_at(
    shapes: ModuleType, tmp_path: Path
) -> None:
    shapes.write_shapes(tmp_path, number=40)
    for path in tmp_path.glob("*.png"):
        image = np.asarray(Image.open(path).convert("L")).astype(int)
        assert image.shape == (96, 96)
        rows, columns = np.nonzero(image > image[0, 0] + 40)
        assert len(rows) > 100
        assert min(rows.min(), columns.min()) >= 5
        assert max(rows.max(), columns.max()) <= 90
