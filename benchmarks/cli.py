"""The command line of the benchmarks: `maect-fast bench` and `python -m benchmarks`."""

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import torch

from maect_fast.benchmarks.base import compare
from maect_fast.benchmarks.check import check, own_call
from maect_fast.benchmarks.figures import draw
from maect_fast.benchmarks.ops import OPS
from maect_fast.benchmarks.registry import OURS, Op, Sizes
from maect_fast.benchmarks.results import (
    FLOORS,
    Row,
    append_rows,
    best_peer,
    by_case,
    device_folder,
    read_folder,
)
from maect_fast.benchmarks.run import floor_rows, measure_op
from maect_fast.benchmarks.table import markdown, reasons, summary
from maect_fast.benchmarks.trace import trace_op
from maect_fast.benchmarks.warm import compile_ahead
from maect_fast.errors import Parser

__all__ = ["main"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = """\
examples:
  maect-fast bench                                      every op at this device's shapes
  maect-fast bench --op masked_attention --set quick    a first look
  maect-fast bench --op queue_topk --shape B=512,Q=65536,D=256,K=20 --provider maect-fast eager
  maect-fast bench --base HEAD~1 --op info_nce          ours beside another commit's
  maect-fast bench table runs/bench/<device>            the results as Markdown
  maect-fast bench plot runs/bench/<device>             the pictures again, from the CSV files
  maect-fast bench step --recipe digits                 images/s and MFU of training updates
  maect-fast bench loader --recipe l16 data.root=DIR    images/s of loading, and what limits them
  maect-fast bench check                                is every op right on this device?
  maect-fast bench trace --op masked_attention          what an op launches
"""


def main(arguments: Sequence[str] | None = None, *, prog: str = "maect-fast bench") -> int:
    """Run one command; 1 where our own op failed its gate, 2 for a usage error."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "check": _check,
        "trace": _trace,
        "plot": _plot,
        "table": _table,
        "step": _step,
        "host": _host,
        "loader": _loader,
    }
    try:
        if words and words[0] in commands:
            return commands[words[0]](words[1:])
        return _bench(words, prog)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # What has been measured is in the files.
        print(f"{prog}: interrupted", file=sys.stderr)
        return 130


def _bench(words: Sequence[str], prog: str) -> int:
    options = _parser(prog).parse_args(words)
    if options.base is not None:
        return _base(words, options)
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    device = _device(options.device)
    dtypes = [DTYPES[name] for name in options.dtype or [_default_dtype(device)]]
    # Before anything is measured, because a wrong shape is told at once.
    plan = _plan(options, device)
    folder = options.out / device_folder(device)
    deadline = time.monotonic() + 60 * options.minutes

    modes = {op.name: _chosen(options.mode, op.modes) for op, _ in plan}
    compile_ahead(
        (
            own_call(op, sizes, mode, dtype, device)
            for dtype in dtypes
            for op, sizes in plan
            for mode in modes[op.name]
        ),
        device,
        _report,
    )
    rows: list[Row] = []
    for dtype in dtypes:
        for op, sizes in plan:
            if time.monotonic() > deadline:
                _report(f"left out after {options.minutes:g} minutes: {op.name} {dict(sizes)}")
                continue
            if not rows:
                rows = floor_rows(dtypes, device)
                append_rows(folder / f"{FLOORS}.csv", rows)
                _report(f"{folder.name}: " + ", ".join(_rate(row) for row in rows))
            providers = _chosen(options.provider, op.providers)
            every = measure_op(op, sizes, dtype, device, modes=modes[op.name], providers=providers)
            for _, rows_of_mode in groupby(every, key=lambda row: row.mode):
                measured = list(rows_of_mode)
                # After every mode, so that an interrupted run keeps what it has.
                append_rows(folder / f"{op.name}.csv", measured)
                rows += measured
                _report(_line(by_case(measured)[0]))
    if not rows:
        return 0
    print(summary(rows))
    if missing := reasons([row for row in rows if row.provider != OURS]):
        print(f"\nWithout a time:\n{missing}")
    try:
        draw(folder, folder)
        _report(f"results and pictures are in {folder}")
    except ModuleNotFoundError as error:
        _report(f"results are in {folder}; {error}")
    return 1 if any(row.provider == OURS and row.reason for row in rows) else 0


def _base(words: Sequence[str], options: argparse.Namespace) -> int:
    """The same for two commits in turn."""
    # A wrong shape is told before anything is built.
    _plan(options, _device(options.device))
    print(compare(options.base, words, _report))
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [options] | check | trace | step | plot FOLDER | table FOLDER",
        description="Time the ops beside their peers and beside what this device can do at best. "
        "A program whose results are wrong gets no time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), help="default: all")
    parser.add_argument("--set", metavar="NAME", help="a list of shapes; default: this device's")
    parser.add_argument(
        "--shape", nargs="+", metavar="B=..,N=..", help="own shapes, with one --op, for --set"
    )
    modes = dict.fromkeys(mode for op in OPS.values() for mode in op.modes)
    parser.add_argument("--mode", nargs="+", choices=tuple(modes), help="default: all")
    parser.add_argument(
        "--dtype", nargs="+", choices=tuple(DTYPES), help="default: CPU fp32, GPU bf16"
    )
    providers = dict.fromkeys(name for op in OPS.values() for name in op.providers)
    parser.add_argument(
        "--provider",
        nargs="+",
        metavar="P",
        choices=tuple(providers),
        help=f"some of: {', '.join(providers)}; default: all that are there",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if any")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start no new shape after this long"
    )
    parser.add_argument(
        "--base",
        metavar="REV",
        help="only ours, beside another commit of this checkout: both in turn, and the ratio",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        help="default: runs/bench; in it a folder "
        "per device, with a CSV file per op and the pictures",
    )
    return parser


def _plan(options: argparse.Namespace, device: torch.device) -> list[tuple[Op[Any], Sizes]]:
    """Ops in turn, so that a run of limited time has the first shapes of all."""
    shapes = {name: _shapes(options, name, device) for name in options.op or OPS}
    rounds = zip_longest(*shapes.values())
    return [
        (OPS[name], sizes)
        for sizes_by_op in rounds
        for name, sizes in zip(shapes, sizes_by_op, strict=True)
        if sizes is not None
    ]


def _shapes(options: argparse.Namespace, name: str, device: torch.device) -> Sequence[Sizes]:
    op = OPS[name]
    if options.shape is None:
        chosen = options.set or device.type
        if chosen not in op.sizes:
            # Only some ops have a list of this name.
            if any(chosen in other.sizes for other in OPS.values()) and options.op is None:
                return ()
            raise ValueError(f"--set: expected one of {', '.join(op.sizes)}, got {chosen}")
        return op.sizes[chosen]
    if options.op is None or len(options.op) > 1:
        raise ValueError("--shape: expected exactly one --op with it")
    return [_parse_shape(text, op.letters) for text in options.shape]


def _parse_shape(text: str, letters: str) -> Sizes:
    """B=4,N=197,... to sizes, in the op's order of letters."""
    found = {}
    for part in text.split(","):
        letter, _, size = part.partition("=")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"--shape: expected LETTER=SIZE, got {part!r}")
        found[letter.strip()] = int(size)
    if sorted(found) != sorted(letters):
        expected = ",".join(f"{letter}=.." for letter in letters)
        raise ValueError(f"--shape: expected {expected}, got {text}")
    return {letter: found[letter] for letter in letters}


