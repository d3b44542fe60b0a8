"""Pictures of a device's results, drawn from its CSV files alone.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; a provider looks the same in
every picture. Figures are made without pyplot, so no display is needed.
"""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maect_fast.benchmarks.results import (
    FLOORS,
    OURS,
    Row,
    best_peer,
    by_case,
    device_name,
    provenance,
    read_folder,
    timed,
)
from maect_fast.benchmarks.table import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

FLOOR = "floor"
BLACK, GREY, ORANGE, SKY, GREEN = "#000000", "#999999", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"

# Colour and marker, in the order of bars and legends. There are more providers than colours: those
# of one family, and those that never meet in one op, share one.
STYLES = {
    OURS: (VERMILION, "o"),
    f"{OURS} int8": (VERMILION, "s"),
    f"{OURS} fp32": (VERMILION, "^"),
    "eager": (BLACK, "s"),
    "official": (GREY, "D"),
    "torch.compile": (ORANGE, "^"),
    "SDPA": (BLUE, "v"),
    "SDPA flash": (SKY, "<"),
    "SDPA efficient": (SKY, ">"),
    "SDPA cuDNN": (BLUE, "p"),
    "SDPA math": (BLUE, "d"),
    "FlexAttention": (PURPLE, "P"),
    "xformers": (GREEN, "X"),
    "flash-attn": (YELLOW, "*"),
    "faiss-cpu": (GREEN, "v"),
    "faiss-gpu": (SKY, "v"),
    "Liger": (GREEN, "P"),
    "cut-cross-entropy": (PURPLE, "X"),
    "linear_cross_entropy": (BLUE, "v"),
    FLOOR: (BLACK, ""),
}
UNKNOWN = ("#666666", "h")
OP_MARKERS = "osD^vPX*"

# The sizes that scaling curves run over, and what they are in each op.
SCALED = ("N", "Q", "B")
WORDS = {
    ("masked_attention", "N"): "tokens N",
    ("masked_attention", "B"): "sequences B",
    ("queue_topk", "Q"): "queue entries Q",
    ("queue_topk", "B"): "queries B",
    ("info_nce", "N"): "gathered predictions N",
    ("info_nce", "B"): "rows per view B",
    ("mae_tokens", "N"): "kept patches N",
    ("mae_tokens", "B"): "images B",
}
MAX_ACROSS = 4
# Beside a bar, and on white where the floor's line would cross it.
LABEL: dict[str, Any] = {
    "xytext": (3, 0),
    "textcoords": "offset points",
    "verticalalignment": "center",
    "size": 7,
    "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
}

Case = list[Row]
Place = tuple[str, str]
"""A panel's title, the same for all modes, and the mode."""


def draw(folder: Path, out: Path) -> list[Path]:
    """Write <op>_<dtype>_bars.png, <op>_scaling.png and roofline.png of a device's folder to `out`.

    A picture for which there are no rows is not drawn.

    Raises:
        ValueError: the folder has no rows.
        ModuleNotFoundError: matplotlib is missing.
    """
    rows = read_folder(folder)
    cases = [case for case in by_case(rows) if timed(case)]
    figures = {}
    for op in dict.fromkeys(case[0].op for case in cases):
        members = [case for case in cases if case[0].op == op]
        # With two dtypes in it a picture of bars would be too tall to read.
        for dtype in dict.fromkeys(case[0].dtype for case in members):
            same = [case for case in members if case[0].dtype == dtype]
            figures[f"{op}_{dtype}_bars"] = _bars(same)
        if curves := _curves(members):
            figures[f"{op}_scaling"] = _scaling(curves)
    rates = [row for row in rows if row.op == FLOORS]
    contests = [contest for case in cases if (contest := _contest(case))]
    if rates and contests:
        figures["roofline"] = _roofline(rates, contests)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png")
    return [out / f"{name}.png" for name in figures]


def _bars(cases: Sequence[Case]) -> "Figure":
    """One panel per shape and mode, one bar per provider."""
    providers = _providers(cases)
    panels = {_place(case[0], case[0].shape): case for case in cases}
    figure, axes = _grid(panels, height=0.5 + 0.16 * len(providers))
    lines = set()
    for place, case in panels.items():
        line = axes[place].get_position().y0
        _bar_panel(axes[place], case, providers, names=line not in lines)
        lines.add(line)
    looks = {"p20 to p80": {"color": BLACK, "linewidth": 1}, FLOOR: _look(FLOOR)}
    _caption(figure, cases, "median time of a call in ms, host included", looks)
    return figure


