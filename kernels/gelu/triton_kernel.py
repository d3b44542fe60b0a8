"""GELU with its bias, forward and backward: tiles of tokens and features, one pass each.

The exact function, by a polynomial for the base-2 logarithm of the normal tail: Inductor's and
PyTorch's erf costs more instructions than memory leaves time for (see the README).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors
from maect_fast.kernels._common.launch import Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels._common.triton_int8 import larger, quantized, row_scale

__all__ = ["backward", "forward", "forward_int8", "machine_code"]

# log2 of the normal tail Q(t) = 1 - Phi(t): sum of C[i] t^i, by the README's fit.
C0 = tl.constexpr(-1.00002575)
C1 = tl.constexpr(-1.15085435)
C2 = tl.constexpr(-0.45939937)
C3 = tl.constexpr(-0.0531104952)
C4 = tl.constexpr(0.00813639816)
C5 = tl.constexpr(-0.000846781651)
C6 = tl.constexpr(5.22219998e-5)
C7 = tl.constexpr(-1.42216426e-6)
# There Q is zero in fp32, so that infinity may stand for it.
LARGEST = tl.constexpr(40.0)
SQRT_HALF = tl.constexpr(0.7071067811865476)
# log2 of the normal density is -x^2 / (2 ln 2) - log2(2 pi) / 2.
DENSITY_SLOPE = tl.constexpr(-0.72134752)
DENSITY_OFFSET = tl.constexpr(-1.32574806)
# Programs of the backward per multiprocessor; over D / BLOCK_D, the parts of the bias's sum.
PROGRAMS = 8


def _row(
    label: str,
    *,
    BLOCK_M: int,
    registers: int,
    blocks: int,
    instructions: float,
    chunks: int = 1,
    **opcodes: int,
) -> LaunchRow:
    """A launch for eight images of ViT-L/16; the opcodes of BLOCK_M tokens with a bias."""
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_D": 1024}
    wide = {"LDG.E.128": opcodes["loads"], "STG.E.128": opcodes["stores"]}
    return LaunchRow(
        label=label,
        num_warps=4,
        num_stages=1,
        blocks=tile,
        sizes={"M": 8 * 197, "D": 4096},
        limits=Limits(
            registers=registers,
            blocks_per_sm=blocks,
            opcodes=wide | {"MUFU.EX2": opcodes["exponentials"]},
            elements=tile["BLOCK_M"] * tile["BLOCK_D"] * chunks,
            instructions=instructions,
        ),
    )


# By whether the polynomial stands for erf.
FORWARD = {
    True: _row(
        "polynomial",
        BLOCK_M=2,
        registers=32,
        blocks=16,
        instructions=18,
        loads=6,
        stores=2,
        exponentials=16,
    ),
    False: _row(
        "erf",
        BLOCK_M=1,
        registers=40,
        blocks=12,
        instructions=40,
        loads=4,
        stores=2,
        exponentials=8,
    ),
}
# With the result in int8, of whole tokens: a thread's eight numbers are one store of 64 bits.
FORWARD_INT8 = {
    True: _row(
        "polynomial, int8",
        BLOCK_M=1,
        chunks=4,
        registers=56,
        blocks=9,
        instructions=20,
        loads=12,
        stores=0,
        exponentials=32,
    ),
    False: _row(
        "erf, int8",
        BLOCK_M=1,
        chunks=4,
        registers=96,
        blocks=5,
        instructions=41,
        loads=16,
        stores=0,
        exponentials=32,
    ),
}
BACKWARD = {
    True: _row(
        "polynomial",
        BLOCK_M=1,
        registers=56,
        blocks=9,
        instructions=28,
        loads=4,
        stores=4,
        exponentials=16,
    ),
    False: _row(
        "erf",
        BLOCK_M=1,
        registers=64,
        blocks=8,
        instructions=48,
        loads=6,
        stores=6,
        exponentials=16,
    ),
}


@triton.jit
def _magnitude(x):
    """|x|, or LARGEST where it is larger; NaN stays."""
    return tl.minimum(tl.abs(x), LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tail(t, IS_HALF: tl.constexpr):
    """Q(t) = 1 - Phi(t) for t >= 0."""
    if IS_HALF:
        p = ((((C7 * t + C6) * t + C5) * t + C4) * t + C3) * t
        return tl.exp2(((p + C2) * t + C1) * t + C0)
    return 0.5 - 0.5 * tl.erf(t * SQRT_HALF)


@triton.jit
def _gelu(x, IS_HALF: tl.constexpr):
    t = _magnitude(x)
    return tl.maximum(x, 0.0) - t * _tail(t, IS_HALF)


@triton.jit(do_not_specialize=["M"])
def fwd_kernel(
    h_ptr,
    bias_ptr,
    g_ptr,
    M,
    stride_hm,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D features of BLOCK_M tokens; neighbouring programs share tokens."""
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    offs_m = (tl.program_id(0) // SLICES).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(0) % SLICES * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_m < M)[:, None] & (offs_d < D)[None, :]
    h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :]
    x = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        # As a tile, so that it comes in the threads' layout, not by way of shared memory.
        bias_ptrs = bias_ptr + tl.zeros((BLOCK_M, 1), tl.int32) + offs_d[None, :]
        x += tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + offs_m[:, None] * D + offs_d[None, :], _gelu(x, IS_HALF), mask=mask)


