"""Compiles launches for an architecture that need not be there, and reads what came out."""

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from maect_fast.benchmarks.machine_code.assembly import Code, parse_ptx, parse_sass
from maect_fast.kernels._common.launch import Launch, Limits

__all__ = ["ARCHS", "Compiled", "Job", "Source", "blocks_per_sm", "compile_source", "jobs"]

ARCHS = (80, 90)

# CUDA C++ programming guide, "Technical specifications per compute capability".
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS_PER_SM = 65536
WARPS_PER_SM = 64
BLOCKS_PER_SM = 32
# What the system takes of every block's shared memory; from sm_90 on the cubin counts it in.
RESERVED_SHARED = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a compilation depends on, as plain data that another process can take."""

    module: str
    function: str
    """The `@triton.jit` function in the module."""
    arch: int
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for equal compilations."""
        return repr(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One kernel as it is launched for one row and architecture."""

    kernel: str
    row: str
    limits: Limits
    backing: str
    source: Source

    @property
    def arch(self) -> int:
        return self.source.arch

    @property
    def name(self) -> str:
        return f"{self.kernel} [{self.row}] sm_{self.arch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What the compiler made of a job."""

    num_warps: int
    """That run the same instructions: all, or a warp group's where those have roles."""
    registers: int
    stack_bytes: int
    static_shared: int
    dynamic_shared: int
    blocks_per_sm: int
    ptx: Counter[str]
    code: Code


def jobs(op: str, launch: Launch, arch: int) -> list[Job]:
    """What a registered launch of an op launches on an architecture; mostly one kernel, once.

    Raises:
        ValueError: the call does not launch the kernel, or launches it unlike its row.
    """
    kernel, row = launch.kernel, launch.row
    name = f"{op}.{kernel.__name__}"
    label = " ".join(filter(None, (row.label, launch.variant)))
    backend = make_backend(_target(arch))
    found = []
    for args, kwargs in _recorded(launch):
        wrong = {
            key: kwargs.get(key) for key, value in row.options.items() if kwargs.get(key) != value
        }
        if wrong:
            raise ValueError(f"{name} [{label}]: expected a launch with {row.options}, got {wrong}")
        # As JITFunction.run does: alignment and values of the arguments decide the code.
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound = bind(*args, **kwargs)
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, *bound)
        found.append(
            Job(
                kernel=name,
                row=label,
                limits=row.limits,
                backing=row.backing,
                source=Source(
                    module=kernel.module,
                    function=kernel.__name__,
                    arch=arch,
                    signature=signature,
                    constants=constants,
                    attributes=attributes,
                    options=options.__dict__,
                ),
            )
        )
    if not found:
        raise ValueError(f"{name} [{label}]: expected the call to launch the kernel, it did not")
    return found


def _recorded(launch: Launch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of the kernel's launches during the call; none takes place."""
    found = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self is launch.kernel:
            found.append((args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        launch.call()
    return found


def _target(arch: int) -> GPUTarget:
    return GPUTarget("cuda", arch, 32)


def compile_source(source: Source) -> Compiled:
    """Compile, disassemble and measure.

    Raises:
        RuntimeError: it does not compile.
    """
    kernel = getattr(importlib.import_module(source.module), source.function)
    # Gluon's has more than Triton's: layouts.
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    ast = kind(kernel, source.signature, source.constants, source.attributes)
    try:
        binary = triton.compile(ast, target=_target(source.arch), options=source.options)
    except Exception as error:
        raise RuntimeError(" ".join(f"does not compile: {error}".split())[:400]) from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _output_of(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        # Without dataflow analysis, which names targets of indirect branches: a quarter faster.
        listing = _output_of(triton.knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    registers, stack, shared = (
        int(size) for size in re.findall(r"(?:REG|STACK|SHARED):(\d+)", usage)
    )
    static_shared = max(0, shared - (RESERVED_SHARED if source.arch >= 90 else 0))
    dynamic_shared: int = binary.metadata.shared
    return Compiled(
        num_warps=source.options["num_warps"],
        registers=registers,
        stack_bytes=stack,
        static_shared=static_shared,
        dynamic_shared=dynamic_shared,
        blocks_per_sm=blocks_per_sm(
            source.arch,
            # Of all roles.
            num_warps=binary.metadata.num_warps,
            registers=registers,
            shared=static_shared + dynamic_shared,
        ),
        ptx=parse_ptx(binary.asm["ptx"]),
        code=parse_sass(listing),
    )


def blocks_per_sm(arch: int, *, num_warps: int, registers: int, shared: int) -> int:
    """How many blocks fit on a multiprocessor; 0: not even one."""
    # A warp's registers come in units of 256, from one of four partitions.
    warps = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256) // 4 * 4
    return min(
        BLOCKS_PER_SM,
        WARPS_PER_SM // num_warps,
        warps // num_warps,
        SHARED_PER_SM[arch] // (shared + RESERVED_SHARED),
    )


def _output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
