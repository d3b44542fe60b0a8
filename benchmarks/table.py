"""Rows as Markdown that also reads well in a terminal."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from maect_fast.benchmarks.results import (
    FLOORS,
    OURS,
    WIDE,
    Row,
    best_peer,
    by_case,
    device_name,
    provenance,
    timed,
)

__all__ = ["columns_table", "markdown", "reasons", "summary"]

# The time of a call, and that of its kernels alone, which only a GPU has.
CALL, KERNELS = "p50_ms", "graph_ms"
# Heading and cell of what a row of the full table says beside shape, mode and provider.
COLUMNS: dict[str, Callable[[Row, Sequence[Row]], str]] = {
    "p50 (p20-p80), ms": lambda row, case: _spread(row),
    "to best peer": lambda row, case: number(_ratio(row, case, CALL)),
    "kernels, ms": lambda row, case: number(row.graph_ms),
    "kernels to best peer": lambda row, case: number(_ratio(row, case, KERNELS)),
    "GB/s": lambda row, case: number(_on_device(row, row.gbps)),
    "TFLOP/s": lambda row, case: number(_on_device(row, row.tflops)),
    "of floor": lambda row, case: _percent(row.of_floor),
    "peak, MiB": lambda row, case: number(row.peak_mib),
}


def markdown(rows: Sequence[Row]) -> str:
    """Every measurement: one table per op and dtype, one line per shape, mode and provider.

    "to best peer" is the time over that of the fastest other provider than ours: below 1 is faster.
    "of floor" is the least time the machine's measured rates allow over the time. Who has no time
    is named with the reason below the table.
    """
    tables = defaultdict(list)
    for case in by_case(rows):
        tables[case[0].op, case[0].dtype].append(case)
    parts = [_floors(rows)]
    for (op, dtype), cases in tables.items():
        members = [row for case in cases for row in case]
        parts.append(f"### {op}, {dtype}\n\n{device_name(members)}; {provenance(members)}.")
        parts.append(columns_table(["shape", "mode", "provider", *COLUMNS], _lines(cases), left=3))
        parts += [_legend(members), _notes(members, "provider")]
    return "\n\n".join(filter(None, parts))


def summary(rows: Sequence[Row]) -> str:
    """One line per op, dtype, shape and mode: ours beside the best peer, calls and kernels."""
    header = ["op", "dtype", "shape", "mode", "best peer", "its ms", f"{OURS}, ms", "to best peer"]
    header += ["best peer's kernels", "their ms", f"{OURS}, kernels, ms", "kernels to best peer"]
    lines = []
    for case in by_case(rows):
        first = case[0]
        ours = first if first.provider == OURS else None
        line = [f"`{first.op}`", first.dtype, first.shape, first.mode]
        for time in (CALL, KERNELS):
            peer = best_peer(case, time)
            line += [peer.provider, number(getattr(peer, time))] if peer else ["", ""]
            text = number(getattr(ours, time)) if ours else ""
            line.append(f"{text} wide" if time == CALL and ours and ours.is_wide else text)
            line.append(number(_ratio(ours, case, time)) if ours else "")
        lines.append([*line, _percent(ours.of_floor) if ours else ""])
    ours_rows = [row for row in rows if row.provider == OURS]
    table = columns_table([*header, "of floor"], lines, left=5)
    return "\n\n".join(filter(None, [table, _legend(ours_rows), _notes(ours_rows, "op")]))


def reasons(rows: Sequence[Row]) -> str:
    """Who has no time, and why."""
    return _notes(rows, "provider")


def number(value: float | None) -> str:
    """Three digits, which is what a repeated measurement agrees on; "" if there is none."""
    if value is None:
        return ""
    return f"{value:#.3g}" if 0 < value < 99.95 else f"{value:,.0f}"


def _lines(cases: Iterable[Sequence[Row]]) -> list[list[str]]:
    lines = []
    for case in cases:
        for row in timed(case):
            cells = (cell(row, case) for cell in COLUMNS.values())
            lines.append([row.shape, row.mode, row.provider, *cells])
    return lines


def columns_table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """Aligned Markdown; columns without a value are left out, the first `left` are text."""
    used = [i for i in range(len(header)) if i < left or any(line[i] for line in lines)]
    columns = []
    for i in used:
        width = max(3, *(len(line[i]) for line in (header, *lines)))
        rule = "-" * width if i < left else "-" * (width - 1) + ":"
        align = "<" if i < left else ">"
        cells = (header[i], rule, *(line[i] for line in lines))
        columns.append([f"{cell:{align}{width}}" for cell in cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True))


def _notes(rows: Iterable[Row], column: str) -> str:
    """Every reason once per value of the column, with the modes and shapes it concerns."""
    concerned = defaultdict(list)
    for row in rows:
        if row.reason:
            concerned[getattr(row, column), row.reason].append(row)
    lines = []
    for (name, reason), members in concerned.items():
        modes = ", ".join(dict.fromkeys(row.mode for row in members))
        shapes = list(dict.fromkeys(row.shape for row in members))
        where = shapes[0] if len(shapes) == 1 else f"{len(shapes)} shapes"
        lines.append(f"* {name}: {reason} ({modes}; {where})")
    return "\n".join(lines)


def _floors(rows: Sequence[Row]) -> str:
    """The machine's measured rates in one line."""
    rates = []
    for row in rows:
        if row.op == FLOORS:
            rate = f"{number(row.tflops)} TFLOP/s" if row.tflops else f"{number(row.gbps)} GB/s"
            rates.append(" ".join(filter(None, [row.provider, row.dtype, rate])))
    return f"Measured rates of the machine: {', '.join(rates)}." if rates else ""


def _legend(rows: Iterable[Row]) -> str:
    """What the table's words mean, as far as they occur in it."""
    rows = timed(rows)
    lines = []
    if any(row.graph_ms is not None for row in rows):
        lines.append(
            "p50 and ms: an eager call, host included. Kernels: the same call replayed as a CUDA "
            'graph; rates and "of floor" are theirs where they are known.'
        )
    if any(row.is_wide for row in rows):
        lines.append(f"wide: from p20 to p80 it is more than {WIDE:.0%} of p50; measure again.")
    return "\n".join(lines)


def _spread(row: Row) -> str:
    wide = " wide" if row.is_wide else ""
    return f"{number(row.p50_ms)} ({number(row.p20_ms)}-{number(row.p80_ms)}){wide}"


def _on_device(row: Row, rate: float | None) -> float | None:
    """A rate of the call as one of its kernels."""
    return rate * row.p50_ms / row.kernels_ms if rate and row.p50_ms and row.kernels_ms else rate


def _ratio(row: Row, case: Sequence[Row], time: str) -> float | None:
    peer = best_peer(case, time)
    own, best = getattr(row, time), getattr(peer, time, None)
    return own / best if own and best else None


def _percent(fraction: float | None) -> str:
    return f"{fraction:.0%}" if fraction else ""
