"""Launches of the residual sum with its norm: tables, launchers, what the machine code holds."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import triton
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.residual_norm.triton_device import bwd_kernel, fwd_kernel

__all__ = ["backward", "forward", "launch_config", "machine_code"]

# Warps of the backward per multiprocessor; over a program's, the parts of the columns' sums.
WARPS = 16


def _row(
    most: int,
    BLOCK_D: int,
    D: int,
    *,
    warps: int,
    registers: int,
    blocks: int,
    instructions: float,
    maxnreg: int | None = None,
    int8: bool = False,
) -> LaunchRow:
    """For widths up to `most`, at eight images of a ViT of width D with a bf16 stream."""
    chunks = -(-D // BLOCK_D)
    return LaunchRow(
        label=f"up to {most}",
        num_warps=warps,
        num_stages=1,
        maxnreg=maxnreg,
        blocks={"BLOCK_M": 2, "BLOCK_D": BLOCK_D},
        sizes={"M": 8 * 197, "D": D},
        limits=Limits(
            registers=registers,
            blocks_per_sm=blocks,
            # Per chunk at least two rows in, two fp32 parameters, two rows out.
            opcodes={"LDG.E.128": 6 * chunks, "STG.E.128": (1 if int8 else 2) * chunks},
            elements=2 * D,
            instructions=instructions,
        ),
    )


# By the largest width, which is at most three chunks. A warp has 256 features of a row's chunk, but
# 128 of the narrowest, where it has two rows.
FORWARD = {
    384: _row(384, 128, 384, warps=1, registers=64, blocks=32, instructions=21),
    768: _row(768, 256, 768, warps=2, registers=64, blocks=16, instructions=21),
    1024: _row(1024, 512, 1024, warps=4, registers=60, blocks=8, instructions=26),
    1536: _row(1536, 512, 1280, warps=4, registers=60, blocks=8, instructions=29),
    3072: _row(3072, 1024, 2048, warps=8, registers=60, blocks=4, instructions=26),
}
# With y in int8: a thread's eight numbers are one store of 64 bits.
FORWARD_INT8 = {
    384: _row(384, 128, 384, int8=True, warps=1, registers=72, blocks=28, instructions=25),
    768: _row(768, 256, 768, int8=True, warps=2, registers=64, blocks=16, instructions=24),
    1024: _row(1024, 512, 1024, int8=True, warps=4, registers=60, blocks=8, instructions=30),
    # Left alone, ptxas aims at 56 registers and spills 8 bytes of an fp32 stream.
    1536: _row(
        1536, 512, 1280, int8=True, warps=4, registers=64, blocks=8, instructions=33, maxnreg=64
    ),
    3072: _row(3072, 1024, 2048, int8=True, warps=8, registers=60, blocks=4, instructions=30),
}
BACKWARD = {
    384: _row(384, 128, 384, warps=1, registers=192, blocks=8, instructions=25),
    768: _row(768, 256, 768, warps=2, registers=255, blocks=4, instructions=25),
    # Left alone, ptxas aims at 128 registers and spills 8 bytes in fp16.
    1024: _row(1024, 512, 1024, warps=4, registers=136, blocks=3, instructions=28, maxnreg=136),
    1536: _row(1536, 512, 1280, warps=4, registers=192, blocks=2, instructions=31),
    3072: _row(3072, 1024, 2048, warps=8, registers=136, blocks=1, instructions=28),
}
# Of an fp32 stream, which is not packed in registers while a row's sums are formed.
BACKWARD_FP32 = {
    384: _row(384, 128, 384, warps=1, registers=208, blocks=8, instructions=25),
    768: _row(768, 256, 768, warps=2, registers=216, blocks=4, instructions=25),
    1024: _row(1024, 512, 1024, warps=4, registers=160, blocks=3, instructions=28),
    1536: _row(1536, 512, 1280, warps=4, registers=208, blocks=2, instructions=31),
    3072: _row(3072, 1024, 2048, warps=8, registers=160, blocks=1, instructions=28),
}


def launch_config(table: Mapping[int, LaunchRow], D: int) -> LaunchRow:
    """The first row of a table that holds the features."""
    return next(row for most, row in table.items() if most >= D)


def forward(
    r: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    row: LaunchRow | None = None,
) -> tuple[Tensor, ...]:
    """`reference.residual_norm`; in int8 `reference.residual_norm_int8`."""
    M, D = _size(r)
    is_int8 = dtype == torch.int8
    row = row or launch_config(FORWARD_INT8 if is_int8 else FORWARD, D)
    out = r.new_empty((0,) if branch is None else r.shape)
    y = r.new_empty(r.shape, dtype=dtype)
    found = [r.new_empty(r.shape[:-1], dtype=torch.float32) for _ in range(1 if is_int8 else 2)]
    mean, rstd, scale = (None, None, *found) if is_int8 else (*found, None)
    if M > 0:
        launch(
            fwd_kernel,
            (triton.cdiv(M, row.blocks["BLOCK_M"]),),
            *(r, branch, branch_bias, weight, bias, out, y, mean, rstd, scale, M, eps),
            *(_stride(r), _stride(branch)),
            D=D,
            IS_INT8=is_int8,
            HAS_BRANCH=branch is not None,
            HAS_BRANCH_BIAS=branch_bias is not None,
            **row.options,
        )
    return out, y, *found


def backward(
    dy: Tensor,
    dr_out: Tensor | None,
    r_out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    need_dr: bool,
    need_y: bool,
    row: LaunchRow | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.residual_norm_backward`; sums in parts [.., 2 or 3, D], to be added up."""
    M, D = _size(r_out)
    row = row or launch_config(_backward_table(r_out.dtype), D)
    dr = r_out.new_empty(r_out.shape if need_dr else (0,))
    y = dy.new_empty(dy.shape if need_y else (0,))
    most = WARPS // row.num_warps * num_multiprocessors(dy.device)
    block = row.blocks["BLOCK_M"]
    span = triton.cdiv(triton.cdiv(M, block), most) * block
    num_parts = triton.cdiv(M, span) if M > 0 else 0
    part = dy.new_empty((num_parts, 3 if need_dr else 2, D), dtype=torch.float32)
    if num_parts > 0:
        launch(
            bwd_kernel,
            (num_parts,),
            *(dy, dr_out, r_out, mean, rstd, weight, bias, dr, y, part, M, span),
            *(_stride(dy), _stride(dr_out), _stride(r_out)),
            D=D,
            HAS_DR_OUT=dr_out is not None,
            NEED_DR=need_dr,
            NEED_Y=need_y,
            **row.options,
        )
    return dr, y, part


