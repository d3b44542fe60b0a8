"""One report as JSON for programs, Markdown for terminals, and one HTML file that can be mailed."""

import base64
import html
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from maect_fast.checkpoint import write_atomically
from maect_fast.names import markdown, printable

__all__ = ["METRICS", "Rows", "format_table", "write_report"]

METRICS = {
    "knn": "k-NN",
    "knn_standardised": "k-NN, standardised",
    "linear_probe": "linear probe",
    "linear_probe_last": "linear probe, last epoch",
    "low_shot_1": "1-shot",
    "low_shot_2": "2-shot",
    "low_shot_5": "5-shot",
    "kmeans_acc": "k-means ACC",
    "kmeans_nmi": "NMI",
    "kmeans_ari": "ARI",
}
"""Column headings of the metrics that `evaluate_features` returns; in each, more is better."""

CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #222; }
.spread { color: #666; font-size: .85em; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
"""


Rows = Mapping[str, Mapping[str, float]]
"""A table's values by row name and metric; `<metric>_std` is the spread of `<metric>`."""


def format_table(rows: Rows, show: Callable[[str], str] = printable) -> str:
    """The table with aligned columns, which reads well in a terminal.

    Args:
        rows: the values.
        show: what to make of names; `markdown` makes the whole Markdown.
    """
    keys = _columns(rows)
    lines = [["", *(show(METRICS.get(key, key)) for key in keys)]]
    for name, row in rows.items():
        lines.append([show(name), *(" ".join(_cell(row, key)) for key in keys)])
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(keys) + 1)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    text = []
    for line in (lines[0], rule, *lines[1:]):
        first = line[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append(f"| {' | '.join([first, *rest])} |")
    return "\n".join(text)


def write_report(
    out_dir: Path,
    *,
    title: str,
    tables: Mapping[str, Rows],
    figures: Mapping[str, Figure],
    notes: Sequence[str] = (),
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
        notes: paragraphs of plain text after the tables.

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
    content = {
        "title": title,
        "tables": {
            heading: {name: dict(row) for name, row in rows.items()}
            for heading, rows in tables.items()
        },
        "notes": list(notes),
        "figures": files,
    }
    # Not finite means that something upstream failed, and NaN is not JSON.
    document = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    for heading, file in files.items():
        _write(out_dir / file, pictures[heading])
    # Of a name's bytes that are not UTF-8 this makes the escapes that JSON has for them.
    _write(out_dir / "report.json", document.encode(errors="backslashreplace"))
    _write(out_dir / "report.md", _markdown(title, tables, files, notes).encode())
    path = out_dir / "report.html"
    _write(path, _html(title, tables, pictures, notes).encode())
    return path


def _markdown(
    title: str, tables: Mapping[str, Rows], files: Mapping[str, str], notes: Sequence[str]
) -> str:
    parts = [f"# {markdown(title)}"]
    for heading, rows in tables.items():
        parts += [f"## {markdown(heading)}", format_table(rows, markdown)]
    parts += [markdown(note) for note in notes]
    for heading, file in files.items():
        parts += [f"## {markdown(heading)}", f"![{markdown(heading)}]({file})"]
    return "\n\n".join(parts) + "\n"


def _html(
    title: str, tables: Mapping[str, Rows], pictures: Mapping[str, bytes], notes: Sequence[str]
) -> str:
    parts = [f"<h1>{_escaped(title)}</h1>"]
    for heading, rows in tables.items():
        parts += [f"<h2>{_escaped(heading)}</h2>", _html_table(rows)]
    parts += [f"<p>{_escaped(note)}</p>" for note in notes]
    for heading, png in pictures.items():
        name = _escaped(heading)
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        parts += [f"<h2>{name}</h2>", f'<figure><img alt="{name}" src="{source}"></figure>']
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _escaped(name: str) -> str:
    return html.escape(printable(name))


def _html_table(rows: Rows) -> str:
    keys = _columns(rows)
    head = "".join(f"<th>{_escaped(METRICS.get(key, key))}</th>" for key in keys)
    lines = [f"<thead><tr><th></th>{head}</tr></thead><tbody>"]
    for name, row in rows.items():
        cells = []
        for key in keys:
            value, *spread = _cell(row, key)
            if key in row and row[key] == _best(rows, key):
                value = f"<strong>{value}</strong>"
            if spread:
                value += f' <span class="spread">{spread[0]}</span>'
            cells.append(f"<td>{value}</td>")
        lines.append(f"<tr><td>{_escaped(name)}</td>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</tbody></table></div>'


def _columns(rows: Rows) -> list[str]:
    found = dict.fromkeys(key for row in rows.values() for key in row)
    spreads = {f"{key}_std" for key in found}
    others = [key for key in found if key not in METRICS and key not in spreads]
    return [*(key for key in METRICS if key in found), *others]


def _best(rows: Rows, key: str) -> float | None:
    """The highest value of a column; None for a single row, or where more may not be better."""
    values = [row[key] for row in rows.values() if key in row]
    return max(values) if key in METRICS and len(values) > 1 else None


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
