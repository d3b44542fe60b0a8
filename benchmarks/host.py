"""What an op costs the host: `maect-fast bench host`.

Microseconds of Python and C++ from the call until the kernels are launched, on tensors so small
that the device never keeps the host waiting, and multiples of an aten add of the same run. Without
a GPU the kernels are compiled for sm_90 and launched into a driver that does nothing: all of the
host's work but the driver's own.
"""

import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from maect_fast.benchmarks.results import append_rows, device_folder, environment_columns
from maect_fast.errors import Parser
from maect_fast.kernels import (
    Pick,
    QueueState,
    TopK,
    enqueue,
    gather_patches,
    info_nce,
    masked_attention,
    masked_patch_mse,
    queue_topk,
    restore_tokens,
    with_shadow,
)
from maect_fast.kernels._common import gpu
from maect_fast.kernels._common.plan import Plans

__all__ = ["HostRow", "cases", "main", "measure", "stub_driver", "table"]

# Calls between two looks at the clock, few enough for a GPU's queue, and rounds of them.
CALLS, ROUNDS = 40, 60
UNIT, EMPTY = "aten add", "empty autograd.Function"
KEY = ("op", "mode", "gpu", "cpu")

# Every driver function that a launch needs; kernels are counted and go nowhere.
STUB = """
typedef int R; typedef unsigned long long P;
long launches = 0;
R cuLaunchKernelEx(const void*c,void*f,void**p,void**e){++launches;return 0;}
R cuLaunchKernel(void*f,unsigned a,unsigned b,unsigned c,unsigned d,unsigned e,unsigned g,
  unsigned s,void*st,void**p,void**x){++launches;return 0;}
R cuPointerGetAttribute(void*d,int a,P p){*(P*)d=p;return 0;}
R cuCtxGetCurrent(void**c){*c=(void*)1;return 0;}
R cuCtxSetCurrent(void*c){return 0;}
R cuDeviceGet(int*d,int o){*d=0;return 0;}
R cuDevicePrimaryCtxRetain(void**c,int d){*c=(void*)1;return 0;}
R cuGetErrorString(int c,const char**s){*s="x";return 0;}
R cuInit(unsigned f){return 0;}
R cuFuncSetAttribute(void*f,int a,int v){return 0;}
R cuFuncGetAttribute(int*v,int a,void*f){*v=64;return 0;}
R cuFuncSetCacheConfig(void*f,int a){return 0;}
R cuModuleLoadData(void**m,const void*d){*m=(void*)1;return 0;}
R cuModuleGetFunction(void**m,void*d,const char*n){*m=(void*)2;return 0;}
R cuOccupancyMaxActiveClusters(int*n,void*f,const void*c){*n=1;return 0;}
"""


class StubError(Exception):
    """Why launches cannot go nowhere here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostRow:
    """One op in one direction; a line of host.csv."""

    op: str
    mode: str
    """fwd without autograd, or full: forward and backward."""
    us: float
    """Of the host, per call: thread time against the stub, wall time on a GPU."""
    adds: float
    """The same in aten adds of the same run."""
    ordinary_us: float
    """Without recorded launches, by Triton's own way."""
    launches: int | None
    """Triton kernels of a call; None on a GPU, where they are not counted."""
    driver: str
    """cuda or stub."""
    gpu: str
    torch: str
    triton: str
    commit: str
    date: str
    cpu: str
    threads: int


# Stand-ins as quick as what they stand for.
def _yes(*_: object) -> bool:
    return True


def _nothing(*_: object) -> None:
    return None


