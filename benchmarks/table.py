"""Rows as Markdown that also reads well in a terminal."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from maect_fast.benchmarks.results import (
    FLOORS,
    OURS,
    Row,
    best_peer,
    by_case,
    device_name,
    provenance,
    timed,
)

__all__ = ["markdown", "summary"]

# Heading and cell of what a row of the full table says beside shape, mode and provider.
COLUMNS: dict[str, Callable[[Row, Row | None], str]] = {
    "p50 (p20-p80), ms": lambda row, peer: _spread(row),
    "GB/s": lambda row, peer: number(row.gbps),
    "TFLOP/s": lambda row, peer: number(row.tflops),
    "of floor": lambda row, peer: _percent(row.of_floor),
    "to best peer": lambda row, peer: number(_ratio(row, peer)),
    "peak, MiB": lambda row, peer: number(row.peak_mib),
    "graph, ms": lambda row, peer: number(row.graph_ms),
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
        parts.append(_table(["shape", "mode", "provider", *COLUMNS], _lines(cases), left=3))
        parts.append(_notes(members, "provider"))
    return "\n\n".join(filter(None, parts))


def summary(rows: Sequence[Row]) -> str:
    """One line per op, dtype, shape and mode: ours beside the best peer."""
    header = ["op", "dtype", "shape", "mode", "best peer", "its ms", f"{OURS}, ms"]
    header += ["to best peer", "of floor"]
    lines = []
    for case in by_case(rows):
        first, peer = case[0], best_peer(case)
        ours = first if first.provider == OURS else None
        line = [f"`{first.op}`", first.dtype, first.shape, first.mode]
        line += [peer.provider, number(peer.p50_ms)] if peer else ["", ""]
        line += [number(ours.p50_ms), number(_ratio(ours, peer))] if ours else ["", ""]
        lines.append([*line, _percent(ours.of_floor) if ours else ""])
    notes = _notes([row for row in rows if row.provider == OURS], "op")
    return "\n\n".join(filter(None, [_table(header, lines, left=5), notes]))


def number(value: float | None) -> str:
    """Three digits, which is what a repeated measurement agrees on; "" if there is none."""
    if value is None:
        return ""
    return f"{value:#.3g}" if 0 < value < 99.95 else f"{value:,.0f}"


def _lines(cases: Iterable[Sequence[Row]]) -> list[list[str]]:
    lines = []
    for case in cases:
        peer = best_peer(case)
        for row in timed(case):
            cells = (cell(row, peer) for cell in COLUMNS.values())
            lines.append([row.shape, row.mode, row.provider, *cells])
    return lines


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
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


def _spread(row: Row) -> str:
    return f"{number(row.p50_ms)} ({number(row.p20_ms)}-{number(row.p80_ms)})"


def _ratio(row: Row, peer: Row | None) -> float | None:
    return row.p50_ms / peer.p50_ms if peer and row.p50_ms and peer.p50_ms else None


def _percent(fraction: float | None) -> str:
    return f"{fraction:.0%}" if fraction else ""
