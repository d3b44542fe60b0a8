"""The C++ op library: found beside the package, loaded once, on first need."""

import functools
from pathlib import Path

import torch

__all__ = ["cpu_features", "load", "status"]

LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"


@functools.cache
def load() -> str | None:
    """Load the library. Returns None, or the reason why there is none."""
    if not LIBRARY.exists():
        return "not built: install a C++17 compiler, then run `make install` (or pip install again)"
    try:
        torch.ops.load_library(str(LIBRARY))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"built, but does not load: {error}"
    return None


def cpu_features() -> list[str]:
    """Instruction sets that CPU and operating system support; empty without the library."""
    if load() is not None:
        return []
    names: str = torch.ops.maect_fast.cpu_features()
    return names.split()


def status() -> str:
    """One line for people."""
    reason = load()
    return reason or f"works; this CPU has {' '.join(cpu_features()) or 'no known extension'}"
