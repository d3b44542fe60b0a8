import builtins
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from maect_fast.benchmarks.figures import draw
from maect_fast.benchmarks.results import Row, append_rows

# Ours is slower than the best peer at N = 512 and never measured at N = 1024.
LOSS_MS: dict[str, dict[int, float | None]] = {
    "maect-fast": {512: 0.3, 1024: None, 2048: 0.5},
    "eager": {512: 0.6, 1024: 1.2, 2048: 2.4},
    "Liger": {512: 0.2, 1024: 0.7, 2048: 0.9},
    "newcomer": {512: 0.4, 1024: 0.8, 2048: 1.6},
    "cut-cross-entropy": {512: None, 1024: None, 2048: None},
}


def loss_rows(modes: tuple[str, ...] = ("fwd", "bwd")) -> Iterator[Row]:
    for provider, times in LOSS_MS.items():
        for (N, ms), mode in ((item, mode) for item in times.items() for mode in modes):
            yield Row(
                op="info_nce",
                provider=provider,
                mode=mode,
                dtype="bf16",
                B=512,
                N=N,
                D=256,
                p50_ms=ms,
                p20_ms=ms and 0.9 * ms,
                p80_ms=ms and 1.1 * ms,
                gbps=ms and N / ms,
                tflops=ms and 0.2 * N / ms,
                floor_ms=N / 5120,
                reason="" if ms else "failed the gate",
                gpu="NVIDIA H200",
                torch="2.11.0",
                commit="abc1234",
                date="2026-11-21",
            )


def search_rows() -> Iterator[Row]:
    for B, Q in ((64, 65536), (512, 65536), (512, 8192)):
        sizes: dict[str, Any] = {"B": B, "Q": Q, "D": 256}
        yield Row(op="queue_topk", provider="eager", mode="topk", dtype="fp32", **sizes, p50_ms=1.0)


def floor_rows() -> Iterator[Row]:
    yield Row(op="floors", provider="copy", gbps=3900.0)
    yield Row(op="floors", provider="GEMM", dtype="bf16", tflops=690.0)
    yield Row(op="floors", provider="GEMM", dtype="fp32", tflops=50.0)


