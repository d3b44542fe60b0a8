"""The Triton kernels of the residual sum with its norm: what runs on the device.

A program has whole rows, in registers, as up to three chunks of BLOCK_D features: 1280 = 512 + 512
+ 256 wastes less than padding to 2048 does. A row's warps, mostly one or two, hold no other row, so
that its sums need few shuffles and the columns' sums none before the end.
"""

import triton
import triton.language as tl

from maect_fast.kernels._common.triton_int8 import larger, quantized, row_scale

__all__ = ["bwd_kernel", "fwd_kernel"]


@triton.jit
def _chunk(c: tl.constexpr, mask_m, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Features of a chunk, and which of its tile [BLOCK_M, BLOCK_D] are there."""
    offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = mask_m[:, None]
    if (c + 1) * BLOCK_D > D:
        mask = mask & (offs_d < D)[None, :]
    return offs_d, mask


@triton.jit
def _rows(ptr, offs_m, offs_d, mask, stride):
    """Values of a tile, fp32."""
    ptrs = ptr + offs_m[:, None] * stride + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _column(ptr, offs_m, offs_d, mask):
    """A parameter's values, one row for all; as a tile it comes in the threads' own layout."""
    return _rows(ptr, offs_m, offs_d, mask, 0)


@triton.jit(do_not_specialize=["M", "eps"])
def fwd_kernel(
    r_ptr,
    branch_ptr,
    branch_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    M,
    eps,
    stride_rm,
    stride_bm,
    D: tl.constexpr,
    IS_INT8: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_M rows: sums as they are rounded, their statistics in two passes over registers.

    In int8 y has scales, and nobody needs the statistics.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    xs = ()
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for c in tl.static_range(CHUNKS):
        offs_d, mask = _chunk(c, mask_m, D, BLOCK_D)
        x = _rows(r_ptr, offs_m, offs_d, mask, stride_rm)
        if HAS_BRANCH:
            x += _rows(branch_ptr, offs_m, offs_d, mask, stride_bm)
            if HAS_BRANCH_BIAS:
                x += _column(branch_bias_ptr, offs_m, offs_d, mask)
            out = x.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_m[:, None] * D + offs_d[None, :], out, mask=mask)
            # The norm reads what the backward will read.
            x = out.to(tl.float32)
        acc += x
        xs = xs + (x,)
    mean = tl.sum(acc, axis=1) / D
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for c in tl.static_range(CHUNKS):
        _, mask = _chunk(c, mask_m, D, BLOCK_D)
        x = xs[c] - mean[:, None]
        acc += tl.where(mask, x * x, 0.0)
    rstd = tl.rsqrt(tl.sum(acc, axis=1) / D + eps)
    if not IS_INT8:
        tl.store(mean_ptr + offs_m, mean, mask=mask_m)
        tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)
    ys = ()
    largest = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for c in tl.static_range(CHUNKS):
        offs_d, mask = _chunk(c, mask_m, D, BLOCK_D)
        y = (xs[c] - mean[:, None]) * rstd[:, None] * _column(weight_ptr, offs_m, offs_d, mask)
        y += _column(bias_ptr, offs_m, offs_d, mask)
        if IS_INT8:
            largest = larger(largest, y)
            ys = ys + (y,)
        else:
            tl.store(y_ptr + offs_m[:, None] * D + offs_d[None, :], y, mask=mask)
    if IS_INT8:
        scale = row_scale(largest)
        tl.store(scale_ptr + offs_m, scale, mask=mask_m)
        for c in tl.static_range(CHUNKS):
            offs_d, mask = _chunk(c, mask_m, D, BLOCK_D)
            y = quantized(ys[c], scale)
            tl.store(y_ptr + offs_m[:, None] * D + offs_d[None, :], y, mask=mask)


@triton.jit(do_not_specialize=["M", "span"])
def bwd_kernel(
    dy_ptr,
    dr_out_ptr,
    r_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    dr_ptr,
    y_ptr,
    part_ptr,
    M,
    span,
    stride_ym,
    stride_om,
    stride_rm,
    D: tl.constexpr,
    HAS_DR_OUT: tl.constexpr,
    NEED_DR: tl.constexpr,
    NEED_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`span` rows, BLOCK_M at a time: gradient of r, y again, parts of the columns' sums."""
    part = tl.program_id(0)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight = dweight + (zeros,)
    dbias = dweight
    dbranch_bias = dweight
    for start in range(part * span, tl.minimum(M, part * span + span), BLOCK_M):
        offs_m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < M
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        dys, xhats, sums_w, sums_b, sums_r = (), (), (), (), ()
        acc_1 = zeros
        acc_xhat = zeros
        for c in tl.static_range(CHUNKS):
            offs_d, mask = _chunk(c, mask_m, D, BLOCK_D)
            dy = _rows(dy_ptr, offs_m, offs_d, mask, stride_ym)
            xhat = (_rows(r_ptr, offs_m, offs_d, mask, stride_rm) - mean) * rstd
            sums_w = sums_w + (dweight[c] + dy * xhat,)
            sums_b = sums_b + (dbias[c] + dy,)
            dy *= _column(weight_ptr, offs_m, offs_d, mask)
            acc_1 += dy
            acc_xhat += dy * xhat
            dys = dys + (dy,)
            xhats = xhats + (xhat,)
        dweight, dbias = sums_w, sums_b
        mean_1 = (tl.sum(acc_1, axis=1) / D)[:, None]
        mean_xhat = (tl.sum(acc_xhat, axis=1) / D)[:, None]
        for c in tl.static_range(CHUNKS):
            offs_d, mask = _chunk(c, mask_m, D, BLOCK_D)
            offs = offs_m[:, None] * D + offs_d[None, :]
            if NEED_Y:
                y = xhats[c] * _column(weight_ptr, offs_m, offs_d, mask)
                y += _column(bias_ptr, offs_m, offs_d, mask)
                tl.store(y_ptr + offs, y, mask=mask)
            if NEED_DR:
                dr = (dys[c] - mean_1 - xhats[c] * mean_xhat) * rstd
                if HAS_DR_OUT:
                    dr += _rows(dr_out_ptr, offs_m, offs_d, mask, stride_om)
                tl.store(dr_ptr + offs, dr, mask=mask)
                sums_r = sums_r + (dbranch_bias[c] + dr,)
        if NEED_DR:
            dbranch_bias = sums_r
    SUMS: tl.constexpr = 3 if NEED_DR else 2
    part_ptr += part.to(tl.int64) * SUMS * D
    for c in tl.static_range(CHUNKS):
        offs_d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        tl.store(part_ptr + offs_d, tl.sum(dweight[c], axis=0), mask=offs_d < D)
        tl.store(part_ptr + D + offs_d, tl.sum(dbias[c], axis=0), mask=offs_d < D)
        if NEED_DR:
            tl.store(part_ptr + 2 * D + offs_d, tl.sum(dbranch_bias[c], axis=0), mask=offs_d < D)
