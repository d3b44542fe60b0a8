"""What works on this machine, and what to do about what does not."""

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator

import torch

from maect_fast import __version__
from maect_fast.kernels._common import cpp

__all__ = ["report"]

OPS = ("masked_attention", "queue_topk", "info_nce")


def report() -> Iterator[str]:
    """The lines of `maect-fast doctor`."""
    yield f"maect-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    for name in ("torch", "triton", "torchvision", "timm", "numpy"):
        yield f"  {name:<12} {_version(name)}"
    yield f"  {'torchvision':<12} {_torchvision()}"
    yield "devices"
    threads = torch.get_num_threads()
    yield f"  {'cpu':<12} {_cpu_name()}, {os.cpu_count()} cores, torch uses {threads} threads"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            memory = gpu.total_memory / 2**30
            yield f"  {f'cuda:{i}':<12} {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"
    else:
        yield f"  {'cuda':<12} {_why_no_cuda()}"
    yield "C++ library"
    yield f"  {cpp.status()}"
    yield "backends of the ops (auto takes the first that works)"
    for op in OPS:
        states = importlib.import_module(f"maect_fast.kernels.{op}").backends()
        for backend, reason in states.items():
            yield f"  {op:<17} {backend:<10} {reason or 'works'}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"missing: pip install {name}"


def _torchvision() -> str:
    """Check that torch and torchvision were built for each other."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        return f"does not load beside this torch ({reason}): install both from one source"
    return "loads beside this torch"


def _cpu_name() -> str:
    if sys.platform.startswith("linux"):
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "none: this is a CPU build of torch"
    return f"none: torch has CUDA {torch.version.cuda}, but finds no device or driver"
