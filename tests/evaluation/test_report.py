import base64
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from maect_fast.evaluation import Features
from maect_fast.evaluation.figures import (
    plot_attention,
    plot_confusion,
    plot_curves,
    plot_reconstructions,
    plot_tsne,
)
from maect_fast.evaluation.report import _png, format_table, write_report
from maect_fast.names import printable

ROWS = {
    "raw <pixels>": {"knn": 0.98, "kmeans_acc": 0.79, "kmeans_acc_std": 0.031, "seconds": 0.0},
    "MAE-CT": {"kmeans_acc": 0.9312, "knn": 0.9871, "seconds": 190.0},
    "no labels": {},
}


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.pictures: dict[str, bytes] = {}
        self.texts: list[str] = []
        self.bold: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "img":
            values = dict(attrs)
            kind, content = str(values["src"]).split(",", 1)
            assert kind == "data:image/png;base64"
            self.pictures[str(values["alt"])] = base64.b64decode(content)

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())
            if self.tags and self.tags[-1] == "strong":
                self.bold.append(data)


def small_figure() -> Figure:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [1, 0])
    return figure


def drawn(figure: Figure) -> None:
    """The figure renders, and not to a blank page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    buffer.seek(0)
    assert imread(buffer).std() > 0.02


def lines(num: int, **more: float) -> list[dict[str, float]]:
    fixed = {"lr": 1e-3, "images_per_second": 9, **more}
    return [{"update": i, "epoch": i / 2, "loss": 1 / (1 + i), **fixed} for i in range(num)]


def titles(axes: list[Axes]) -> list[str]:
    return [ax.get_title() for ax in axes if ax.get_title()]


def shown_by(ax: Axes) -> npt.NDArray[np.float64]:
    """The array behind the first picture."""
    return np.asarray(ax.images[0].get_array(), dtype=np.float64)


def test_table() -> None:
    assert format_table(ROWS).split("\n") == [
        "|              |   k-NN |   k-means ACC, mean |   seconds |",
        "|:-------------|-------:|--------------------:|----------:|",
        "| raw <pixels> |  0.980 |        0.790 ±0.031 |     0.000 |",
        "| MAE-CT       |  0.987 |               0.931 |   190.000 |",
        "| no labels    |      - |                   - |         - |",
    ]


def test_report_files(tmp_path: Path) -> None:
    out = tmp_path / "run" / "report"
    figures = {"Training": small_figure(), "t-SNE: before & after": small_figure()}
    path = write_report(
        out,
        title="Digits & <more>",
        tables={"Test": ROWS},
        figures=figures,
        notes=["a < b"],
        about={"command": "evaluate <run>", "date": "today"},
    )
    assert path == out / "report.html"

    content = json.loads((out / "report.json").read_text())
    assert content["tables"] == {"Test": ROWS}
    assert content["notes"] == ["a < b"]
    assert content["about"] == {"command": "evaluate <run>", "date": "today"}
    # A sentence for each column that is known, and for no other.
    assert list(content["columns"]) == ["k-NN", "k-means ACC, mean"]
    assert all(meaning.endswith(".") for meaning in content["columns"].values())
    files = content["figures"]
    assert files == {
        "Training": "figures/training.png",
        "t-SNE: before & after": "figures/t-sne-before-after.png",
    }

    markdown = (out / "report.md").read_text()
    assert r"| raw \<pixels\> |" in markdown
    assert r"a \< b" in markdown
    assert all(f"]({file})" in markdown for file in files.values())

    page = Page(path.read_text())
    assert page.pictures == {name: (out / file).read_bytes() for name, file in files.items()}
    for png in page.pictures.values():
        assert imread(io.BytesIO(png)).std() > 0.02
    assert {"Digits & <more>", "raw <pixels>", "a < b", "0.790", "±0.031"} <= set(page.texts)
    told = {"evaluate <run>", "date", *content["columns"].values()}
    assert told <= set(page.texts)
    assert "* **command**: evaluate \\<run\\>" in markdown
    # The best of each metric, and of those only: 190 seconds are no achievement.
    assert page.bold == ["0.987", "0.931"]
    # One file that needs nothing else, legible on a phone.
    text = path.read_text()
    assert "http" not in text
    assert 'name="viewport"' in text


ODD_NAMES = [
    "$5_$",
    "$\\frac{$",
    r"\$1",
    "<script>alert(1)</script>",
    "a|b",
    "**b** [x](http://y) `c` # ~~d~~",
    "_hidden",
    "two\nlines\r\n# heading",
    "\x1b[31mred",
    "\u202eright to left",
    os.fsdecode(b"\xff\xfe"),
    "日本 🐈",
    "n" * 255,
    '" onerror="alert(1)',
]


def test_names_are_data_in_every_report(tmp_path: Path) -> None:
    rows = {name: {"knn": i / 20} for i, name in enumerate(ODD_NAMES)}
    figures = {f"{i} {name}": small_figure() for i, name in enumerate(ODD_NAMES)}
    path = write_report(
        tmp_path, title=ODD_NAMES[7], tables=dict.fromkeys(ODD_NAMES, rows), figures=figures
    )
    # JSON keeps them as they are.
    content = json.loads((tmp_path / "report.json").read_bytes())
    assert content["tables"] == dict.fromkeys(ODD_NAMES, rows)

    page = Page(path.read_bytes().decode())
    plain = Page(write_report(tmp_path / "x", title="t", tables={}, figures={}).read_text())
    assert set(page.tags) - set(plain.tags) == {
        *("h2", "div", "table", "thead", "tr", "th", "tbody", "td", "strong", "figure", "img"),
        *("dl", "dt", "dd"),
    }
    assert page.attributes <= {"lang", "charset", "name", "content", "class", "alt", "src"}
    for name in ODD_NAMES:
        assert printable(name) in page.texts

    markdown = (tmp_path / "report.md").read_bytes().decode()
    lines = markdown.split("\n")
    assert [line[:2] for line in lines].count("# ") == 1
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == len(ODD_NAMES) * (len(ODD_NAMES) + 2)
    for line in table:
        assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 3
    assert not re.search(r"(?<!\\)(?:\\\\)*[<`$]", markdown)
    assert all(line.isprintable() for line in lines)
    assert all(line.isprintable() for line in format_table(rows).split("\n"))


def test_names_are_data_in_every_figure(recwarn: pytest.WarningsRecorder) -> None:
    n = len(ODD_NAMES)
    label = torch.arange(n).repeat_interleave(3)
    some = Features(x=torch.eye(n)[label] + 0.01 * torch.randn(3 * n, n), label=label)
    titles_given = {name: lines(2) for name in ODD_NAMES}
    tsne = plot_tsne(
        dict.fromkeys(ODD_NAMES[:4], some), label, group_names=ODD_NAMES, coloured_by="$"
    )
    for figure in (
        plot_curves(titles_given),
        tsne,
        plot_confusion(some, class_names=ODD_NAMES),
    ):
        assert len(_png(figure)) > 1000
    shown = [text.get_text() for text in tsne.legends[0].get_texts()]
    assert len(shown) == n
    assert shown[:3] == [r"\$5_\$", r"\$\frac{\$", r"\\$1"]
    assert shown[6] == "_hidden"
    assert all(len(text) <= 44 and text.isprintable() for text in shown)
    assert not recwarn.list


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    for value in (0.5, 0.75):
        write_report(tmp_path, title="t", tables={"Test": {"a": {"knn": value}}}, figures={})
    assert "0.750" in (tmp_path / "report.md").read_text()
    assert "0.500" not in (tmp_path / "report.html").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "figures",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_report_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, title="t", tables={"x": {"a": {"knn": float("nan")}}}, figures={})
    same = {"a b": small_figure(), "A, B": small_figure()}
    with pytest.raises(ValueError, match="distinct headings"):
        write_report(tmp_path, title="t", tables={}, figures=same)
    assert list(tmp_path.iterdir()) == []


def test_curves_have_a_column_per_stage_and_a_row_per_metric() -> None:
    figure = plot_curves({"pretrain": lines(5), "empty": [], "tune": lines(3, nn_accuracy=0.5)})
    assert len(figure.axes) == 8
    assert titles(figure.axes) == ["pretrain", "tune"]
    loss = figure.axes[0].lines[0].get_xydata()
    assert np.asarray(loss).tolist() == [[i / 2, 1 / (1 + i)] for i in range(5)]
    # The first stage has no neighbours: its cell is off.
    assert [len(ax.lines) for ax in figure.axes] == [1, 1, 0, 1, 1, 1, 1, 1]
    drawn(figure)
    drawn(plot_curves({"one line": lines(1)}))
    with pytest.raises(ValueError, match="at least one line"):
        plot_curves({"empty": []})


def test_tsne_shows_the_same_images_in_every_panel(blobs: tuple[Features, Features]) -> None:
    before = blobs[0]
    after = Features(x=before.x + 4 * torch.eye(16)[before.label], label=before.label)
    panels = {"before": before, "after": after}
    label = before.label
    figure = plot_tsne(panels, label, group_names=["a", "b", "c"], max_points=90)
    assert titles(figure.axes) == ["before", "after"]
    sizes = [
        [len(np.asarray(group.get_offsets())) for group in ax.collections] for ax in figure.axes
    ]
    assert sizes[0] == sizes[1]
    assert sum(sizes[0]) == 90
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    drawn(figure)
    # Colours belong to the right points: where classes are apart, so are the colours.
    groups = [np.asarray(group.get_offsets()) for group in figure.axes[1].collections]
    centres = np.stack([np.median(group, axis=0) for group in groups])
    for own, group in enumerate(groups):
        nearest = np.linalg.norm(group[:, None] - centres, axis=2).argmin(axis=1)
        assert (nearest == own).mean() > 0.9
    again = plot_tsne(panels, label, max_points=90)
    for one, two in zip(figure.axes, again.axes, strict=True):
        for left, right in zip(one.collections, two.collections, strict=True):
            assert np.array_equal(left.get_offsets(), right.get_offsets())


def test_tsne_without_labels() -> None:
    unknown = Features(x=torch.randn(8, 4), label=torch.full((8,), -1))
    figure = plot_tsne({"only": unknown}, unknown.label)
    assert len(figure.axes[0].collections) == 1
    assert figure.legends == []
    three, seven = (Features(x=unknown.x[:n], label=unknown.label[:n]) for n in (3, 7))
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        plot_tsne({"only": three}, three.label)
    with pytest.raises(ValueError, match=r"the same images, got \[8, 7\]"):
        plot_tsne({"a": unknown, "b": seven}, unknown.label)


def test_confusion_lines_clusters_up_with_classes() -> None:
    label = torch.tensor([0] * 4 + [1] * 5 + [2] * 3 + [-1])
    place = torch.tensor([0] * 4 + [1] * 4 + [2] + [2] * 3 + [0])
    some = Features(x=torch.eye(3)[place], label=label)
    figure = plot_confusion(some, class_names=["cat", "dog"])
    ax = figure.axes[0]
    shares = shown_by(ax)
    np.testing.assert_allclose(shares, np.array([[1, 0, 0], [0, 0.8, 0.2], [0, 0, 1]]))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["cat", "dog", "2"]
    assert [text.get_text() for text in ax.texts] == ["4", "4", "1", "3"]
    # Clusters have the names of their classes.
    named = [tick.get_text() for tick in ax.get_xticklabels()]
    assert [name.split(" (")[0] for name in named] == ["cat", "dog", "2"]
    assert {name.split(" (")[1] for name in named} == {"0)", "1)", "2)"}
    assert figure.get_suptitle().startswith("k-means: 91.7% of 12 images on the diagonal")
    drawn(figure)
    with pytest.raises(ValueError, match="at least one labelled image"):
        plot_confusion(Features(x=some.x, label=torch.full_like(label, -1)))


@pytest.mark.parametrize("channels", [1, 3])
def test_reconstructions_and_attention(channels: int) -> None:
    images = np.random.default_rng(0).random((2, 8, 8, channels))
    figure = plot_reconstructions(
        images,
        images * 0.5,
        1.5 * images,
        titles=["cat", "dog"],
        mask_ratio=0.75,
        is_normalised=True,
    )
    assert figure.get_suptitle().startswith("75% of the patches are removed")
    assert titles(figure.axes) == ["cat", "dog"]
    assert len(figure.axes) == 6
    shown = [shown_by(ax).reshape(8, 8, -1) for ax in figure.axes]
    for column in range(2):
        np.testing.assert_allclose(shown[column], images[column])
        np.testing.assert_allclose(shown[2 + column], images[column] * 0.5)
        np.testing.assert_allclose(shown[4 + column], (1.5 * images[column]).clip(0, 1))
    drawn(figure)

    attention = torch.rand(2, 9, 4, 4)
    figure = plot_attention(images, attention, pooling="mean_patch", titles=["cat", "dog"])
    assert figure.get_suptitle().startswith("Attention of the patches, whose mean is the feature")
    # The scale of each map is below it.
    assert figure.axes[1].get_xlabel() == f"{attention[0].mean(dim=0).max():.1%}"
    assert titles(figure.axes) == ["image", "mean", *(f"head {i}" for i in range(6))]
    second_row = [shown_by(ax) for ax in figure.axes[8:]]
    np.testing.assert_allclose(second_row[1], attention[1].mean(dim=0).numpy(), rtol=1e-6)
    np.testing.assert_allclose(second_row[7], attention[1, 5].numpy())
    drawn(figure)


def test_pictures_that_do_not_fit() -> None:
    images = np.zeros((2, 8, 8, 1))
    with pytest.raises(ValueError, match=r"one shape, got \[\[2, 8, 8, 1\], \[2, 8, 8, 1\], \[1, "):
        plot_reconstructions(
            images, images, images[:1], titles=[], mask_ratio=0.5, is_normalised=False
        )
    with pytest.raises(ValueError, match="maps of 2 images, got 3"):
        plot_attention(images, torch.rand(3, 2, 4, 4), pooling="class_token", titles=[])