@contextmanager
def stub_driver() -> Iterator[Callable[[], int]]:
    """Let Triton compile for sm_90 and launch nothing, on tensors of the CPU.

    Yields:
        Counts the launches so far.

    Raises:
        StubError: kernels are interpreted, or there is no C compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    if triton.knobs.runtime.interpret:
        raise StubError("expected compiled kernels, got TRITON_INTERPRET=1")

    class Utils:
        def load_binary(self, *_: object) -> tuple[int, ...]:
            return 1, 2, 64, 0, 1024

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": gpu.MULTIPROCESSORS}

    class Driver:
        launcher_cls = nvidia.CudaLauncher
        utils = Utils()

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 7

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", gpu.ARCH, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        source, library = folder / "stub.c", folder / "libcuda.so.1"
        source.write_text(STUB)
        options = ("-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o")
        command = [os.environ.get("CC", "cc"), *options, str(library), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise StubError(
                f"expected a C compiler to build the stand-in driver, got {error}"
            ) from error
        # Before Triton looks for the driver: what is loaded under that name is taken.
        stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        (folder / "libcuda.so").symlink_to(library)
        stack.enter_context(mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=str(folder)))
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        stack.enter_context(mock.patch.object(gpu, "takes_cpu_tensors", _yes))
        stack.enter_context(mock.patch.object(gpu, "is_gpu", _yes))
        yield lambda: ctypes.c_long.in_dll(stub, "launches").value


def cases(device: torch.device) -> dict[tuple[str, str], Callable[[], object]]:
    """Calls by op and mode, at sizes that ask little of a device."""
    torch.manual_seed(0)

    def randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    long = partial(torch.zeros, dtype=torch.int64, device=device)
    small, qkv = randn(16), randn(2, 50, 3, 2, 64)
    predicted, neighbour, ids = randn(2, 64, 256), randn(2, 64, 256), torch.arange(64).to(device)
    queue = torch.nn.functional.normalize(randn(4096, 256, dtype=torch.float32), dim=1)
    state = with_shadow(QueueState(queue, long(4096), long(4096), long(1)))
    images = randn(2, 3, 64, 64, dtype=torch.float32)
    keep = torch.arange(4).expand(2, 4).to(device)
    restore = torch.arange(16).expand(2, 16).to(device)
    tokens, mask_token, pos_embed = randn(2, 5, 64), randn(1, 1, 64), randn(1, 16, 64)
    steps = count()

    def search() -> TopK:
        pick = Pick(seed=1, step=next(steps), view=0, row=0)
        return queue_topk(predicted, state, query_id=ids, pick=pick)

    found: dict[tuple[str, str], Callable[[], object]] = {
        (UNIT, "fwd"): lambda: torch.add(small, small),
        ("queue_topk", "find_nn"): search,
        ("enqueue", "fwd"): lambda: enqueue(state, predicted[0], sample_id=ids),
    }
    differentiable: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "aten neg": (torch.neg, small),
        EMPTY: (_Empty.apply, small),
        "masked_attention": (masked_attention, qkv),
        "info_nce": (lambda x: info_nce(x, neighbour, temperature=0.2), predicted),
        "gather_patches": (lambda x: gather_patches(x, keep, 16), images),
        "restore_tokens": (lambda x: restore_tokens(x, mask_token, pos_embed, restore), tokens),
        "masked_patch_mse": (
            lambda x: masked_patch_mse(x, images, keep, 16, normalize=True),
            randn(2, 4, 768),
        ),
    }
    for name, (function, x) in differentiable.items():
        found[name, "fwd"] = partial(function, x)
        found[name, "full"] = _full(function, x)
    return found


class _Empty(torch.autograd.Function):
    """What autograd itself takes, with an op that does nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _full(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()
    grad = torch.ones_like(function(x))

    def call() -> None:
        leaf.grad = None
        function(leaf).backward(grad)  # type: ignore[no-untyped-call]

    return call


def measure(device: torch.device, launches: Callable[[], int] | None) -> list[HostRow]:
    """Time all cases in turns, with recorded launches and without.

    Args:
        device: cuda, or cpu within `stub_driver`.
        launches: counts them.
    """
    calls = cases(device)
    counts: dict[tuple[str, str], int] = {}
    for key, call in calls.items():
        call()  # compiles and records
        before = launches() if launches else 0
        call()
        counts[key] = (launches() if launches else 0) - before
    planned = _microseconds(calls, device)
    with mock.patch.object(Plans, "replay", _nothing):
        ordinary = _microseconds(calls, device)
    unit = planned[UNIT, "fwd"]
    return [
        HostRow(
            op=op,
            mode=mode,
            us=us,
            adds=us / unit,
            ordinary_us=ordinary[op, mode],
            launches=counts[op, mode] if launches else None,
            driver="stub" if launches else "cuda",
            **environment_columns(device),
        )
        for (op, mode), us in planned.items()
    ]


def _microseconds(
    calls: dict[tuple[str, str], Callable[[], object]], device: torch.device
) -> dict[tuple[str, str], float]:
    """The least of many rounds in turns: what else the machine does can only add."""
    is_gpu = device.type == "cuda"
    # A GPU's backward runs in a thread of its own.
    clock = time.perf_counter if is_gpu else time.thread_time
    best = dict.fromkeys(calls, float("inf"))
    gc.disable()
    try:
        for _ in range(ROUNDS):
            for key, call in calls.items():
                if is_gpu:
                    torch.cuda.synchronize(device)
                began = clock()
                for _ in range(CALLS):
                    call()
                best[key] = min(best[key], 1e6 * (clock() - began) / CALLS)
    finally:
        gc.enable()
    return best


def main(words: Sequence[str]) -> int:
    """Measure, print, keep."""
    parser = Parser(
        prog="maect-fast bench host",
        description="Time what each op costs the host, on a GPU, or without one against a driver "
        "that launches nothing.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="default: runs/bench")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        rows = measure(device, None)
    else:
        device = torch.device("cpu")
        try:
            with stub_driver() as launches:
                rows = measure(device, launches)
        except StubError as error:
            print(f"bench host: {error}", file=sys.stderr)
            return 2
    print(table(rows))
    append_rows(options.out / device_folder(device) / "host.csv", rows, key=KEY)
    return 0


def table(rows: Sequence[HostRow]) -> str:
    """As Markdown."""
    clock = "wall time" if rows[0].driver == "cuda" else "thread time, launches go nowhere"
    lines = [
        f"Host time per call: {rows[0].gpu or rows[0].cpu}, {clock}, torch {rows[0].torch}, "
        f"Triton {rows[0].triton}",
        "",
        "| op | mode | us | aten adds | us without recorded launches | launches |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        launches = "" if row.launches is None else str(row.launches)
        ordinary = f"{row.ordinary_us:.1f}"
        cells = (row.op, row.mode, f"{row.us:.1f}", f"{row.adds:.1f}", ordinary, launches)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