def _bar_panel(ax: "Axes", case: Case, providers: Sequence[str], *, names: bool) -> None:
    ax.set_xlim(0, 1.3 * max(row.p80_ms or row.p50_ms or 0 for row in case))  # room for labels
    ax.locator_params(axis="x", nbins=5)
    ax.set_ylim(len(providers) - 0.5, -0.5)
    ax.set_yticks(range(len(providers)), providers if names else [""] * len(providers))
    ax.tick_params(axis="y", length=0)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == OURS else "normal")
    if case[0].floor_ms:
        ax.axvline(case[0].floor_ms, color=BLACK, linewidth=0.8, linestyle="--")
    for row in case:
        if row.provider not in providers:
            continue
        y, end = providers.index(row.provider), row.p50_ms or 0
        text = number(row.p50_ms) or textwrap.shorten(row.reason, 36, placeholder=" …")
        if row.p50_ms:
            low, high = row.p20_ms or end, row.p80_ms or end
            alpha = 1 if row.provider == OURS else 0.5
            ax.barh(y, end, height=0.7, color=_look(row.provider)["color"], alpha=alpha)
            ax.hlines(y, low, high, BLACK, linewidth=1)
            end = max(end, high)
        ax.annotate(text, (end, y), **LABEL, color=BLACK if row.p50_ms else "#666666")


def _curves(cases: Sequence[Case]) -> dict[Place, tuple[str, list[Case]]]:
    """Cases that differ in one size only, and the letter of that size: a panel each."""
    curves: dict[Place, tuple[str, list[Case]]] = {}
    for letter, case in product(SCALED, cases):
        row = case[0]
        if letter in row.sizes:
            fixed = " ".join(f"{x}{size}" for x, size in row.sizes.items() if x != letter)
            curves.setdefault(_place(row, fixed), (letter, []))[1].append(case)
    return {place: curve for place, curve in curves.items() if len(curve[1]) > 1}


def _scaling(curves: Mapping[Place, tuple[str, list[Case]]]) -> "Figure":
    """Time over one size, all others fixed within a panel; one line per provider."""
    figure, axes = _grid(curves, height=2.3)
    for place, (letter, cases) in curves.items():
        _scaling_panel(axes[place], letter, cases)
    cases = [case for _, members in curves.values() for case in members]
    looks = {name: _look(name) for name in (*_providers(cases), FLOOR)}
    _caption(figure, cases, "median time of a call in ms, host included", looks)
    return figure


def _scaling_panel(ax: "Axes", letter: str, cases: Sequence[Case]) -> None:
    sizes = [case[0].sizes[letter] for case in cases]
    ms = [{FLOOR: case[0].floor_ms, **{row.provider: row.p50_ms for row in case}} for case in cases]
    for name in (FLOOR, *reversed(_providers(cases))):  # ours last, on top
        # A size without a time interrupts the line.
        ax.plot(sizes, [times.get(name) or math.nan for times in ms], **_look(name))
    _log_axes(ax, "ms")
    ax.set_xticks(sizes, [_short(size) for size in sizes])
    ax.set_xlabel(WORDS.get((cases[0][0].op, letter), letter), size=8)


def _contest(case: Case) -> Case:
    """The best peer, then ours, as far as their rates are known."""
    rivals = [best_peer(case), *(row for row in timed(case) if row.provider == OURS)]
    return [row for row in rivals if row and row.gbps and row.tflops]


def _roofline(rates: Sequence[Row], contests: Sequence[Case]) -> "Figure":
    """Rate over arithmetic intensity, ours joined to the best peer; one panel per dtype."""
    panels = defaultdict(list)
    for contest in contests:
        panels[contest[0].dtype, ""].append(contest)
    figure, axes = _grid(panels, height=3.8, width=5.4)
    markers = dict(zip(sorted({contest[0].op for contest in contests}), OP_MARKERS, strict=False))
    for (dtype, _), members in panels.items():
        ax = axes[dtype, ""]
        for contest in members:
            _contest_line(ax, contest, markers[contest[0].op])
        _roof(ax, rates, dtype)
    looks = {name: {"color": _look(name)["color"], "linewidth": 4} for name in _providers(contests)}
    outline = {"color": "white", "markeredgecolor": BLACK}
    looks |= {op: {**outline, "marker": marker} for op, marker in markers.items()}
    _caption(figure, contests, "ours and the best peer of each shape and mode", looks)
    return figure


