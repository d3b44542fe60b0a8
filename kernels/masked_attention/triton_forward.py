"""Attention forward on the device: for rows of scores that fit into registers, and for any."""

import triton
import triton.language as tl

from maect_fast.kernels.masked_attention.triton_rows import (
    LOG2E,
    dot,
    dot_t,
    find_sample,
    finite,
    get,
    head_of,
    key_blocks,
    key_rows,
    load_rows,
    query_rows,
    start_of,
    store_rows,
    zeros,
)

__all__ = ["fwd_resident_kernel", "fwd_streaming_kernel"]


@triton.jit
def _finish(
    acc,
    row_max,
    row_sum,
    o_ptr,
    lse_ptr,
    offs_m,
    rows,
    mask,
    M,
    H: tl.constexpr,
    D: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    SAVE_LSE: tl.constexpr,
):
    """Store O = acc / row_sum and lse; zeros and -inf for rows outside and for those without keys.

    Where no lengths or masks are (not `IS_RAGGED`) every row has keys and none outside is stored.
    As `row_max`, lse is to base 2: the backward's exponents would only round it twice more.
    """
    is_row = mask & (row_sum != 0)
    inverse = 1.0 / (tl.where(is_row, row_sum, 1.0) if IS_RAGGED else row_sum)
    o = ()
    for i in tl.static_range(len(acc)):
        x = acc[i] * inverse[:, None]
        # Selected, not multiplied: rows outside may hold NaN.
        o = o + (tl.where(is_row[:, None], x, 0.0) if IS_RAGGED else x,)
    inside = offs_m < M
    # Behind its length a sample still owns rows; behind its end a packed segment does not.
    store_rows(o_ptr, rows, H * D, inside if HAS_LENGTHS else mask, o, D)
    if SAVE_LSE:
        lse = row_max + tl.log2(row_sum)
        if IS_RAGGED:
            lse = tl.where(is_row, lse, float("-inf"))
        tl.store(lse_ptr + offs_m, lse, mask=inside)


