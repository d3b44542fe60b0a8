"""The Triton kernels of MAE's token ops: what runs on the device.

A program has a tile of rows, which are patches or tokens of all images in one sequence, so that no
image ends in a partly empty tile. Every kernel is one pass over what it reads and writes.
"""

import triton
import triton.language as tl

__all__ = [
    "gather_kernel",
    "mse_backward_kernel",
    "mse_kernel",
    "restore_backward_kernel",
    "restore_kernel",
]

EPS = tl.constexpr(1e-6)


@triton.jit
def _patches(
    images_ptr,
    ids_ptr,
    offs_r,
    R,
    M,
    num_rows,
    num_columns,
    stride_xb,
    stride_xh,
    stride_xw,
    stride_nb,
    stride_nm,
    K: tl.constexpr,
):
    """Where the patches of some rows begin [BLOCK_R], and whether there is such a patch."""
    image, m = (offs_r // M).to(tl.int64), offs_r % M
    patch = tl.load(ids_ptr + image * stride_nb + m * stride_nm, mask=offs_r < R, other=-1)
    row, column = patch // num_columns, patch % num_columns
    ptrs = images_ptr + image * stride_xb + row * K * stride_xh + column * K * stride_xw
    return ptrs, (patch >= 0) & (row < num_rows)


@triton.jit(do_not_specialize=["R", "M", "num_rows", "num_columns"])
def gather_kernel(
    images_ptr,
    ids_ptr,
    out_ptr,
    R,
    M,
    num_rows,
    num_columns,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_nb,
    stride_nm,
    K: tl.constexpr,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """BLOCK_F numbers of BLOCK_R patches, each in the order of a convolution's weight."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    ptrs, is_patch = _patches(
        images_ptr,
        ids_ptr,
        offs_r,
        R,
        M,
        num_rows,
        num_columns,
        stride_xb,
        stride_xh,
        stride_xw,
        stride_nb,
        stride_nm,
        K,
    )
    c, h, w = offs_f // (K * K), offs_f // K % K, offs_f % K
    offs_x = c * stride_xc + h * stride_xh + w * stride_xw
    mask_f = (offs_f < F)[None, :]
    # NaN for what is no patch of the image: loud, and nothing outside is read.
    mask = is_patch[:, None] & mask_f
    x = tl.load(ptrs[:, None] + offs_x[None, :], mask=mask, other=float("nan"))
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * F + offs_f[None, :]
    tl.store(out_ptrs, x, mask=(offs_r < R)[:, None] & mask_f)


@triton.jit
def _place(ids_ptr, offs_r, R, num_tokens, num_patches, stride_nb, stride_nl):
    """Of rows of the result: image, patch (-1: class token), its row in the tokens (-1: none)."""
    image, patch = (offs_r // (1 + num_patches)).to(tl.int64), offs_r % (1 + num_patches) - 1
    is_patch = (offs_r < R) & (patch >= 0)
    kept = tl.load(ids_ptr + image * stride_nb + patch * stride_nl, mask=is_patch, other=-1)
    place = tl.where((kept >= 0) & (kept < num_tokens - 1), 1 + kept, -1)
    return image, patch, tl.where((offs_r < R) & (patch < 0), 0, place)


@triton.jit(do_not_specialize=["R", "num_tokens", "num_patches"])
def restore_kernel(
    tokens_ptr,
    mask_token_ptr,
    pos_ptr,
    ids_ptr,
    out_ptr,
    R,
    num_tokens,
    num_patches,
    stride_tb,
    stride_tn,
    stride_pl,
    stride_nb,
    stride_nl,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D features of BLOCK_R rows; no token is read for a removed patch."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image, patch, place = _place(ids_ptr, offs_r, R, num_tokens, num_patches, stride_nb, stride_nl)
    mask_d = (offs_d < D)[None, :]
    has_token = (place >= 0)[:, None]
    token_ptrs = tokens_ptr + (image * stride_tb + place * stride_tn)[:, None] + offs_d[None, :]
    token = tl.load(token_ptrs, mask=has_token & mask_d, other=0.0)
    # The one dtype to which concatenation brings both kinds of tokens.
    removed = tl.load(mask_token_ptr + offs_d, mask=offs_d < D, other=0.0).to(token.dtype)
    pos_ptrs = pos_ptr + (patch * stride_pl)[:, None] + offs_d[None, :]
    pos = tl.load(pos_ptrs, mask=((patch >= 0) & (offs_r < R))[:, None] & mask_d, other=0.0)
    out = tl.where(has_token, token, removed[None, :]).to(tl.float32) + pos.to(tl.float32)
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, out, mask=(offs_r < R)[:, None] & mask_d)


@triton.jit(do_not_specialize=["R", "span", "num_tokens", "num_patches"])
def restore_backward_kernel(
    grad_ptr,
    ids_ptr,
    grad_tokens_ptr,
    part_ptr,
    R,
    span,
    num_tokens,
    num_patches,
    stride_gb,
    stride_gl,
    stride_gd,
    stride_nb,
    stride_nl,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D features of `span` rows: a gradient goes to its token, or into the mask token's sum.

    As ids_restore is a permutation, every token has one row that writes it.
    """
    part = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(part * span, tl.minimum(R, part * span + span), BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        image, patch, place = _place(
            ids_ptr, offs_r, R, num_tokens, num_patches, stride_nb, stride_nl
        )
        has_token = (place >= 0)[:, None]
        offs_g = image * stride_gb + (patch + 1) * stride_gl
        grad_ptrs = grad_ptr + offs_g[:, None] + (offs_d * stride_gd)[None, :]
        grad = tl.load(grad_ptrs, mask=(offs_r < R)[:, None] & mask_d, other=0.0).to(tl.float32)
        offs_t = (image * num_tokens + place) * D
        grad_tokens_ptrs = grad_tokens_ptr + offs_t[:, None] + offs_d[None, :]
        tl.store(grad_tokens_ptrs, grad, mask=has_token & mask_d)
        acc += tl.where(has_token, 0.0, grad)
    tl.store(part_ptr + part.to(tl.int64) * D + offs_d, tl.sum(acc, axis=0), mask=offs_d < D)


@triton.jit
def _error(
    predicted_ptr,
    images_ptr,
    ids_ptr,
    offs_r,
    offs_f,
    R,
    M,
    num_rows,
    num_columns,
    stride_pb,
    stride_pm,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_nb,
    stride_nm,
    C: tl.constexpr,
    K: tl.constexpr,
    IS_CONTIGUOUS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Predicted minus target [BLOCK_R, BLOCK_F] fp32, zero beyond a patch's numbers."""
    F: tl.constexpr = C * K * K
    ptrs, is_patch = _patches(
        images_ptr,
        ids_ptr,
        offs_r,
        R,
        M,
        num_rows,
        num_columns,
        stride_xb,
        stride_xh,
        stride_xw,
        stride_nb,
        stride_nm,
        K,
    )
    c, h, w = offs_f % C, offs_f // (C * K), offs_f // C % K
    offs_x = c * stride_xc + h * stride_xh + w * stride_xw
    mask_f = (offs_f < F)[None, :]
    if IS_CONTIGUOUS:
        # A constant whose factors are known: 588 numbers of a patch are 64 bits four at a time.
        offs_p = offs_r.to(tl.int64) * F
    else:
        offs_p = (offs_r // M).to(tl.int64) * stride_pb + (offs_r % M) * stride_pm
    predicted_ptrs = predicted_ptr + offs_p[:, None] + offs_f[None, :]
    predicted = tl.load(predicted_ptrs, mask=(offs_r < R)[:, None] & mask_f, other=0.0)
    # NaN for what is no patch of the image: loud, and nothing outside is read.
    mask = is_patch[:, None] & mask_f
    x = tl.load(ptrs[:, None] + offs_x[None, :], mask=mask, other=float("nan")).to(tl.float32)
    if NORMALIZE:
        # Against its first pixel a patch of one colour has no deviation that rounding made.
        first = tl.load(ptrs, mask=is_patch, other=float("nan")).to(tl.float32)
        x = tl.where(mask_f, x - first[:, None], 0.0)
        x = tl.where(mask_f, x - (tl.sum(x, axis=1) / F)[:, None], 0.0)
        var = tl.sum(x * x, axis=1) / (F - 1)
        x = x / tl.sqrt(var + EPS)[:, None]
    return tl.where(mask_f, predicted.to(tl.float32) - x, 0.0)


@triton.jit(do_not_specialize=["R", "M", "num_rows", "num_columns"])
def mse_kernel(
    predicted_ptr,
    images_ptr,
    ids_ptr,
    sum_ptr,
    R,
    M,
    num_rows,
    num_columns,
    stride_pb,
    stride_pm,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_nb,
    stride_nm,
    C: tl.constexpr,
    K: tl.constexpr,
    IS_CONTIGUOUS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Sums of squared errors of BLOCK_R patches."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    error = _error(
        predicted_ptr,
        images_ptr,
        ids_ptr,
        offs_r,
        tl.arange(0, BLOCK_F),
        R,
        M,
        num_rows,
        num_columns,
        stride_pb,
        stride_pm,
        stride_xb,
        stride_xc,
        stride_xh,
        stride_xw,
        stride_nb,
        stride_nm,
        C,
        K,
        IS_CONTIGUOUS,
        NORMALIZE,
    )
    tl.store(sum_ptr + offs_r, tl.sum(error * error, axis=1), mask=offs_r < R)


@triton.jit(do_not_specialize=["factor", "R", "M", "num_rows", "num_columns"])
def mse_backward_kernel(
    grad_ptr,
    factor,
    predicted_ptr,
    images_ptr,
    ids_ptr,
    out_ptr,
    R,
    M,
    num_rows,
    num_columns,
    stride_pb,
    stride_pm,
    stride_xb,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_nb,
    stride_nm,
    C: tl.constexpr,
    K: tl.constexpr,
    IS_CONTIGUOUS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Gradient of BLOCK_R predicted patches: factor * grad * error, computed again."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_f = tl.arange(0, BLOCK_F)
    error = _error(
        predicted_ptr,
        images_ptr,
        ids_ptr,
        offs_r,
        offs_f,
        R,
        M,
        num_rows,
        num_columns,
        stride_pb,
        stride_pm,
        stride_xb,
        stride_xc,
        stride_xh,
        stride_xw,
        stride_nb,
        stride_nm,
        C,
        K,
        IS_CONTIGUOUS,
        NORMALIZE,
    )
    error *= tl.load(grad_ptr).to(tl.float32) * factor
    F: tl.constexpr = C * K * K
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * F + offs_f[None, :]
    tl.store(out_ptrs, error, mask=((offs_r < R)[:, None] & (offs_f < F)[None, :]))
