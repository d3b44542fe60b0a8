"""The C++ op library: found beside the package, loaded once, on first need."""

import functools
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["cpu_features", "load", "obstacle", "status"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
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


def obstacle(*tensors: Tensor) -> str | None:
    """Why the C++ kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"runs on the CPU, got a tensor on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, got {str(tensor.dtype).split('.')[1]}"
    return load()


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
