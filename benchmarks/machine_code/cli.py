"""Compile every registered Triton kernel for sm_80 and sm_90; refuse what breaks its limits.

First the controls: launches that must pass and launches that must be refused. No GPU is needed.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from maect_fast import kernels
from maect_fast.kernels._common.gpu import nearest_table
from maect_fast.kernels._common.launch import Launch

__all__ = ["launches_for", "main", "registered"]

KERNELS = Path(kernels.__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when something is refused, 2 when nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.machine_code", description=__doc__)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument(
        "--module",
        nargs="+",
        metavar="NAME",
        help="modules with a machine_code(arch); default: every kernels/*/*_kernel.py",
    )
    options = parser.parse_args(arguments)
    if why := _why_not():
        print(f"machine_code: {why}", file=sys.stderr)
        return 2
    # Needs Triton.
    from maect_fast.benchmarks.machine_code.run import run

    return run(options.module or registered(), csv=options.csv)


def registered(folder: Path = KERNELS) -> list[str]:
    """Modules in a kernels/ folder that launch an op's Triton or Gluon kernels."""
    found = sorted(folder.glob("*/*_kernel.py"))
    return [f"maect_fast.kernels.{path.parent.name}.{path.stem}" for path in found]


def launches_for(arch: int, module: str) -> Iterator[Launch]:
    """What a module registers of the launches that a device of this architecture takes.

    One with less shared memory takes rows of sm_80.
    """
    table = 90 if nearest_table(arch) == 90 else 80
    found: Iterator[Launch] = importlib.import_module(module).machine_code(table)
    return found


def _why_not() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    import triton

    if triton.knobs.runtime.interpret:
        return "TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it"
    return None
