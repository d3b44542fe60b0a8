"""Attention backward on the device: no atomics, each row of a gradient has one owner.

Two forms here: all of a head in one block, for short sequences; and two kinds of programs, one for
queries and one for keys, for any. Scores may be recomputed with keys as rows, S^T: P^T and dS^T
then feed dV and dK from registers.
"""

import triton
import triton.language as tl

from maect_fast.kernels.masked_attention.triton_rows import (
    LOG2E,
    dot,
    dot_t,
    find_sample,
    finite,
    head_of,
    key_rows,
    load_lse,
    load_rows,
    query_rows,
    row_sums,
    store_counted,
    zeros,
)

__all__ = ["bwd_block_kernel", "bwd_two_phase_kernel"]


@triton.jit(do_not_specialize=["M", "N"])
def bwd_two_phase_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    bounds_ptr,
    keep_ptr,
    mask_ptr,
    scale,
    M,
    N,
    stride_dob,
    stride_dom,
    stride_doh,
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
    stride_dqb,
    stride_dkb,
    stride_d,
    stride_mb,
    stride_mn,
    H: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_BOUND: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KEYS_N: tl.constexpr,
    KEYS_M: tl.constexpr,
    QUERIES_M: tl.constexpr,
    QUERIES_N: tl.constexpr,
):
    """Two kinds of programs in one launch, which compute scores and dP twice and share nothing.

    One per sample, head and block of KEYS_N keys goes through all queries for dK and dV; one per
    block of QUERIES_M queries goes through all keys for dQ. Neighbours in the grid read the same
    rows, so that memory is read about once.
    """
    h = tl.program_id(0) % H
    num_key_blocks = tl.cdiv(N, KEYS_N)
    num_blocks = num_key_blocks + tl.cdiv(M, QUERIES_M)
    block = (tl.program_id(0) // H) % num_blocks
    b = (tl.program_id(0) // (H * num_blocks)).to(tl.int64)
    first, num_queries, num_keys = find_sample(
        b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
    )
    do_ptr = head_of(do_ptr, b, first, h, stride_dob, stride_dom, stride_doh, ALIGN)
    q_ptr = head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN)
    k_ptr = head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN)
    v_ptr = head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN)
    o_ptr = head_of(o_ptr, b, first, h, stride_ob, H * D, D, 1)
    dq_ptr = head_of(dq_ptr, b, first, h, stride_dqb, stride_d, D, 1)
    dk_ptr = head_of(dk_ptr, b, first, h, stride_dkb, stride_d, D, 1)
    dv_ptr = head_of(dv_ptr, b, first, h, stride_dkb, stride_d, D, 1)
    lse_ptr += (b * H + h) * M
    keep_ptr += b * N
    mask_ptr += b * stride_mb

    if block < num_key_blocks:
        n = block * KEYS_N
        offs_n = n + tl.arange(0, KEYS_N)
        rows_n, takes_part = key_rows(
            offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
        )
        k = load_rows(k_ptr, rows_n, stride_kn * ALIGN, takes_part, D, False)
        v = load_rows(v_ptr, rows_n, stride_vn * ALIGN, takes_part, D, False)
        dk = zeros(KEYS_N, D)
        dv = zeros(KEYS_N, D)
        for m in tl.range(0, tl.where(n < num_keys, num_queries, 0), KEYS_M):
            offs_m = m + tl.arange(0, KEYS_M)
            rows_m, mask = query_rows(offs_m, num_queries, keep_ptr, HAS_KEEP)
            q = load_rows(q_ptr, rows_m, stride_qm * ALIGN, mask, D, False)
            do = load_rows(do_ptr, rows_m, stride_dom * ALIGN, mask, D, False)
            o = load_rows(o_ptr, rows_m, H * D, mask, D, False)
            lse = load_lse(lse_ptr, offs_m, mask)
            delta = row_sums(o, do)
            # Keys that take no part are rows here: they spoil none but their own.
            p = tl.exp2(dot_t(k, q) * (scale * LOG2E) - lse[None, :])
            ds = p * (dot_t(v, do) - delta[None, :])
            dv = dot(p, do, dv)
            dk = dot(ds, q, dk)
        inside_n = offs_n < (num_keys if IS_PACKED else N)
        store_counted(dk_ptr, rows_n, stride_d, inside_n, takes_part, dk, scale, D)
        store_counted(dv_ptr, rows_n, stride_d, inside_n, takes_part, dv, 1.0, D)
    else:
        m = (block - num_key_blocks) * QUERIES_M
        offs_m = m + tl.arange(0, QUERIES_M)
        rows_m, mask = query_rows(offs_m, num_queries, keep_ptr, HAS_KEEP)
        q = load_rows(q_ptr, rows_m, stride_qm * ALIGN, mask, D, False)
        do = load_rows(do_ptr, rows_m, stride_dom * ALIGN, mask, D, False)
        o = load_rows(o_ptr, rows_m, H * D, mask, D, False)
        lse = load_lse(lse_ptr, offs_m, mask)
        delta = row_sums(o, do)
        dq = zeros(QUERIES_M, D)
        for n in tl.range(0, tl.where(m < num_queries, num_keys, 0), QUERIES_N):
            offs_n = n + tl.arange(0, QUERIES_N)
            rows_n, takes_part = key_rows(
                offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
            )
            k = load_rows(k_ptr, rows_n, stride_kn * ALIGN, takes_part, D, False)
            v = load_rows(v_ptr, rows_n, stride_vn * ALIGN, takes_part, D, False)
            p = tl.exp2(dot_t(q, k) * (scale * LOG2E) - lse[:, None])
            # exp2(0 - lse) may be inf, and inf times the zeros of k is not zero.
            p = tl.where(takes_part[None, :], p, 0.0)
            ds = p * (dot_t(do, v) - delta[:, None])
            dq = dot(ds, k, dq)
        inside_m = offs_m < (num_queries if IS_PACKED else M)
        # NaN of a row without keys ends here.
        counts = mask & (lse != float("inf"))
        store_counted(dq_ptr, rows_m, stride_d, inside_m, counts, dq, scale, D)


