"""One run of the gate: the controls, then the kernels, then what is refused."""

import importlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton

from maect_fast.benchmarks.machine_code import controls
from maect_fast.benchmarks.machine_code.compile import ARCHS, Compiled, Job, compile_job, jobs
from maect_fast.benchmarks.machine_code.gate import failures
from maect_fast.benchmarks.machine_code.ptxas import ptxas_in_use
from maect_fast.benchmarks.machine_code.report import columns, markdown, write_csv

__all__ = ["run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the gate says of one job."""

    job: Job
    compiled: Compiled | None
    failures: list[str]


def run(modules: Sequence[str], *, csv: Path | None) -> int:
    """Print controls, table and failures; 1 if the gate is broken or refuses anything."""
    releases = {arch: ".".join(map(str, ptxas_in_use(arch)[1])) for arch in ARCHS}
    tools = ", ".join(f"ptxas {release} for sm_{arch}" for arch, release in releases.items())
    print(f"Triton {triton.__version__} at {Path(triton.__file__).parent}; {tools}")
    broken = list(_check_controls())
    print()
    if not modules:
        print("no Triton kernel is registered yet: there is no kernels/*/triton_kernel.py")
        return _report(broken)
    verdicts, refused = examine([importlib.import_module(name) for name in modules])
    lines = [columns(v.job, v.compiled) for v in verdicts if v.compiled]
    if lines:
        print(markdown(lines))
        if csv:
            write_csv(csv, lines)
    refused += [f"{v.job.name}: {failure}" for v in verdicts for failure in v.failures]
    return _report(broken + refused)


def examine(modules: Sequence[ModuleType]) -> tuple[list[Verdict], list[str]]:
    """Compile and judge all rows of the modules; with them, what is wrong with the registration."""
    registered, wrong = [], []
    for module in modules:
        op = module.__name__.removesuffix(".triton_kernel").rpartition(".")[2]
        for arch in ARCHS:
            launches = list(module.machine_code(arch))
            if not launches:
                wrong.append(f"{op}: expected a launch for sm_{arch}, got none")
            for launch in launches:
                try:
                    registered += jobs(op, launch, arch)
                except ValueError as error:
                    wrong.append(f"{error} for sm_{arch}")
    # Triton prints the whole PTX when ptxas fails.
    with redirect_stdout(io.StringIO()), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(_judge, registered)), wrong


def _judge(job: Job) -> Verdict:
    try:
        compiled = compile_job(job)
    except RuntimeError as error:
        return Verdict(job=job, compiled=None, failures=[str(error)])
    return Verdict(job=job, compiled=compiled, failures=failures(job.limits, job.arch, compiled))


def _check_controls() -> Iterator[str]:
    """Print the controls' table and verdicts; yield those that the gate judges wrongly."""
    verdicts, wrong = examine([controls])
    yield from wrong
    print(markdown([columns(v.job, v.compiled) for v in verdicts if v.compiled]))
    print()
    for verdict in verdicts:
        job, expected = verdict.job, controls.reason(verdict.job.row, verdict.job.arch)
        named = [failure for failure in verdict.failures if failure.startswith(expected or "")]
        if bool(named) != bool(expected):
            got = "; ".join(verdict.failures) or "pass"
            yield f"control {job.name}: expected {expected or 'pass'}, got {got}"
        said = f"refused: {named[0]}" if named else "passes"
        print(f"control {job.row:<9} sm_{job.arch}  {said}")


def _report(refused: Sequence[str]) -> int:
    for line in refused:
        print(f"REFUSED {line}")
    print(f"{len(refused)} refused")
    return 1 if refused else 0