def _chosen(wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """The wanted of an op's own; all by default."""
    return [name for name in known if wanted is None or name in wanted]


def _device(name: str | None) -> torch.device:
    """The named device; by default the GPU, if any."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: expected cpu, got cuda, which torch does not find here")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _default_dtype(device: torch.device) -> str:
    return "bf16" if device.type == "cuda" else "fp32"


def _check(words: Sequence[str]) -> int:
    parser = Parser(
        prog="maect-fast bench check", description="Run every op against its definition in fp64."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if any")
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), default=tuple(OPS))
    options = parser.parse_args(words)
    all_right = True
    tell = partial(print, flush=True)
    for line, right in check(_device(options.device), options.op, tell):
        tell(line)
        all_right &= right
    return 0 if all_right else 1


def _trace(words: Sequence[str]) -> int:
    parser = Parser(
        prog="maect-fast bench trace",
        description="Profile our ops, by default at the first of this device's shapes: a table of "
        "what they launch, and a Chrome trace per op and mode.",
    )
    parser.add_argument("--op", nargs="+", choices=tuple(OPS), help="default: all")
    parser.add_argument("--shape", metavar="B=..,N=..", help="an own shape, with one --op")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, if any")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: CPU fp32, GPU bf16")
    parser.add_argument("--out", type=Path, default=Path("runs/trace"), help="default: runs/trace")
    options = parser.parse_args(words)
    device = _device(options.device)
    dtype = DTYPES[options.dtype or _default_dtype(device)]
    if options.shape is not None and len(options.op or OPS) > 1:
        raise ValueError("--shape: expected exactly one --op with it")
    for name in options.op or OPS:
        op = OPS[name]
        sizes = op.sizes[device.type][0]
        if options.shape is not None:
            sizes = _parse_shape(options.shape, op.letters)
        print(trace_op(op, sizes, dtype, device, out=options.out))
    return 0


def _plot(words: Sequence[str]) -> int:
    parser = Parser(prog="maect-fast bench plot", description=draw.__doc__)
    parser.add_argument("folder", type=Path, help="results of a device: CSV files")
    parser.add_argument("--out", type=Path, help="default: the same folder")
    options = parser.parse_args(words)
    for path in draw(options.folder, options.out or options.folder):
        print(path)
    return 0


def _table(words: Sequence[str]) -> int:
    parser = Parser(
        prog="maect-fast bench table", description="Print a device's results as Markdown."
    )
    parser.add_argument("folder", type=Path, help="results of a device: CSV files")
    parser.add_argument(
        "--summary", action="store_true", help="only ours and the best peer of each shape"
    )
    options = parser.parse_args(words)
    rows = read_folder(options.folder)
    print(summary(rows) if options.summary else markdown(rows))
    return 0


def _host(words: Sequence[str]) -> int:
    from maect_fast.benchmarks import host

    return host.main(words)


def _step(words: Sequence[str]) -> int:
    # It needs the front end and its packages.
    from maect_fast.benchmarks import step

    return step.main(words)


def _loader(words: Sequence[str]) -> int:
    from maect_fast.benchmarks import loader

    return loader.main(words)


def _line(rows: Sequence[Row]) -> str:
    """One measurement in words, as progress."""
    first = rows[0]
    ours = next((row for row in rows if row.provider == OURS), None)
    parts = [f"{first.op} {first.dtype} {first.shape} {first.mode}:"]
    if ours is not None and ours.p50_ms is None:
        parts.append(ours.reason)
    for column, words in (("p50_ms", ""), ("graph_ms", "kernels ")):
        peer, own = best_peer(rows, column), getattr(ours, column, None)
        if own is not None:
            parts.append(f"{words}{own:.3g} ms")
        if peer is not None:
            parts.append(f"(best peer {peer.provider} {getattr(peer, column):.3g} ms)")
    return " ".join(parts)


def _rate(row: Row) -> str:
    rate = f"{row.gbps:.4g} GB/s" if row.gbps else f"{row.tflops:.3g} TFLOP/s"
    return " ".join(filter(None, [row.provider, row.dtype, rate]))


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
