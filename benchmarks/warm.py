"""Compiles ahead, in parallel processes, what calls are about to launch.

Triton compiles a kernel when it is launched first, one after the other: minutes, where nothing is
in its disk cache. Here the calls run once with every launch stopped before it compiles; what Triton
says of each (its own description of kernel, signature, constants and options) goes to processes
that compile for the same GPU into the cache, without using the GPU. As Triton itself makes the
description and compiles from it, the launch finds what it looks for.
"""

import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from types import SimpleNamespace
from typing import Any

import torch

from maect_fast.benchmarks.machine_code.cli import registered

__all__ = ["Compilation", "compile_ahead", "compile_all", "pending"]

SECONDS_PER_LINE = 5


@dataclass(frozen=True, slots=True)
class Compilation:
    """One kernel to compile as it will be launched."""

    module: str
    kernel: str
    description: str
    """Triton's, JSON."""


def compile_ahead(
    calls: Iterable[Callable[[], object]], device: torch.device, tell: Callable[[str], None]
) -> None:
    """Compile what the calls launch; on a CPU nothing.

    Args:
        calls: run once each, without their launches, so that their results are undefined.
        device: where they run.
        tell: gets lines of progress.
    """
    if device.type != "cuda":
        return
    began = time.monotonic()
    # It imports while the calls run.
    _processes()
    forkserver.ensure_running()
    found = pending(calls)
    tell(f"{len(found)} kernels to compile, found in {time.monotonic() - began:.1f} s")
    from triton.runtime import driver

    for line in compile_all(found, driver.active.get_current_target()):
        tell(line)


def pending(calls: Iterable[Callable[[], object]]) -> list[Compilation]:
    """What the calls would compile. Kernels that this process has compiled are launched."""
    import triton

    found: dict[Compilation, None] = {}

    def stop(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        found[Compilation(fn.module, fn.name, compile["specialization_data"])] = None
        return True

    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = stop
    try:
        for call in calls:
            # Why a call fails is said by who wants its result.
            with suppress(Exception):
                call()
    finally:
        triton.knobs.runtime.jit_cache_hook = before
    return list(found)


def compile_all(work: list[Compilation], target: Any) -> Iterator[str]:
    """Compile into Triton's cache for a GPU that need not be there; yields lines of progress."""
    if not work:
        return
    began = said = time.monotonic()
    count = min(os.cpu_count() or 1, len(work))
    with ProcessPoolExecutor(count, mp_context=_processes()) as pool:
        done = as_completed([pool.submit(_compile, item, target) for item in work])
        for i, future in enumerate(done, start=1):
            if reason := future.result():
                # The launch will say it, too.
                yield reason
            if i == len(work) or time.monotonic() - said > SECONDS_PER_LINE:
                said = time.monotonic()
                yield f"{i} of {len(work)} compiled, {count} processes, {said - began:.1f} s"


def _processes() -> BaseContext:
    """Processes forked from one that has imported everything, once, and has never used CUDA."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *registered()])
    return context


def _compile(item: Compilation, target: Any) -> str | None:
    """In a process of its own; returns why it does not compile."""
    kernel = getattr(importlib.import_module(item.module), item.kernel)
    try:
        with active_target(target):
            kernel.preload(item.description)
    # Whatever the compiler or the assembler raises.
    except Exception as error:
        return f"{item.kernel} does not compile: {' '.join(str(error).split())[:200]}"
    return None


@contextmanager
def active_target(target: Any) -> Iterator[None]:
    """Triton compiles for the target, and asks no driver for a device."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )
    try:
        yield
    finally:
        driver._active = before
