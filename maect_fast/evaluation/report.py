"""One report as JSON for programs, Markdown for terminals, and one HTML file that can be mailed."""

import base64
import io
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure
from tabulate import tabulate

from maect_fast.checkpoint import write_atomically
from maect_fast.names import markdown, printable

__all__ = ["METRICS", "Metric", "Rows", "format_table", "template", "write_report"]

EMPTY: Mapping[str, str] = MappingProxyType({})


class Metric(NamedTuple):
    """A column of the report."""

    heading: str
    meaning: str
    """In a sentence."""
    better: Callable[[Iterable[float]], float] | None = max
    """Picks the best of some values, if one can be said to be."""


METRICS = {
    "knn": Metric(
        "k-NN",
        "Share of the test images whose class the 10 nearest training images by cosine vote for.",
    ),
    "knn_standardised": Metric(
        "k-NN, standardised",
        "The same after each feature was given mean 0 and deviation 1.",
    ),
    "linear_probe": Metric(
        "linear probe, best",
        "Test accuracy of a linear classifier on frozen features, the best of its learning rates "
        "and epochs as chosen on the test images: what the paper reports, and optimistic.",
    ),
    "linear_probe_last": Metric(
        "linear probe, last epoch",
        "The same after the last epoch, the best of the learning rates alone.",
    ),
    "low_shot_1": Metric(
        "1-shot",
        "Test accuracy of logistic regression on one image per class, mean and deviation over 10 "
        "draws.",
    ),
    "low_shot_2": Metric("2-shot", "The same with two images per class."),
    "low_shot_5": Metric("5-shot", "The same with five images per class."),
    "kmeans_acc": Metric(
        "k-means ACC, mean",
        "Share of the images in the cluster that is matched to their class, mean and deviation "
        "over 10 runs of k-means with as many clusters as classes.",
    ),
    "kmeans_acc_best": Metric(
        "k-means ACC, best",
        "The same of the run of lowest inertia, which is chosen without labels.",
    ),
    "kmeans_nmi": Metric(
        "NMI", "Normalised mutual information of clusters and classes, mean over the runs."
    ),
    "kmeans_ari": Metric(
        "ARI", "Adjusted Rand index of clusters and classes, 0 by chance, mean over the runs."
    ),
    "kmeans_purity": Metric(
        "purity",
        "Share of the images that are of their cluster's most frequent class, mean over the runs.",
    ),
    "view_agreement": Metric(
        "view agreement",
        "Two random views of each test image: share of the 10 nearest other images that both "
        "views have in common.",
    ),
    "silhouette": Metric(
        "silhouette",
        "How much nearer an image is to its own k-means cluster than to the next one, by cosine: "
        "1 apart, 0 overlapping.",
    ),
    "cluster_smallest": Metric(
        "smallest cluster", "Share of the images in the smallest k-means cluster.", None
    ),
    "cluster_largest": Metric(
        "largest cluster", "Share of the images in the largest k-means cluster.", None
    ),
    "alignment": Metric(
        "alignment",
        "Mean squared distance of an image's two views on the unit sphere, 0 to 4: less is better "
        "at equal uniformity.",
        None,
    ),
    "uniformity": Metric(
        "uniformity",
        "Log of the mean of exp(-2 d^2) over pairs of images, d their distance on the unit sphere, "
        "0 (all equal) to -8: less is more spread, which is better at equal alignment.",
        None,
    ),
}
"""What `evaluate_features` returns."""

Rows = Mapping[str, Mapping[str, float]]
"""A table's values by row name and metric; `<metric>_std` is the spread of `<metric>`."""


def format_table(rows: Rows, show: Callable[[str], str] = printable) -> str:
    """The table with aligned columns, which reads well in a terminal.

    Args:
        rows: the values.
        show: what to make of names; `markdown` makes the whole Markdown.
    """
    keys = _columns(rows)
    lines = [
        [show(name), *(" ".join(_cell(row, key)) for key in keys)] for name, row in rows.items()
    ]
    return tabulate(
        lines,
        headers=["", *(show(_heading(key)) for key in keys)],
        tablefmt="pipe",
        colalign=("left", *("right" for _ in keys)),
        disable_numparse=True,
    )