@triton.jit(do_not_specialize=["M", "N"])
def bwd_block_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    bounds_ptr,
    keep_ptr,
    mask_ptr,
    scale,
    M,
    N,
    stride_dob,
    stride_dom,
    stride_doh,
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
    stride_dqb,
    stride_dkb,
    stride_d,
    stride_mb,
    stride_mn,
    H: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_BOUND: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sample and head, all in one block: softmax again, neither lse nor O read."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    first, num_queries, num_keys = find_sample(
        b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
    )
    do_ptr = head_of(do_ptr, b, first, h, stride_dob, stride_dom, stride_doh, ALIGN)
    q_ptr = head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN)
    k_ptr = head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN)
    v_ptr = head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN)
    dq_ptr = head_of(dq_ptr, b, first, h, stride_dqb, stride_d, D, 1)
    dk_ptr = head_of(dk_ptr, b, first, h, stride_dkb, stride_d, D, 1)
    dv_ptr = head_of(dv_ptr, b, first, h, stride_dkb, stride_d, D, 1)
    keep_ptr += b * N
    mask_ptr += b * stride_mb

    offs = tl.arange(0, BLOCK)
    rows_m, mask = query_rows(offs, num_queries, keep_ptr, HAS_KEEP)
    rows_n, takes_part = key_rows(offs, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK)
    q = load_rows(q_ptr, rows_m, stride_qm * ALIGN, mask, D, False)
    k = load_rows(k_ptr, rows_n, stride_kn * ALIGN, takes_part, D, False)
    s = tl.where(takes_part[None, :], dot_t(q, k), float("-inf"))
    p = tl.exp2((s - finite(tl.max(s, axis=1))[:, None]) * (scale * LOG2E))
    row_sum = tl.sum(p, axis=1)
    # Queries outside count for nothing, nor do those without keys: their weights are zeros.
    counts = mask & (row_sum != 0)
    p = p * tl.where(counts, 1.0 / row_sum, 0.0)[:, None]
    do = load_rows(do_ptr, rows_m, stride_dom * ALIGN, mask, D, False)
    v = load_rows(v_ptr, rows_n, stride_vn * ALIGN, takes_part, D, False)
    dp = dot_t(do, v)
    ds = (p * (dp - tl.sum(p * dp, axis=1)[:, None])).to(q_ptr.dtype.element_ty)
    dq = dot(ds, k, zeros(BLOCK, D))
    inside = offs < (num_queries if IS_PACKED else M)
    store_counted(dq_ptr, rows_m, stride_d, inside, counts, dq, scale, D)
    inside = offs < (num_keys if IS_PACKED else N)
    dv = dot(tl.trans(p.to(q_ptr.dtype.element_ty)), do, zeros(BLOCK, D))
    store_counted(dv_ptr, rows_n, stride_d, inside, takes_part, dv, 1.0, D)
    dk = dot(tl.trans(ds), q, zeros(BLOCK, D))
    store_counted(dk_ptr, rows_n, stride_d, inside, takes_part, dk, scale, D)
