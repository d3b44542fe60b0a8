"""Attention backward on the device, with dK and dV of many keys in registers.

Scores are recomputed with keys as rows, S^T: P^T and dS^T feed dV and dK from registers, and each
block of queries gets its dQ at once, so that nothing is computed twice.
"""

import triton
import triton.language as tl

from maect_fast.kernels.masked_attention.triton_rows import (
    LOG2E,
    dot,
    dot_t,
    find_sample,
    head_of,
    key_rows,
    load_lse,
    load_rows,
    padded_dim,
    query_rows,
    row_sums,
    store_counted,
    store_rows,
    zero_rows,
    zeros,
)

__all__ = ["bwd_slabs_kernel"]


@triton.jit(do_not_specialize=["num_heads", "M", "N"])
def bwd_slabs_kernel(
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
    part_ptr,
    delta_ptr,
    num_heads,
    H: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    IS_PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_BOUND: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One head after the other in each program, one slab of keys after the other: dK and dV of it.

    Between slabs dQ waits as fp32 in the program's own part of a buffer, which stays in the L2
    cache, and delta beside it. With one slab nothing waits.
    """
    num_rows = tl.cdiv(M, BLOCK_M) * BLOCK_M
    WIDTH: tl.constexpr = padded_dim(D)
    part_ptr += tl.program_id(0).to(tl.int64) * num_rows * WIDTH
    delta_ptr += tl.program_id(0).to(tl.int64) * num_rows
    for head in tl.range(tl.program_id(0), num_heads, tl.num_programs(0)):
        h = head % H
        b = tl.zeros((), tl.int64) + head // H
        first, num_queries, num_keys = find_sample(
            b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
        )
        do_head = head_of(do_ptr, b, first, h, stride_dob, stride_dom, stride_doh, ALIGN)
        q_head = head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN)
        k_head = head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN)
        v_head = head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN)
        o_head = head_of(o_ptr, b, first, h, stride_ob, H * D, D, 1)
        dq_head = head_of(dq_ptr, b, first, h, stride_dqb, stride_d, D, 1)
        dk_head = head_of(dk_ptr, b, first, h, stride_dkb, stride_d, D, 1)
        dv_head = head_of(dv_ptr, b, first, h, stride_dkb, stride_d, D, 1)
        for n in tl.range(0, N, SLAB):
            is_last = n + SLAB >= N
            offs_n = n + tl.arange(0, SLAB)
            rows_n, takes_part = key_rows(
                offs_n,
                num_keys,
                keep_ptr + b * N,
                mask_ptr + b * stride_mb,
                stride_mn,
                HAS_KEEP,
                HAS_MASK,
            )
            k = load_rows(k_head, rows_n, stride_kn * ALIGN, takes_part, D, False)
            v = load_rows(v_head, rows_n, stride_vn * ALIGN, takes_part, D, False)
            dk = zeros(SLAB, D)
            dv = zeros(SLAB, D)
            for m in tl.range(0, num_queries, BLOCK_M, disable_licm=True):
                offs_m = m + tl.arange(0, BLOCK_M)
                rows_m, mask = query_rows(offs_m, num_queries, keep_ptr + b * N, HAS_KEEP)
                q = load_rows(q_head, rows_m, stride_qm * ALIGN, mask, D, False)
                do = load_rows(do_head, rows_m, stride_dom * ALIGN, mask, D, False)
                lse = load_lse(lse_ptr + (b * H + h) * M, offs_m, mask)
                # Predicates, no branches, around which products of sm_90 do not compile.
                is_later = (offs_m >= 0) & (n > 0)
                o = load_rows(o_head, rows_m, H * D, mask & (n == 0), D, False)
                delta = row_sums(o, do) + tl.load(delta_ptr + offs_m, mask=is_later, other=0.0)
                tl.store(delta_ptr + offs_m, delta)
                dq = load_rows(part_ptr, offs_m, WIDTH, is_later, WIDTH, False)
                p = tl.exp2(dot_t(k, q) * (scale * LOG2E) - lse[None, :])
                # exp2(0 - lse) may be inf, and inf times the zeros of k is not zero.
                p = tl.where(takes_part[:, None], p, 0.0)
                ds = (p * (dot_t(v, do) - delta[None, :])).to(q[0].dtype)
                dv = dot(p, do, dv)
                dk = dot(ds, q, dk)
                dq = dot(tl.trans(ds), k, dq)
                store_rows(part_ptr, offs_m, WIDTH, (offs_m >= 0) & (not is_last), dq, WIDTH)
                inside = (offs_m < (num_queries if IS_PACKED else M)) & is_last
                # NaN of a row without keys ends here.
                counts = mask & (lse != float("inf"))
                store_counted(dq_head, rows_m, stride_d, inside, counts, dq, scale, D)
            inside = offs_n < (num_keys if IS_PACKED else N)
            store_counted(dk_head, rows_n, stride_d, inside, takes_part, dk, scale, D)
            store_counted(dv_head, rows_n, stride_d, inside, takes_part, dv, 1.0, D)
            # What one thread of the program has stored another may load.
            tl.debug_barrier()
        if HAS_LENGTHS and IS_BOUND:
            zero_rows(dq_head, num_queries, M, stride_d, D, BLOCK_M)