@triton.jit(do_not_specialize=["M", "N"])
def fwd_resident_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    bounds_ptr,
    keep_ptr,
    mask_ptr,
    scale,
    M,
    N,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_mb,
    stride_mn,
    H: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_PACKED_QKV: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_BOUND: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LICM: tl.constexpr,
):
    """One program per sample and head: keys and values loaded once, a whole row of scores at once.

    Its NUM_KEYS, N rounded up to 16, are blocks of keys of which only the last is not full; so the
    softmax needs one maximum and one sum.
    """
    if IS_PACKED_QKV:
        stride_kb, stride_kn, stride_kh = stride_qb, stride_qm, stride_qh
        stride_vb, stride_vn, stride_vh = stride_qb, stride_qm, stride_qh
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    first, num_queries, num_keys = find_sample(
        b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
    )
    q_ptr = head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN)
    k_ptr = head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN)
    v_ptr = head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN)
    o_ptr = head_of(o_ptr, b, first, h, stride_ob, H * D, D, 1)
    lse_ptr += (b * H + h) * M
    keep_ptr += b * N
    mask_ptr += b * stride_mb

    BLOCKS: tl.constexpr = key_blocks(NUM_KEYS)
    IS_RAGGED: tl.constexpr = IS_PACKED or HAS_LENGTHS or HAS_MASK
    k = ()
    v = ()
    for t in tl.static_range(len(BLOCKS)):
        offs_n = start_of(BLOCKS, t) + tl.arange(0, get(BLOCKS, t))
        rows_n, takes_part = key_rows(
            offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
        )
        k = k + (
            load_rows(
                k_ptr,
                rows_n,
                stride_kn * ALIGN,
                takes_part,
                D,
                not IS_RAGGED and t + 1 < len(BLOCKS),
            ),
        )
        v = v + (
            load_rows(
                v_ptr,
                rows_n,
                stride_vn * ALIGN,
                takes_part,
                D,
                not IS_RAGGED and t + 1 < len(BLOCKS),
            ),
        )

    for m in tl.range(0, num_queries, BLOCK_M, disable_licm=not LICM):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows, mask = query_rows(offs_m, num_queries, keep_ptr, HAS_KEEP)
        q = load_rows(q_ptr, rows, stride_qm * ALIGN, mask, D, False)
        scores = ()
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for t in tl.static_range(len(BLOCKS)):
            s = dot_t(q, k[t])
            if IS_RAGGED or t + 1 == len(BLOCKS):
                # Once more, or its predicates would stay in registers.
                offs_n = start_of(BLOCKS, t) + tl.arange(0, get(BLOCKS, t))
                rows_n, takes_part = key_rows(
                    offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
                )
                s = tl.where(takes_part[None, :], s, float("-inf"))
            row_max = tl.maximum(row_max, tl.max(s, axis=1))
            scores = scores + (s,)
        row_max = finite(row_max) * (scale * LOG2E)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        acc = zeros(BLOCK_M, D)
        for t in tl.static_range(len(BLOCKS)):
            p = tl.exp2(scores[t] * (scale * LOG2E) - row_max[:, None])
            row_sum += tl.sum(p, axis=1)
            acc = dot(p, v[t], acc)
        _finish(
            acc,
            row_max,
            row_sum,
            o_ptr,
            lse_ptr,
            offs_m,
            rows,
            mask,
            M,
            H,
            D,
            HAS_LENGTHS,
            IS_RAGGED,
            SAVE_LSE,
        )
    if IS_BOUND:
        for m in tl.range(tl.cdiv(num_queries, BLOCK_M) * BLOCK_M, M, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            nothing = tl.zeros((BLOCK_M,), tl.float32)
            _finish(
                zeros(BLOCK_M, D),
                nothing,
                nothing,
                o_ptr,
                lse_ptr,
                offs_m,
                offs_m,
                offs_m < num_queries,
                M,
                H,
                D,
                HAS_LENGTHS,
                IS_RAGGED,
                SAVE_LSE,
            )


@triton.jit(do_not_specialize=["M", "N"])
def fwd_streaming_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    bounds_ptr,
    keep_ptr,
    mask_ptr,
    scale,
    M,
    N,
    stride_qb,
    stride_qm,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_ob,
    stride_mb,
    stride_mn,
    H: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_PACKED_QKV: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_BOUND: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAVE_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per sample, head and block of queries: blocks of keys pass by, softmax online."""
    if IS_PACKED_QKV:
        stride_kb, stride_kn, stride_kh = stride_qb, stride_qm, stride_qh
        stride_vb, stride_vn, stride_vh = stride_qb, stride_qm, stride_qh
    h = tl.program_id(0) % H
    num_blocks = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // (H * num_blocks)).to(tl.int64)
    first, num_queries, num_keys = find_sample(
        b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
    )
    q_ptr = head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN)
    k_ptr = head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN)
    v_ptr = head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN)
    o_ptr = head_of(o_ptr, b, first, h, stride_ob, H * D, D, 1)
    lse_ptr += (b * H + h) * M
    keep_ptr += b * N
    mask_ptr += b * stride_mb

    IS_RAGGED: tl.constexpr = IS_PACKED or HAS_LENGTHS or HAS_MASK
    m = (tl.program_id(0) // H) % num_blocks * BLOCK_M
    offs_m = m + tl.arange(0, BLOCK_M)
    rows, mask = query_rows(offs_m, num_queries, keep_ptr, HAS_KEEP)
    q = load_rows(q_ptr, rows, stride_qm * ALIGN, mask, D, False)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = zeros(BLOCK_M, D)
    num_keys = tl.where(m < num_queries, num_keys, 0)
    for n in tl.range(0, num_keys, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        rows_n, takes_part = key_rows(
            offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
        )
        k = load_rows(k_ptr, rows_n, stride_kn * ALIGN, takes_part, D, False)
        v = load_rows(v_ptr, rows_n, stride_vn * ALIGN, takes_part, D, False)
        s = tl.where(takes_part[None, :], dot_t(q, k), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1))
        shift = finite(new_max) * (scale * LOG2E)
        # For rows without keys so far exp2(-inf) = 0.
        fade = tl.exp2(row_max * (scale * LOG2E) - shift)
        p = tl.exp2(s * (scale * LOG2E) - shift[:, None])
        row_sum = row_sum * fade + tl.sum(p, axis=1)
        faded = ()
        for i in tl.static_range(len(acc)):
            faded = faded + (acc[i] * fade[:, None],)
        acc = dot(p, v, faded)
        row_max = new_max
    row_max = finite(row_max) * (scale * LOG2E)
    _finish(
        acc,
        row_max,
        row_sum,
        o_ptr,
        lse_ptr,
        offs_m,
        rows,
        mask,
        M,
        H,
        D,
        HAS_LENGTHS,
        IS_RAGGED,
        SAVE_LSE,
    )