def _contest_line(ax: "Axes", contest: Case, marker: str) -> None:
    """Points at the formula's FLOPs per byte, joined: the same work at two rates."""
    points = [(1e3 * (row.tflops or 0) / (row.gbps or 1), row.tflops or 0) for row in contest]
    ax.plot(*zip(*points, strict=True), color=GREY, linewidth=0.6)
    for row, (x, y) in zip(contest, points, strict=True):
        style = {"color": _look(row.provider)["color"], "markeredgecolor": "white"}
        ax.plot(x, y, marker, markersize=6, markeredgewidth=0.5, **style)


def _roof(ax: "Axes", rates: Sequence[Row], dtype: str) -> None:
    """The bandwidth's slope up to the dtype's matrix rate, with the knee well inside."""
    bandwidth = max(row.gbps or 0 for row in rates)
    peak = max((row.tflops or 0 for row in rates if row.dtype == dtype), default=0)
    _log_axes(ax, "TFLOP/s")
    ax.set_xlabel("FLOPs per byte", size=8)
    if bandwidth and peak:
        left, right = ax.get_xlim()
        knee = 1e3 * peak / bandwidth
        x = [min(left, knee / 4), knee, max(right, knee * 4)]
        ax.plot(x, [x[0] * bandwidth / 1e3, peak, peak], color=BLACK, linewidth=1)
        rate = f"measured {number(bandwidth)} GB/s and {number(peak)} TFLOP/s"
        ax.set_title(f"{dtype}, {rate}", size=8)


def _log_axes(ax: "Axes", label: str) -> None:
    """Both logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ax.set(xscale="log", yscale="log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    ax.set_ylabel(label, size=8)
    ax.grid(alpha=0.25)


def _grid(
    places: Iterable[Place], *, height: float, width: float = 2.6
) -> tuple["Figure", dict[Place, "Axes"]]:
    """Titled panels; the modes of a title stand side by side, titles as many as fit."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        message = "pictures need matplotlib: pip install matplotlib"
        raise ModuleNotFoundError(message, name="matplotlib") from None
    places = list(places)
    titles = dict.fromkeys(title for title, _ in places)
    modes = dict.fromkeys(mode for _, mode in places)
    across = len(modes) * max(1, min(MAX_ACROSS // len(modes), len(titles)))
    cells = list(product(titles, modes))
    down = math.ceil(len(cells) / across)
    size = (width * across + 1.2, height * down + 0.8)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = dict(zip(cells, figure.subplots(down, across, squeeze=False).flat, strict=False))
    for ax in figure.axes:
        ax.set_axis_off()
    for title, mode in places:
        ax = axes[title, mode]
        ax.set_axis_on()
        ax.set_title(", ".join(filter(None, [title, mode])), size=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(which="both", labelsize=7)
    return figure, axes


def _caption(
    figure: "Figure", cases: Iterable[Case], what: str, looks: Mapping[str, Mapping[str, Any]]
) -> None:
    """Op and device above the panels; what is shown, where it comes from and the legend below."""
    from matplotlib.lines import Line2D

    rows = [row for case in cases for row in timed(case)]
    ops = dict.fromkeys(row.op for row in rows)
    figure.suptitle(f"{', '.join(ops)} on {device_name(rows)}", size=11)
    legend = figure.legend(
        [Line2D([], [], **look) for look in looks.values()],
        looks,
        title=f"{what}\n{provenance(rows)}",
        loc="outside lower center",
        ncols=int(figure.get_figwidth() // 1.7),
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    legend.get_title().set_multialignment("center")


def _place(row: Row, sizes: str) -> Place:
    return f"{row.dtype}, {sizes}", row.mode


def _look(name: str) -> dict[str, Any]:
    """How the lines of a provider, or of the floor, look."""
    colour, marker = STYLES.get(name, UNKNOWN)
    return {
        "color": colour,
        "marker": marker,
        "markersize": 4,
        "linewidth": 2 if name == OURS else 1,
        "linestyle": "--" if name == FLOOR else "-",
    }


def _providers(cases: Iterable[Case]) -> list[str]:
    """Ours, even if it never passed, and who has a time, in the order of legends."""
    rows = [row for case in cases for row in case if row.p50_ms or row.provider == OURS]
    order = [*STYLES]
    return sorted(
        dict.fromkeys(row.provider for row in rows),
        key=lambda name: order.index(name) if name in STYLES else len(order),
    )


def _short(size: int) -> str:
    """Powers of two as one writes them: 64k, 1M."""
    for unit, letter in ((2**20, "M"), (2**10, "k")):
        if size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)
