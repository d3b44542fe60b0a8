"""What works on this machine, and what to do about what does not."""

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn

from maect_fast import __version__
from maect_fast.benchmarks.machine_code.cli import launches_for, registered
from maect_fast.benchmarks.machine_code.ptxas import drops_work, ptxas_in_use
from maect_fast.benchmarks.results import cpu_name
from maect_fast.fuse import fuse, why_not
from maect_fast.kernels import (
    gather_patches,
    gelu,
    info_nce,
    int8_linear,
    masked_attention,
    masked_patch_mse,
    quantize_rows,
    queue_topk,
    residual_norm,
    restore_tokens,
)
from maect_fast.kernels._common import cpp
from maect_fast.kernels._common.backend import Backend
from maect_fast.kernels._common.launch import tables_in_use, triton_minor

__all__ = ["report"]

# A call of each op, small enough to try every backend.
CALLS: dict[str, Callable[[torch.device, Backend], object]] = {
    "masked_attention": lambda device, backend: masked_attention(
        torch.ones(1, 4, 3, 2, 16, device=device, dtype=torch.bfloat16), backend=backend
    ),
    "queue_topk": lambda device, backend: queue_topk(
        torch.eye(4, 16, device=device), torch.eye(16, device=device), k=2, backend=backend
    ),
    "info_nce": lambda device, backend: info_nce(
        torch.eye(4, 16, device=device),
        torch.eye(4, 16, device=device),
        temperature=0.2,
        backend=backend,
    ),
    "gather_patches": lambda device, backend: gather_patches(
        torch.ones(1, 3, 4, 4, device=device),
        torch.arange(4, device=device)[None],
        2,
        backend=backend,
    ),
    "restore_tokens": lambda device, backend: restore_tokens(
        torch.ones(1, 3, 16, device=device),
        torch.ones(1, 1, 16, device=device),
        torch.ones(1, 4, 16, device=device),
        torch.arange(4, device=device)[None],
        backend=backend,
    ),
    "masked_patch_mse": lambda device, backend: masked_patch_mse(
        torch.ones(1, 4, 12, device=device),
        torch.ones(1, 3, 4, 4, device=device),
        torch.arange(4, device=device)[None],
        2,
        normalize=True,
        backend=backend,
    ),
    "residual_norm": lambda device, backend: residual_norm(
        torch.ones(4, 16, device=device),
        torch.ones(4, 16, device=device),
        weight=torch.ones(16, device=device),
        bias=torch.ones(16, device=device),
        backend=backend,
    ),
    "gelu": lambda device, backend: gelu(
        torch.ones(4, 16, device=device), torch.ones(16, device=device), backend=backend
    ),
    "int8_linear": lambda device, backend: int8_linear(
        *quantize_rows(torch.ones(4, 16, device=device)),
        *quantize_rows(torch.ones(8, 16, device=device)),
        backend=backend,
    ),
}
BACKENDS: tuple[Backend, ...] = ("triton", "cpp", "reference")


def report() -> Iterator[str]:
    """The lines of `maect-fast doctor`."""
    yield f"maect-fast {__version__}, Python {platform.python_version()}, {platform.platform()}"
    for name in ("torch", "triton", "torchvision", "timm", "numpy"):
        yield f"  {name:<12} {_version(name)}"
    yield f"  {'torchvision':<12} {_torchvision()}"
    yield f"  {'ptxas':<12} {_ptxas()}"
    yield f"  {'launch rows':<12} {_launch_tables()}"
    yield "devices"
    threads = torch.get_num_threads()
    yield f"  {'cpu':<12} {cpu_name()}, {os.cpu_count()} cores, torch uses {threads} threads"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(i)
            memory = gpu.total_memory / 2**30
            yield f"  {f'cuda:{i}':<12} {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"
    else:
        yield f"  {'cuda':<12} {_why_no_cuda()}"
    yield "C++ library"
    yield f"  {cpp.status()}"
    if cpp.load() is None:
        # The fastest come first; "portable" on a machine with AVX2 would be news.
        search, loss = torch.ops.maect_fast.queue_topk_simd(), torch.ops.maect_fast.info_nce_simd()
        yield f"  inner loops: search {search.split()[0]}, loss {loss.split()[0]}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"backends of the ops, tried on {device.type}"
    for op, call in CALLS.items():
        for backend in BACKENDS:
            yield f"  {op:<17} {backend:<10} {_try(call, device, backend)}"
    yield f"blocks of a fused timm ViT, on {device.type} under bf16 autocast"
    yield f"  {_blocks(device)}"
    yield f"  {_blocks(device, int8=True)}"


def _blocks(device: torch.device, *, int8: bool = False) -> str:
    """What a plain block of timm's computes by."""
    with torch.device(device):
        chain: Any = fuse(nn.Sequential(Block(64, 1, qkv_bias=True)))
    if int8:
        chain.requires_grad_(False)[0].is_int8 = True
    with torch.autocast(device.type, torch.bfloat16):
        reasons = why_not(chain)
    found = reasons[0].removeprefix("0: ") if reasons else "fused norms, biases and GELU"
    return f"frozen, frozen_precision=int8: {found}, qkv, fc1 and fc2 in int8" if int8 else found


def _try(
    call: Callable[[torch.device, Backend], object], device: torch.device, backend: Backend
) -> str:
    """Run the op; a backend that is not there says so itself."""
    try:
        call(device, backend)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "works"


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


def _launch_tables() -> str:
    """What the Triton kernels' launches were chosen for, and how many of them by their time."""
    try:
        release = triton_minor()
    except ImportError:
        return "none: Triton is missing"
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    arch = 10 * major + minor
    launches = [launch for name in registered() for launch in launches_for(arch, name)]
    # A row is launched in several variants.
    backings = {id(launch.row): launch.row.backing for launch in launches}.values()
    measured = sum(backing.startswith("measured") for backing in backings)
    return f"of {tables_in_use(release, arch)}; {measured} of {len(backings)} were timed on an H200"


def _ptxas() -> str:
    """The assembler behind Triton for this machine's GPU (without one, for sm_90)."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    try:
        path, release = ptxas_in_use(10 * major + minor)
    except ImportError:
        return "missing: comes with triton"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    found = f"{release[0]}.{release[1]} at {path}"
    if major == 9 and drops_work(release):
        return (
            f"{found}, known to drop work of some sm_90 kernels silently: "
            "pip install 'nvidia-cuda-nvcc>=13', set TRITON_PTXAS_PATH to its bin/ptxas"
        )
    return found


def _why_no_cuda() -> str:
    if torch.version.cuda is None:
        return "none: this is a CPU build of torch"
    return f"none: torch has CUDA {torch.version.cuda}, but finds no device or driver"
