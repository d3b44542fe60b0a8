"""Compiling ahead: the launch finds in Triton's cache what another process has put there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maect_fast.benchmarks.warm import compile_ahead

# Not in this process, whose kernels are interpreted. The launches are those of meta tensors; Triton
# is told of a GPU by the same stand-in for a driver that the compiling processes have.
LAUNCHES = """
import sys
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from maect_fast.benchmarks import warm
from maect_fast.kernels.mae_tokens import triton_kernel

if __name__ == "__main__":
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    calls = [launch.call for launch in triton_kernel.machine_code(target.arch)][:3]
    launch, found = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **options):
        return launch(self, *args, grid=grid, warmup=True, **options)

    def listen(*, src, cache_hit, **_):
        found.append((src.name, cache_hit))

    with warm.active_target(target):
        work = warm.pending([*calls, calls[0]])
        for line in warm.compile_all(work, target):
            print(line)
        triton.knobs.compilation.listener = listen
        with mock.patch.object(JITFunction, "run", compile_only):
            for call in calls:
                call()
    print(len(work), found)
"""
BROKEN = """
from triton.backends.compiler import GPUTarget

from maect_fast.benchmarks.warm import Compilation, compile_all

if __name__ == "__main__":
    work = [Compilation("maect_fast.kernels.mae_tokens.triton_kernel", "mse_kernel", "{}")]
    for line in compile_all(work, GPUTarget("cuda", 90, 32)):
        print(line)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_launch_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    script = tmp_path / "launches.py"
    script.write_text(LAUNCHES)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script), "90"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *progress, last = done.stdout.splitlines()
    assert progress[-1].startswith("3 of 3 compiled, ")
    hits = "('gather_kernel', True), ('gather_kernel', True), ('restore_kernel', True)"
    assert last == f"3 [{hits}]"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_what_does_not_compile_is_named(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("mse_kernel does not compile: "), done.stderr


def test_nothing_runs_ahead_on_a_cpu() -> None:
    def call() -> None:
        raise AssertionError("called")

    compile_ahead([call], torch.device("cpu"), pytest.fail)