@triton.jit(do_not_specialize=["M"])
def int8_kernel(
    h_ptr,
    bias_ptr,
    g_ptr,
    scale_ptr,
    M,
    stride_hm,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M tokens, all of whose features stay in registers until their largest is known."""
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    gs = ()
    largest = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for c in tl.static_range(CHUNKS):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = mask_m[:, None] & (offs_d < D)[None, :]
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :]
        x = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias_ptrs = bias_ptr + tl.zeros((BLOCK_M, 1), tl.int32) + offs_d[None, :]
            x += tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        g = _gelu(x, IS_HALF)
        largest = larger(largest, g)
        gs = gs + (g,)
    scale = row_scale(largest)
    tl.store(scale_ptr + offs_m, scale, mask=mask_m)
    for c in tl.static_range(CHUNKS):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = mask_m[:, None] & (offs_d < D)[None, :]
        g_ptrs = g_ptr + offs_m[:, None] * D + offs_d[None, :]
        tl.store(g_ptrs, quantized(gs[c], scale), mask=mask)


@triton.jit(do_not_specialize=["M", "span"])
def bwd_kernel(
    h_ptr,
    bias_ptr,
    dg_ptr,
    dh_ptr,
    g_ptr,
    part_ptr,
    M,
    span,
    stride_hm,
    stride_gm,
    D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_G: tl.constexpr,
    IS_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D features of `span` tokens: gradient, g again, a part of the bias's gradient."""
    SLICES: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    part = tl.program_id(0) // SLICES
    offs_d = tl.program_id(0) % SLICES * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for start in range(part * span, tl.minimum(M, part * span + span), BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = (offs_m < M)[:, None] & mask_d[None, :]
        h_ptrs = h_ptr + offs_m[:, None] * stride_hm + offs_d[None, :]
        dg_ptrs = dg_ptr + offs_m[:, None] * stride_gm + offs_d[None, :]
        x = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
        dg = tl.load(dg_ptrs, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += bias[None, :]
        t = _magnitude(x)
        q = _tail(t, IS_HALF)
        # The derivative at -t; the one at t is the rest to one.
        left = q - t * tl.exp2(DENSITY_SLOPE * t * t + DENSITY_OFFSET)
        dh = dg * tl.where(x >= 0.0, 1.0 - left, left)
        acc += tl.sum(dh, axis=0)
        offs = offs_m[:, None] * D + offs_d[None, :]
        tl.store(dh_ptr + offs, dh, mask=mask)
        if NEED_G:
            tl.store(g_ptr + offs, tl.maximum(x, 0.0) - t * q, mask=mask)
    if HAS_BIAS:
        tl.store(part_ptr + part.to(tl.int64) * D + offs_d, acc, mask=mask_d)


def forward(h: Tensor, bias: Tensor | None, row: LaunchRow | None = None) -> Tensor:
    """`reference.gelu`."""
    row = row or FORWARD[_is_half(h)]
    g = h.new_empty(h.shape)
    M, D = _size(h)
    programs = triton.cdiv(M, row.blocks["BLOCK_M"]) * triton.cdiv(D, row.blocks["BLOCK_D"])
    if programs > 0:
        options = _options(h, bias) | row.options
        launch(fwd_kernel, (programs,), h, bias, g, M, _stride(h), **options)
    return g


def forward_int8(
    h: Tensor, bias: Tensor | None, row: LaunchRow | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.gelu_int8`."""
    row = row or FORWARD_INT8[_is_half(h)]
    g = h.new_empty(h.shape, dtype=torch.int8)
    scale = h.new_empty(h.shape[:-1], dtype=torch.float32)
    M, _ = _size(h)
    if M > 0:
        programs = triton.cdiv(M, row.blocks["BLOCK_M"])
        options = _options(h, bias) | row.options
        launch(int8_kernel, (programs,), h, bias, g, scale, M, _stride(h), **options)
    return g, scale


def backward(
    h: Tensor, bias: Tensor | None, dg: Tensor, need_g: bool, row: LaunchRow | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.gelu_backward`; the bias's in parts [.., D], to be added up."""
    row = row or BACKWARD[_is_half(h)]
    M, D = _size(h)
    dh, g = h.new_empty(h.shape), h.new_empty(h.shape if need_g else (0,))
    slices = triton.cdiv(D, row.blocks["BLOCK_D"])
    most = triton.cdiv(PROGRAMS * num_multiprocessors(h.device), slices)
    span = triton.cdiv(triton.cdiv(M, row.blocks["BLOCK_M"]), most) * row.blocks["BLOCK_M"]
    num_parts = triton.cdiv(M, span) if M > 0 else 0
    part = h.new_empty((num_parts, D if bias is not None else 0), dtype=torch.float32)
    if num_parts > 0:
        arguments = (h, bias, dg, dh, g, part, M, span, _stride(h), _stride(dg))
        options = _options(h, bias) | row.options
        launch(bwd_kernel, (num_parts * slices,), *arguments, NEED_G=need_g, **options)
    return dh, g, part


def _is_half(h: Tensor) -> bool:
    return h.dtype != torch.float32


def _size(h: Tensor) -> tuple[int, int]:
    """M, D."""
    D = h.shape[-1]
    return h.numel() // D, D


def _stride(x: Tensor) -> int:
    """From one token to the next."""
    return x.view(-1, x.shape[-1]).stride(0)


def _options(h: Tensor, bias: Tensor | None) -> dict[str, Any]:
    return {"D": h.shape[-1], "HAS_BIAS": bias is not None, "IS_HALF": _is_half(h)}


def machine_code(arch: int) -> Iterator[Launch]:
    """Every row with a bias, as the block launches it, in the dtypes that take it."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for variant, dtype in dtypes.items():
        for row in fitting([FORWARD[dtype != torch.float32]], arch):
            h, bias = _inputs_at(row, dtype)
            call = partial(forward, h, bias, row)
            yield Launch(kernel=fwd_kernel, row=row, call=call, variant=variant)
        for row in fitting([FORWARD_INT8[dtype != torch.float32]], arch):
            h, bias = _inputs_at(row, dtype)
            into_int8 = partial(forward_int8, h, bias, row)
            yield Launch(kernel=int8_kernel, row=row, call=into_int8, variant=variant)
        for row in fitting([BACKWARD[dtype != torch.float32]], arch):
            h, bias = _inputs_at(row, dtype)
            yield Launch(
                kernel=bwd_kernel,
                row=row,
                call=partial(backward, h, bias, h, True, row),
                variant=variant,
            )


def _inputs_at(row: LaunchRow, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tensors without memory."""
    M, D = row.sizes["M"], row.sizes["D"]
    return torch.empty(M, D, dtype=dtype, device="meta"), torch.empty(D, device="meta")
