"""Render shapes to try the program on: ten kinds, of any place, size and colour, turned a bit.

    python examples/shapes.py shapes
    maect-fast demo --data shapes --out runs/shapes

Without --labels all images lie in one folder, as a user's own would; with it each kind has its
sub-folder, which no stage of training looks at, and by which clusters are judged afterwards.
"""

import argparse
import colorsys
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 96
# Drawn so much larger and then reduced, for smooth edges.
FINE = 4

Point = tuple[float, float]


def star(points: int, inner: float) -> list[Point]:
    """Corners on the unit circle and on one of radius `inner`, in turn."""
    corners = []
    for i in range(2 * points):
        radius, angle = inner if i % 2 else 1.0, math.pi * i / points
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


def regular(corners: int) -> list[Point]:
    """A regular polygon in the unit circle."""
    return star(corners, 1.0)[::2]


def circle(radius: float = 1.0, middle: Point = (0, 0)) -> list[Point]:
    """A polygon that looks round."""
    return [(radius * x + middle[0], radius * y + middle[1]) for x, y in regular(90)]


def heart() -> list[Point]:
    """The well-known curve in sines and cosines."""
    turns = [2 * math.pi * i / 120 for i in range(120)]
    return [
        (
            16 * math.sin(t) ** 3 / 17,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in turns
    ]


def cross(width: float) -> list[Point]:
    """Two bars."""
    w = width
    return [
        (-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w),
        (w, 1), (-w, 1), (-w, w), (-1, w), (-1, -w), (-w, -w),
    ]  # fmt: skip


# Of each kind, what is filled and what is cut out of it.
SHAPES: dict[str, tuple[list[Point], list[Point]]] = {
    "arrow": (
        [(0, -1), (0.8, -0.1), (0.3, -0.1), (0.3, 1), (-0.3, 1), (-0.3, -0.1), (-0.8, -0.1)],
        [],
    ),
    "bar": ([(-0.25, -1), (0.25, -1), (0.25, 1), (-0.25, 1)], []),
    "circle": (circle(), []),
    "crescent": (circle(), circle(0.85, (0.45, 0))),
    "cross": (cross(0.3), []),
    "heart": (heart(), []),
    "ring": (circle(), circle(0.6)),
    "square": (regular(4), []),
    "star": (star(5, 0.42), []),
    "triangle": (regular(3), []),
}


def render(kind: str, rng: random.Random) -> Image.Image:
    """One shape: bright on a dark ground, both of any hue."""
    size = rng.uniform(0.26, 0.4) * SIDE
    # Evaluation cuts 6 % off each side.
    place = [rng.uniform(size + 6, SIDE - size - 6) for _ in range(2)]
    turn = rng.uniform(-0.5, 0.5)
    ground = _colour(rng.random(), rng.random(), rng.uniform(0, 0.2))
    paint = _colour(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.7, 1))
    image = Image.new("RGB", (SIDE * FINE, SIDE * FINE), ground)
    mask = Image.new("L", image.size)
    draw = ImageDraw.Draw(mask)
    for corners, fill in zip(SHAPES[kind], (255, 0), strict=True):
        turned = [
            (
                FINE * (place[0] + size * (x * math.cos(turn) - y * math.sin(turn))),
                FINE * (place[1] + size * (x * math.sin(turn) + y * math.cos(turn))),
            )
            for x, y in corners
        ]
        if turned:
            draw.polygon(turned, fill=fill)
    image.paste(paint, mask=mask)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _colour(hue: float, saturation: float, value: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * x) for x in colorsys.hsv_to_rgb(hue, saturation, value))
    return red, green, blue


def write_shapes(folder: Path, *, number: int = 300, labels: bool = False, seed: int = 0) -> None:
    """Fill `folder` with PNG files, as many of each kind, in random order if in one folder.

    Args:
        folder: made if there is none.
        number: of images in all.
        labels: a sub-folder for each kind.
        seed: the same one gives the same pixels.
    """
    rng = random.Random(seed)
    kinds = [list(SHAPES)[i % len(SHAPES)] for i in range(number)]
    rng.shuffle(kinds)
    for i, kind in enumerate(kinds):
        path = folder / (kind if labels else "") / f"{i:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(kind, rng).save(path)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("shapes"))
    parser.add_argument("--number", type=int, default=300, help="default: 300")
    parser.add_argument("--labels", action="store_true", help="a sub-folder for each kind")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    options = parser.parse_args()
    write_shapes(options.folder, number=options.number, labels=options.labels, seed=options.seed)


if __name__ == "__main__":
    main()
