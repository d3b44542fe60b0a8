"""One run of the gate: the controls, then the kernels, then what is refused."""

import importlib
import io
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import triton

from maect_fast.benchmarks.machine_code import controls
from maect_fast.benchmarks.machine_code.compile import (
    ARCHS,
    Compiled,
    Job,
    Source,
    compile_source,
    jobs,
)
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
    # Triton holds the interpreter's lock as it compiles; forked, numpy's threads would be lost.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        broken = list(_check_controls(pool))
        print()
        if not modules:
            print("no Triton kernel is registered yet: there is no kernels/*/triton_kernel.py")
            return _report(broken)
        began = time.perf_counter()
        verdicts, refused = examine([importlib.import_module(name) for name in modules], pool)
        seconds = time.perf_counter() - began
    lines = [columns(v.job, v.compiled) for v in verdicts if v.compiled]
    if lines:
        print(markdown(lines))
        if csv:
            write_csv(csv, lines)
    distinct = len({v.job.source.key for v in verdicts})
    print(f"{len(verdicts)} launches, {distinct} compilations in {seconds:.0f} s")
    refused += [f"{v.job.name}: {failure}" for v in verdicts for failure in v.failures]
    return _report(broken + refused)


def examine(modules: Sequence[ModuleType], pool: Executor) -> tuple[list[Verdict], list[str]]:
    """Compile and judge all rows of the modules; with them, what is wrong with the registration."""
    registered, wrong = [], []
    for module in modules:
        op = re.sub(r"\.(triton|gluon)_kernel$", "", module.__name__).rpartition(".")[2]
        # Some are for one architecture.
        for arch in getattr(module, "ARCHS", ARCHS):
            launches = list(module.machine_code(arch))
            if not launches:
                wrong.append(f"{op}: expected a launch for sm_{arch}, got none")
            for launch in launches:
                try:
                    registered += jobs(op, launch, arch)
                except ValueError as error:
                    wrong.append(f"{error} for sm_{arch}")
    # Rows may launch the same, such as those of several variants without a difference.
    sources = {job.source.key: job.source for job in registered}
    found = dict(zip(sources, pool.map(_compile, sources.values()), strict=True))
    return [_judge(job, found[job.source.key]) for job in registered], wrong


def _compile(source: Source) -> Compiled | str:
    """What came out, or why nothing did; in a process of the pool."""
    # Triton prints the whole PTX when ptxas fails.
    with redirect_stdout(io.StringIO()):
        try:
            return compile_source(source)
        except RuntimeError as error:
            return str(error)


def _judge(job: Job, found: Compiled | str) -> Verdict:
    if isinstance(found, str):
        return Verdict(job=job, compiled=None, failures=[found])
    return Verdict(job=job, compiled=found, failures=failures(job.limits, job.arch, found))


def _check_controls(pool: Executor) -> Iterator[str]:
    """Print the controls' table and verdicts; yield those that the gate judges wrongly."""
    verdicts, wrong = examine([controls], pool)
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
