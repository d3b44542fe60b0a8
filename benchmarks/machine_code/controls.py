"""Launches that the gate must pass or refuse, so that every run shows that it can do both.

One kernel, the first pass of a nearest-neighbour search: products of a tile in slices of D, and of
every group of columns the largest, with its position in the low bits.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.benchmarks.machine_code.ptxas import drops_work, ptxas_in_use
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting

__all__ = ["group_maxima", "group_maxima_kernel", "machine_code", "reason"]

GROUPS = 8


@triton.jit
def group_maxima_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    stride_xm,
    stride_yn,
    stride_om,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    CLEAR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the largest product per row and group of columns [n, n + GROUPS, ...] of the tile."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :]
        y_ptrs = y_ptr + offs_n[None, :] * stride_yn + offs_d[:, None]
        if D % BLOCK_D == 0:
            x, y = tl.load(x_ptrs), tl.load(y_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_d[None, :] < D, other=0.0)
            y = tl.load(y_ptrs, mask=offs_d[:, None] < D, other=0.0)
        acc = tl.dot(x, y, acc)
    bits = acc.to(tl.int32, bitcast=True)
    if CLEAR:
        bits &= ~(BLOCK_N // GROUPS - 1)
    key = (bits | (tl.arange(0, BLOCK_N) // GROUPS)[None, :]).to(tl.float32, bitcast=True)
    largest = tl.max(key.reshape(BLOCK_M, BLOCK_N // GROUPS, GROUPS), axis=1)
    offs_g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_g[None, :], largest)


def group_maxima(x: Tensor, y: Tensor, *, row: LaunchRow) -> Tensor:
    """Largest products of the rows of x and y by group: [M, D], [N, D] -> [M, tiles * GROUPS]."""
    (M, D), N = x.shape, y.shape[0]
    grid = (M // row.blocks["BLOCK_M"], N // row.blocks["BLOCK_N"])
    out = x.new_empty(M, grid[1] * GROUPS, dtype=torch.float32)
    strides = x.stride(0), y.stride(0), out.stride(0)
    group_maxima_kernel[grid](x, y, out, *strides, D=D, GROUPS=GROUPS, **row.options)
    return out


GOOD = LaunchRow(
    label="good",
    num_warps=4,
    num_stages=2,
    blocks={"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 64, "CLEAR": 1},
    sizes={"M": 512, "N": 8192, "D": 256},
    limits=Limits(
        registers=128,
        blocks_per_sm=4,
        products=((64, 64, 64),),
        opcodes={"FMNMX": 28, "STG": 1},
    ),
)
SPILLING = replace(
    GOOD,
    label="spilling",
    maxnreg=160,
    blocks={**GOOD.blocks, "BLOCK_N": 256},
    limits=replace(GOOD.limits, registers=160, blocks_per_sm=1, products=((64, 256, 64),)),
)
PADDED = replace(
    GOOD,
    label="padded",
    blocks={**GOOD.blocks, "BLOCK_D": 128},
    sizes={**GOOD.sizes, "D": 80},
    limits=replace(GOOD.limits, products=((64, 64, 80),)),
)
# What some releases of ptxas do to these two, `drops_work` says.
DROPPED = replace(GOOD, label="dropped", num_stages=3)
FOLDED = replace(DROPPED, label="folded", blocks={**GOOD.blocks, "CLEAR": 0})


def machine_code(arch: int) -> Iterator[Launch]:
    for row in fitting((GOOD, SPILLING, PADDED, DROPPED, FOLDED), arch):
        M, N, D = (row.sizes[letter] for letter in "MND")
        x = torch.empty(M, D, dtype=torch.bfloat16, device="meta")
        y = torch.empty(N, D, dtype=torch.bfloat16, device="meta")
        call = partial(group_maxima, x, y, row=row)
        yield Launch(kernel=group_maxima_kernel, row=row, call=call)


def reason(label: str, arch: int) -> str | None:
    """What the gate must name when it refuses the control; None: it must pass."""
    reasons = {SPILLING.label: "stack bytes", PADDED.label: "waste"}
    if arch == 90 and drops_work(ptxas_in_use(arch)[1]):
        reasons[DROPPED.label] = "empty tensor-core instructions"
        reasons[FOLDED.label] = "share of the products' results that is read"
    return reasons.get(label)
