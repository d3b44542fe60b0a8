from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WriteImage = Callable[..., Path]


@pytest.fixture
def write_image(tmp_path: Path) -> WriteImage:
    """Writes a random smooth picture below tmp_path/images and returns its path."""

    def write(name: str, *, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Path:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(list(name.encode())).integers(0, 256, (5, 4, 3))
        picture = Image.fromarray(noise.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        picture.convert(mode).save(path)
        return path

    return write


@pytest.fixture
def folder(write_image: WriteImage, tmp_path: Path) -> Path:
    """Twelve images in two classes: cat 0..6, dog 7..11."""
    for i in range(7):
        write_image(f"cat/{i}.png", size=(40 + i, 30))
    for i in range(5):
        write_image(f"dog/{i}.jpg", size=(24, 36 + i))
    return tmp_path / "images"
