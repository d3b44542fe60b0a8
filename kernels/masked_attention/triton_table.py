"""Launch rows of the attention's Triton kernels, with the limits of their machine code."""

from typing import Any

import triton
from torch import Tensor

from maect_fast.kernels._common.gpu import table_arch
from maect_fast.kernels._common.launch import H200, LaunchRow, Limits, fitting
from maect_fast.kernels.masked_attention.triton_rows import key_blocks, padded_dim

__all__ = [
    "BACKWARD",
    "DENSE_FIT",
    "FORWARD",
    "TRITON_39",
    "VARIANTS",
    "ZERO",
    "ZERO_PROGRAMS",
    "launch_config",
    "num_keys",
]

ALL = (80, 90)
# Queries that a row for one query takes: a block's.
FEW_QUERIES = 16
TRITON_39 = (3, 9)
# Rows of forms that stream keys and are made for so many take any number of them.
MANY_KEYS = 257


def num_keys(N: int) -> int:
    """N in whole blocks of 16, at least one."""
    return max(16, (N + 15) // 16 * 16)


def _row(
    size: tuple[int, int, int],
    trips: list[tuple[int, int, int]],
    blocks: dict[str, int],
    *,
    archs: tuple[int, ...],
    warps: int,
    stages: int,
    registers: int,
    fit: int,
    hmma: int = 0,
    maxnreg: int | None = None,
    repeats: float = 1.0,
    triton_from: tuple[int, int] = (3, 6),
    triton_below: tuple[int, int] | None = None,
    backing: str = "compiled",
) -> LaunchRow:
    """A launch for M queries, up to N keys, rounded up to 16, and up to D features.

    Each trip is a loop's: its block of queries and of keys, and how many products it makes. Warps
    beyond a narrow block repeat the others' work: so many times in all.
    """
    M, N, D = size
    products: tuple[tuple[float, float, float], ...] = ()
    padded_work = 0
    for block_m, block_n, count in trips:
        # 257 rows over five tiles of 64 are 51.4 each.
        useful = (M / triton.cdiv(M, block_m), N / triton.cdiv(N, block_n), D)
        products += (useful,) * count
        padded_work += block_m * block_n * padded_dim(D) * count
    return LaunchRow(
        label=f"{M} x {N} x {D}",
        archs=archs,
        triton_from=triton_from,
        triton_below=triton_below,
        num_warps=warps,
        num_stages=stages,
        maxnreg=maxnreg,
        blocks=blocks,
        sizes={"B": 512, "H": 16, "M": M, "N": N, "D": D},
        limits=Limits(
            registers=registers,
            blocks_per_sm=fit,
            products=products,
            max_waste=repeats * padded_work / sum(m * n * d for m, n, d in products),
            hmma=hmma,
            opcodes={"MUFU.EX2": sum(m * n for m, n, _ in trips) // (32 * warps)},
        ),
        backing=backing,
    )


def _resident(
    N: int,
    D: int,
    *,
    archs: tuple[int, ...] = ALL,
    stages: int = 1,
    licm: bool = False,
    **limits: Any,
) -> LaunchRow:
    """Forward, a row of scores at once."""
    blocks = {"BLOCK_M": 64, "LICM": licm}
    trips = [(64, sum(key_blocks(num_keys(N))), 2)]
    return _row((N, N, D), trips, blocks, archs=archs, warps=4, stages=stages, **limits)


def _streaming(
    N: int,
    D: int,
    block: tuple[int, int],
    *,
    M: int = 0,
    archs: tuple[int, ...] = ALL,
    warps: int = 4,
    stages: int = 2,
    **limits: Any,
) -> LaunchRow:
    """Forward, blocks of keys one after the other."""
    blocks = dict(zip(("BLOCK_M", "BLOCK_N"), block, strict=True))
    size, trips = (M or N, N, D), [(*block, 2)]
    return _row(size, trips, blocks, archs=archs, warps=warps, stages=stages, **limits)


def _block(
    N: int, D: int, block: int, *, archs: tuple[int, ...] = ALL, warps: int, **limits: Any
) -> LaunchRow:
    """Backward in one block."""
    trips = [(block, block, 5)]
    return _row((N, N, D), trips, {"BLOCK": block}, archs=archs, warps=warps, stages=1, **limits)


def _two_phase(
    N: int,
    D: int,
    keys: tuple[int, int],
    queries: tuple[int, int],
    *,
    M: int = 0,
    archs: tuple[int, ...] = ALL,
    stages: int = 1,
    **limits: Any,
) -> LaunchRow:
    """Backward: (queries, keys) of the programs for keys, and of those for queries."""
    names = ("KEYS_M", "KEYS_N", "QUERIES_M", "QUERIES_N")
    blocks = dict(zip(names, (*keys, *queries), strict=True))
    trips = [(*keys, 4), (*queries, 3)]
    return _row((M or N, N, D), trips, blocks, archs=archs, warps=4, stages=stages, **limits)


def _measured(milliseconds: float, others: str = "alone") -> str:
    """What backs a row that was timed with B 512 and H 16."""
    return f"measured: {milliseconds} ms, {others}, {H200}"


# The first row that covers the sizes is taken.
FORWARD = (
    # Left alone, ptxas spills to fit one block more, here and below.
    _streaming(257, 128, (16, 32), M=1, warps=2, registers=168, fit=6, hmma=32, maxnreg=192),
    _resident(50, 64, archs=(90,), registers=96, fit=5, backing=_measured(0.068)),
    _resident(50, 80, archs=(90,), registers=128, fit=4, backing=_measured(0.086)),
    _resident(65, 64, archs=(90,), registers=96, fit=5),
    _resident(
        65,
        80,
        archs=(90,),
        licm=True,
        triton_below=TRITON_39,
        registers=128,
        fit=4,
        backing=_measured(0.135, "first of 24"),
    ),
    # From 3.9 on masks cost 40 registers more.
    _resident(65, 80, archs=(90,), licm=True, triton_from=TRITON_39, registers=168, fit=3),
    _resident(197, 32, archs=(90,), registers=255, fit=2, backing=_measured(0.283)),
    _resident(197, 64, archs=(90,), registers=255, fit=2, backing=_measured(0.407, "first of 24")),
    _streaming(
        197,
        80,
        (64, 32),
        archs=(90,),
        stages=3,
        registers=128,
        fit=4,
        backing=_measured(0.607, "first of 24"),
    ),
    _resident(257, 32, archs=(90,), registers=255, fit=2, backing=_measured(0.499)),
    _resident(257, 64, archs=(90,), registers=255, fit=2),
    _resident(
        257,
        80,
        archs=(90,),
        registers=240,
        fit=2,
        maxnreg=240,
        backing=_measured(0.889, "first of 22"),
    ),
    *(
        _resident(
            N,
            D,
            archs=(80,),
            stages=stages,
            triton_below=TRITON_39,
            registers=registers,
            fit=fit,
            maxnreg=maxnreg,
        )
        for N, D, stages, registers, fit, maxnreg in (
            (50, 64, 1, 142, 3, None),
            (50, 80, 1, 128, 4, 128),
            (65, 64, 1, 128, 4, None),
            (65, 80, 2, 150, 3, None),
            (197, 32, 1, 255, 2, None),
            (197, 64, 1, 255, 2, None),
            (197, 80, 1, 255, 2, None),
        )
    ),
    # From 3.9 on keys and values would stay in registers without LICM, which has its own price.
    *(
        _resident(N, D, archs=(80,), licm=True, triton_from=TRITON_39, registers=255, fit=2)
        for N, D in ((50, 64), (50, 80), (65, 64), (65, 80), (197, 32))
    ),
    _streaming(257, 32, (64, 64), registers=128, fit=4, maxnreg=128),
    _streaming(257, 80, (64, 64), registers=192, fit=2),
    _streaming(257, 128, (64, 32), registers=230, fit=2),
)
BACKWARD = (
    _block(50, 32, 64, warps=4, registers=128, fit=4),
    _block(50, 64, 64, warps=4, registers=148, fit=3, backing=_measured(0.117)),
    _block(50, 80, 64, warps=4, registers=255, fit=2, backing=_measured(0.149)),
    _block(50, 128, 64, warps=4, registers=255, fit=2),
    _two_phase(
        257,
        128,
        (16, 32),
        (16, 32),
        M=1,
        registers=192,
        fit=2,
        hmma=72,
        maxnreg=192,
        repeats=9 / 7,
    ),
    _block(65, 64, 128, warps=8, registers=255, fit=1),
    _two_phase(
        65,
        80,
        (32, 64),
        (64, 32),
        archs=(90,),
        registers=168,
        fit=3,
        backing=_measured(0.586, "first of 28"),
    ),
    _block(65, 128, 128, archs=(90,), warps=8, registers=255, fit=1),
    # Chosen by the times at D 64 and 80: at 32 none was taken.
    _two_phase(257, 32, (32, 64), (64, 64), registers=182, fit=2),
    _two_phase(257, 80, (32, 64), (64, 32), archs=(80,), registers=255, fit=2),
    _two_phase(
        257,
        64,
        (32, 64),
        (64, 64),
        archs=(90,),
        registers=182,
        fit=2,
        backing=_measured(1.49, "first of 26, at N 197"),
    ),
    _two_phase(
        257,
        80,
        (32, 64),
        (64, 64),
        archs=(90,),
        registers=196,
        fit=2,
        backing=_measured(3.21, "first of 26 (2.11 at N 197)"),
    ),
    _two_phase(257, 128, (32, 32), (64, 32), archs=(80,), registers=230, fit=2),
    _two_phase(257, 128, (32, 64), (64, 32), archs=(90,), registers=255, fit=2),
)
# Zeroes packed rows behind the last segment, which so many programs share.
ZERO_PROGRAMS = 256
ZERO = LaunchRow(
    label="any",
    num_warps=4,
    num_stages=1,
    blocks={"BLOCK": 1024},
    sizes={"B": 512, "H": 16, "M": 257, "N": 257, "D": 80},
    limits=Limits(registers=16, blocks_per_sm=16),
)
# Programs per multiprocessor that fit without masks, by architecture and row: more than with them.
# Triton 3.9 takes 195 registers at D 64.
DENSE_FIT = {(90, "197 x 197 x 32"): 3, (90, "197 x 197 x 64"): 3}
# Modes that every row is compiled for.
VARIANTS: dict[str, dict[str, bool]] = {
    "dense": {},
    "masked": {"seqlens": True, "key_mask": True},
}


def launch_config(table: tuple[LaunchRow, ...], q: Tensor, M: int, N: int) -> LaunchRow:
    """The first row of a table that covers these sizes."""
    arch = table_arch(q.device)
    # No row of sm_80 takes more shared memory than any device has.
    rows = fitting(table, 80 if arch == 86 else arch)
    return next(row for row in rows if _covers(row, M, N, q.shape[-1]))


def _covers(row: LaunchRow, M: int, N: int, D: int) -> bool:
    sizes, blocks = row.sizes, row.blocks
    if sizes["D"] < D or (sizes["M"] == 1 and M > FEW_QUERIES):
        return False
    if "BLOCK" in blocks:
        return max(M, N) <= blocks["BLOCK"]
    streams = "BLOCK_N" in blocks or "KEYS_N" in blocks
    return (streams and sizes["N"] == MANY_KEYS) or num_keys(sizes["N"]) >= N
