"""What a Triton kernel states about itself: its launch table, and what its machine code must hold.

A `triton_kernel.py` writes its tables as `LaunchRow`s, launches with `**row.options`, and exports
`machine_code(arch)`, which makes each row's launch on meta tensors::

    FORWARD = (
        LaunchRow(
            label="N 50, D 64",
            archs=(90,),
            num_warps=4,
            num_stages=1,
            blocks={"BLOCK_N": 64},
            sizes={"B": 512, "N": 50, "H": 16, "D": 64},
            limits=Limits(
                registers=102,
                blocks_per_sm=4,
                products=((50, 50, 64), (50, 64, 50)),
                max_waste=1.65,
                opcodes={"MUFU.EX2": 32, "FMNMX": 32},
            ),
        ),
    )

    def machine_code(arch: int) -> Iterator[Launch]:
        for row in fitting(FORWARD, arch):
            B, N, H, D = (row.sizes[letter] for letter in "BNHD")
            qkv = torch.empty(B, N, 3, H, D, dtype=torch.bfloat16, device="meta")
            yield Launch(kernel=_fwd_kernel, row=row, call=partial(forward, qkv, row=row))

`python -m benchmarks.machine_code` compiles what the launcher would launch, with Triton's own
specialisation of the arguments, and holds the machine code to the limits.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maect_fast.kernels._common.gpu import nearest_table

__all__ = [
    "H200",
    "TABLES_FOR",
    "Launch",
    "LaunchRow",
    "Limits",
    "fitting",
    "tables_in_use",
    "triton_minor",
]

# The release that the launch tables were made with; others take them, too.
TABLES_FOR = (3, 6)
# Where and when rows were timed, by graph replay in bf16: the end of what backs them.
H200 = "on an H200, Triton 3.6, 2026-11-27"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the machine code of one launch may cost, and what it must hold."""

    registers: int
    """At most so many per thread."""
    stack_bytes: int = 0
    """At most so many per thread; 0 admits no spill."""
    shared_bytes: int | None = None
    """At most so many per block; None: what a block can have."""
    blocks_per_sm: int = 1
    """At least so many blocks fit on a multiprocessor."""
    products: tuple[tuple[float, float, float], ...] = ()
    """Useful (M, N, K) of every `tl.dot` in the source, each place once: one trip of its loop.

    Without padding: 257 rows over five tiles of 64 are 51.4 each. A body that `tl.static_range`
    repeats counts as often. Empty for a kernel without tensor-core instructions.
    """
    max_waste: float = 1.0
    """Executed tensor-core FLOPs over those of `products`: padding, and warps that repeat work."""
    hmma: int = 0
    """So many HMMA are admitted beside HGMMA from sm_90 on, e.g. those of a 16-row tail."""
    opcodes: Mapping[str, int] = field(default_factory=dict)
    """At least so many of each instruction, e.g. those of the epilogue: ``{"MUFU.EX2": 32}``."""
    loop_opcodes: Mapping[str, int] = field(default_factory=dict)
    """At most so many of each in the innermost loop that multiplies most: ``{"SHFL": 8}``."""
    alu_per_result: float | None = None
    """At most so many arithmetic instructions of that loop for each of its products' results."""
    roles: tuple[int, ...] = ()
    """Registers per thread of each warp group, of a kernel whose warp groups have roles."""
    spills_in_loop: int = 0
    """At most so many loads and stores of the stack in the main loop of a role that multiplies,
    whatever `stack_bytes` admits elsewhere."""
    elements: int = 0
    """Of a kernel bound by bytes: numbers of its result that a block makes, without padding; those
    of one trip if it has a loop."""
    instructions: float | None = None
    """At most so many for each of `elements`, a thread's of all kinds: the longest loop's, or the
    program's if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchRow:
    """One row of a kernel's launch table."""

    label: str
    """Names the row in reports: what it is for."""
    archs: tuple[int, ...] = (80, 90)
    """Compute capabilities, as in sm_80."""
    triton_from: tuple[int, int] = (3, 6)
    """First Triton release the row is for."""
    triton_below: tuple[int, int] | None = None
    """First Triton release the row is no longer for."""
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    """Registers per thread that the assembler is held to; None: its own choice."""
    blocks: Mapping[str, int]
    """Tile sizes and switches of the schedule by the kernel's argument name."""
    sizes: Mapping[str, int]
    """Example sizes, by the op's dimension letters, at which the row is used."""
    limits: Limits
    backing: str = "compiled"
    """What the choice rests on: "compiled", that is machine code and arithmetic; "predicted" from
    them and from other rows' times; or "measured", with the time, among how many, where, when."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {
            **self.blocks,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.maxnreg,
            # Triton 3.10 turns it off unless asked.
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """A launch of one row, made for the compiler instead of a device."""

    kernel: Any
    """The `@triton.jit` function that the row is for; other kernels of the call are passed over."""
    row: LaunchRow
    call: Callable[[], object]
    """Calls the launcher with the row, on meta tensors of `row.sizes`."""
    variant: str = ""
    """Which of several launches of the row, e.g. the dtype."""


def triton_minor() -> tuple[int, int]:
    """Release of the Triton in use: (3, 6)."""
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def tables_in_use(release: tuple[int, int], arch: int) -> str:
    """Which launch tables a Triton release and a compute capability get, in words."""
    triton, found = (".".join(map(str, x)) for x in (TABLES_FOR, release))
    nearest = nearest_table(arch)
    words = f"Triton {triton}" + (f" (nearest to {found})" if triton != found else "")
    return f"{words}, sm_{nearest}" + (f" (nearest to sm_{arch})" if nearest != arch else "")


def fitting(table: Iterable[LaunchRow], arch: int) -> list[LaunchRow]:
    """The rows for this architecture and the Triton in use, in the table's order."""
    release = triton_minor()
    return [
        row
        for row in table
        if arch in row.archs
        and row.triton_from <= release
        and (row.triton_below is None or release < row.triton_below)
    ]
