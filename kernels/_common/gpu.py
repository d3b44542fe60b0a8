"""What the Triton kernels need of tensors and of the device that holds them."""

import functools
import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "current",
    "is_gpu",
    "nearest_table",
    "num_multiprocessors",
    "obstacle",
    "sm_arch",
    "table_arch",
    "takes_cpu_tensors",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tensor cores with bf16 and asynchronous copies begin here.
OLDEST_ARCH = 80
# Of an H100, for launches and fake tensors without a device.
ARCH, MULTIPROCESSORS = 90, 132


def obstacle(*tensors: Tensor) -> str | None:
    """Why the Triton kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor.device.type == "cpu":
            if not takes_cpu_tensors():
                return "runs on CUDA, got a tensor on cpu (TRITON_INTERPRET=1 interprets it there)"
            if tensor.dtype == torch.bfloat16 and _interprets():
                return "is interpreted, where Triton gets bfloat16 wrong: give float32 or float16"
        elif tensor.device.type != "cuda" or torch.version.cuda is None:
            return f"runs on CUDA, got a tensor on {tensor.device}"
        elif sm_arch(tensor.device) < OLDEST_ARCH:
            return f"needs sm_{OLDEST_ARCH} or newer, got sm_{sm_arch(tensor.device)}"
        if tensor.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16, got {str(tensor.dtype).split('.')[1]}"
    return None if _has_triton() else "needs Triton: pip install triton"


def is_gpu(tensor: Tensor) -> bool:
    """Whether "auto" takes the Triton kernels for a tensor, if they can."""
    return tensor.is_cuda


def current(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's device the current one, on which Triton launches whatever it is given."""
    context: AbstractContextManager[None]
    context = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return context


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def takes_cpu_tensors() -> bool:
    """Whether launches may get tensors on the CPU; `bench host`, whose go nowhere, says so too."""
    return _interprets()


@functools.cache
def _interprets() -> bool:
    """Whether kernels are interpreted: slow, for tests."""
    if not _has_triton():
        return False
    import triton

    if not triton.knobs.runtime.interpret:
        return False
    _let_the_interpreter_count()
    return True


def _let_the_interpreter_count() -> None:
    """Triton 3.6 takes int() of arrays of one element, which numpy refuses since 2.4."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


@functools.cache
def sm_arch(device: torch.device) -> int:
    """Compute capability of the device, as in sm_90."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def table_arch(device: torch.device) -> int:
    """The architecture whose launch tables the device takes."""
    return nearest_table(sm_arch(device))


def nearest_table(arch: int) -> int:
    """The same of a compute capability.

    Tables are for sm_80 and sm_90, and under 86 for all whose blocks have 99 KiB of shared memory
    at most, as GeForce and workstation cards.
    """
    if 90 <= arch < 120:
        return 90
    return 80 if arch in (80, 87) else 86


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of the device."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