def write_report(
    out_dir: Path,
    *,
    title: str,
    tables: Mapping[str, Rows],
    figures: Mapping[str, Figure],
    notes: Sequence[str] = (),
    about: Mapping[str, str] = EMPTY,
) -> Path:
    """Write report.json, report.md and report.html.

    The Markdown's pictures lie beside it under figures/, the HTML file carries its own.

    Args:
        out_dir: made if there is none; files of an earlier report are replaced, one by one and each
            as a whole.
        title: heading of the report.
        tables: by heading, in order. Columns are the metrics that some row has, those of METRICS
            first and in its order; a row without one shows a dash.
        figures: by heading, in order.
        notes: paragraphs of plain text before the tables.
        about: by name, what the report says of itself, in plain text.

    Returns:
        The path of report.html.

    Raises:
        ValueError: two figures whose headings give the same file name, or a value that is not
            finite.
    """
    pictures = {heading: _png(figure) for heading, figure in figures.items()}
    files = {heading: f"figures/{_slug(heading)}.png" for heading in figures}
    if len(set(files.values())) < len(files):
        raise ValueError(f"figures: expected distinct headings, got {list(files)}")
    columns = {
        _heading(key): METRICS[key].meaning
        for key in dict.fromkeys(key for rows in tables.values() for key in _columns(rows))
        if key in METRICS
    }
    content = {
        "title": title,
        "about": dict(about),
        "notes": list(notes),
        "tables": {
            heading: {name: dict(row) for name, row in rows.items()}
            for heading, rows in tables.items()
        },
        "columns": columns,
        "figures": files,
    }
    # Not finite means that something upstream failed, and NaN is not JSON.
    document = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    for heading, file in files.items():
        _write(out_dir / file, pictures[heading])
    # Of a name's bytes that are not UTF-8 this makes the escapes that JSON has for them.
    _write(out_dir / "report.json", document.encode(errors="backslashreplace"))
    shared: dict[str, Any] = {"title": title, "about": about, "notes": notes, "columns": columns}
    page = template("report.md.jinja").render(
        tables={heading: format_table(rows, markdown) for heading, rows in tables.items()},
        figures=files,
        **shared,
    )
    _write(out_dir / "report.md", page.encode())
    page = template("report.html.jinja").render(
        tables={heading: _html_table(rows) for heading, rows in tables.items()},
        figures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
        **shared,
    )
    path = out_dir / "report.html"
    _write(path, page.encode())
    return path


def template(name: str) -> Template:
    """Of HTML every text is escaped; both have the filters for names."""
    environment = Environment(
        loader=PackageLoader("maect_fast", "evaluation"),
        autoescape=name.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"printable": printable, "markdown": markdown}
    return environment.get_template(name)


class _Cell(NamedTuple):
    value: str
    spread: str
    is_best: bool


def _html_table(rows: Rows) -> dict[str, Any]:
    """Headings, and by name the cells."""
    keys = _columns(rows)
    lines = {}
    for name, row in rows.items():
        cells = []
        for key in keys:
            value, *spread = _cell(row, key)
            is_best = key in row and row[key] == _best(rows, key)
            cells.append(_Cell(value, "".join(spread), is_best))
        lines[name] = cells
    return {"headings": [_heading(key) for key in keys], "lines": lines}


def _heading(key: str) -> str:
    return METRICS[key].heading if key in METRICS else key


def _columns(rows: Rows) -> list[str]:
    found = dict.fromkeys(key for row in rows.values() for key in row)
    spreads = {f"{key}_std" for key in found}
    others = [key for key in found if key not in METRICS and key not in spreads]
    return [*(key for key in METRICS if key in found), *others]


def _best(rows: Rows, key: str) -> float | None:
    """The best value of a column; None for a single row, or where none can be said to be best."""
    values = [row[key] for row in rows.values() if key in row]
    better = METRICS[key].better if key in METRICS else None
    return better(values) if better is not None and len(values) > 1 else None


def _cell(row: Mapping[str, float], key: str) -> list[str]:
    """The value, and its spread where there is one."""
    if key not in row:
        return ["-"]
    spread = row.get(f"{key}_std")
    return [f"{row[key]:.3f}"] + ([] if spread is None else [f"±{spread:.3f}"])


def _slug(heading: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", heading.lower())
    # A file name has at most 255 bytes.
    return slug[:100].strip("-") or "figure"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A letter that the font lacks is a box, of which there is a warning each.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