def fill(folder: Path) -> Path:
    append_rows(folder / "info_nce.csv", [*loss_rows()])
    append_rows(folder / "queue_topk.csv", [*search_rows()])
    append_rows(folder / "floors.csv", [*floor_rows()])
    (folder / "digits_demo.csv").write_text("seed,knn\n0,0.9\n")
    return folder


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by file name, not rendered."""
    figures: dict[str, Figure] = {}

    def keep(self: Figure, path: Path) -> None:
        figures[path.stem] = self

    monkeypatch.setattr(Figure, "savefig", keep)
    draw(fill(tmp_path / "device"), tmp_path)
    return figures


def panels(figure: Figure) -> dict[str, Any]:
    return {ax.get_title(): ax for ax in figure.axes if ax.axison}


def texts(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.texts]


def line(ax: Any, colour: str) -> Any:
    (found,) = (line for line in ax.lines if line.get_color() == colour)
    return found


def test_pictures_are_files_that_show_something(tmp_path: Path) -> None:
    folder = tmp_path / "device"
    append_rows(folder / "info_nce.csv", [*loss_rows(("fwd",))])
    append_rows(folder / "floors.csv", [*floor_rows()])
    names = ["info_nce_bf16_bars.png", "info_nce_scaling.png", "roofline.png"]
    out = tmp_path / "pictures"
    assert draw(folder, out) == [out / name for name in names]
    for name in names:
        assert imread(out / name).std() > 0.05


def test_what_there_is_no_data_for_is_not_drawn(tmp_path: Path) -> None:
    row = next(loss_rows())
    append_rows(tmp_path / "info_nce.csv", [row])
    append_rows(tmp_path / "queue_topk.csv", [Row(op="queue_topk", provider="a", reason="no")])
    assert [path.name for path in draw(tmp_path, tmp_path)] == ["info_nce_bf16_bars.png"]


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*expected benchmark rows[^\n]*$"):
        draw(tmp_path, tmp_path)


def test_bars_show_every_shape_mode_and_provider_losses_included(drawn: dict[str, Figure]) -> None:
    figure = drawn["info_nce_bf16_bars"]
    shapes = [f"bf16, B512 N{N} D256, {mode}" for N in (512, 1024, 2048) for mode in ("fwd", "bwd")]
    assert [*panels(figure)] == shapes
    first = panels(figure)[shapes[0]]
    names = [label.get_text() for label in first.get_yticklabels()]
    assert names == ["maect-fast", "eager", "Liger", "newcomer"]
    bars = {names[round(bar.get_y() + 0.35)]: bar.get_width() for bar in first.patches}
    assert bars == {"maect-fast": 0.3, "eager": 0.6, "Liger": 0.2, "newcomer": 0.4}
    assert sorted(texts(first)) == ["0.200", "0.300", "0.400", "0.600"]
    assert [line.get_xdata()[0] for line in first.lines] == [0.1]  # the floor
    assert "failed the gate" in texts(panels(figure)[shapes[2]])
    assert "info_nce on NVIDIA H200" in figure.get_suptitle()


def test_ours_is_shown_even_if_it_never_passed(drawn: dict[str, Figure], tmp_path: Path) -> None:
    folder = tmp_path / "failed"
    rows = [row for row in loss_rows() if row.provider == "eager"]
    failed = [replace(row, provider="maect-fast", p50_ms=None, reason="wrong") for row in rows]
    append_rows(folder / "info_nce.csv", rows + failed)
    draw(folder, tmp_path)
    for ax in panels(drawn["info_nce_bf16_bars"]).values():
        assert len(ax.get_yticks()) == 2
        assert "wrong" in texts(ax)
    names = [text.get_text() for text in drawn["info_nce_scaling"].legends[0].get_texts()]
    assert names == ["maect-fast", "eager", "floor"]
    drawn["info_nce_scaling"].draw_without_rendering()


def test_names_of_bars_stand_once_per_line_of_panels(drawn: dict[str, Figure]) -> None:
    axes = panels(drawn["info_nce_bf16_bars"]).values()
    named = [ax for ax in axes if any(label.get_text() for label in ax.get_yticklabels())]
    lines = {ax.get_position().y0 for ax in axes}
    assert len(lines) == len(named) < len(axes)
    assert all(ax.get_position().x0 < 0.2 for ax in named)


def test_scaling_shows_times_and_floor_and_leaves_gaps(drawn: dict[str, Figure]) -> None:
    ax = panels(drawn["info_nce_scaling"])["bf16, B512 D256, fwd"]
    assert ax.get_xlabel() == "gathered predictions N"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["512", "1k", "2k"]
    ours = line(ax, "#D55E00").get_ydata()
    assert (ours[0], ours[2]) == (0.3, 0.5)
    assert ours[1] != ours[1]  # NaN: not measured
    assert [*line(ax, "#009E73").get_ydata()] == [0.2, 0.7, 0.9]
    (floor,) = (line for line in ax.lines if line.get_linestyle() == "--")
    assert [*floor.get_ydata()] == [0.1, 0.2, 0.4]


def test_scaling_varies_one_size_at_a_time(drawn: dict[str, Figure]) -> None:
    found = {
        title: [*ax.lines[-1].get_xdata()]
        for title, ax in panels(drawn["queue_topk_scaling"]).items()
    }
    assert found == {
        "fp32, B512 D256, topk": [8192, 65536],
        "fp32, D256 Q65536, topk": [64, 512],
    }


def test_a_provider_has_one_colour_everywhere(drawn: dict[str, Figure]) -> None:
    seen = set()
    for name in ("info_nce_scaling", "roofline"):
        legend: Any = drawn[name].legends[0]
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if text.get_text() in ("maect-fast", "Liger"):
                seen.add((text.get_text(), handle.get_color()))
    assert seen == {("maect-fast", "#D55E00"), ("Liger", "#009E73")}


def test_roofline_joins_ours_to_the_best_peer_under_the_measured_roof(
    drawn: dict[str, Figure],
) -> None:
    ((title, ax),) = panels(drawn["roofline"]).items()
    assert title == "bf16, measured 3,900 GB/s and 690 TFLOP/s"
    pairs = [[*line.get_ydata()] for line in ax.lines if len(line.get_ydata()) == 2]
    assert pairs[0] == pytest.approx([0.2 * 512 / 0.2, 0.2 * 512 / 0.3], rel=1e-4)
    x, y = ax.lines[-1].get_data()
    assert [*y[1:]] == [690.0, 690.0]
    assert [y[0] / x[0], y[1] / x[1]] == pytest.approx([3.9, 3.9])
    points = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert points == pytest.approx([200.0] * len(points), rel=1e-4)


def overlap(a: Bbox, b: Bbox) -> bool:
    shared = Bbox.intersection(a, b)
    return shared is not None and min(shared.width, shared.height) > 1  # pixel


def test_texts_do_not_overlap(drawn: dict[str, Figure]) -> None:
    for figure in drawn.values():
        figure.draw_without_rendering()
        parts = [ax.get_tightbbox() for ax in panels(figure).values()]
        parts += [part.get_window_extent() for part in (*figure.legends, *figure.texts)]
        assert not any(overlap(*pair) for pair in combinations(parts, 2))
        for ax in figure.axes:
            labels = [text.get_window_extent() for text in ax.texts]
            assert not any(overlap(*pair) for pair in combinations(labels, 2))


def test_a_missing_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib") as raised:
        draw(fill(tmp_path), tmp_path)
    assert raised.value.name == "matplotlib"