def _backward_table(stream: torch.dtype) -> Mapping[int, LaunchRow]:
    return BACKWARD_FP32 if stream == torch.float32 else BACKWARD


def _size(x: Tensor) -> tuple[int, int]:
    """M, D."""
    D = x.shape[-1]
    return x.numel() // D, D


def _stride(x: Tensor | None) -> int:
    """From one row to the next."""
    return 0 if x is None else x.view(-1, x.shape[-1]).stride(0)


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row with all it can have, by the dtypes of stream and branch."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    dtypes = {"bf16": (bf16, bf16), "fp16": (fp16, fp16), "fp32 + bf16": (fp32, bf16)}
    for variant, (stream, half) in (dtypes | {"fp32": (fp32, fp32)}).items():
        for row in fitting(FORWARD.values(), arch):
            call = partial(_forward_at, row, stream, half, half)
            yield Launch(kernel=fwd_kernel, row=row, call=call, variant=variant)
        # Of fp16 but for two conversions as of bf16.
        for row in fitting(FORWARD_INT8.values() if stream != fp16 else (), arch):
            call = partial(_forward_at, row, stream, half, torch.int8)
            yield Launch(kernel=fwd_kernel, row=row, call=call, variant=f"{variant}, int8")
        for row in fitting(_backward_table(stream).values(), arch):
            call = partial(_backward_at, row, stream, half)
            yield Launch(kernel=bwd_kernel, row=row, call=call, variant=variant)


def _forward_at(row: LaunchRow, stream: torch.dtype, half: torch.dtype, dtype: torch.dtype) -> None:
    M, D = row.sizes["M"], row.sizes["D"]
    r, branch = (torch.empty(M, D, dtype=dtype, device="meta") for dtype in (stream, half))
    weight = torch.empty(D, device="meta")
    forward(r, branch, weight, weight, weight, 1e-6, dtype, row)


def _backward_at(row: LaunchRow, stream: torch.dtype, half: torch.dtype) -> None:
    M, D = row.sizes["M"], row.sizes["D"]
    r, dy = (torch.empty(M, D, dtype=dtype, device="meta") for dtype in (stream, half))
    mean, weight = (torch.empty(n, device="meta") for n in (M, D))
    backward(dy, r, r, mean, mean, weight, weight, True, True, row)
