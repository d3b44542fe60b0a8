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
    get,
    head_of,
    key_blocks,
    key_rows,
    load_lse,
    load_rows,
    padded,
    query_rows,
    row_sums,
    start_of,
    store_counted,
    store_rows,
    zero_rows,
    zeros,
)

__all__ = ["bwd_resident_kernel", "bwd_slabs_kernel"]


@triton.jit
def _backward_of_keys(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    keep_ptr,
    mask_ptr,
    part_ptr,
    delta_ptr,
    scale,
    M,
    N,
    num_queries,
    num_keys,
    first_key,
    stride_dom,
    stride_qm,
    stride_kn,
    stride_vn,
    stride_d,
    stride_mn,
    H: tl.constexpr,
    D: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCKS: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LICM: tl.constexpr,
):
    """Compute dK and dV of the keys in BLOCKS from `first_key` on, and what they add to dQ.

    With parts, dQ is added to that of the keys before and waits for those behind.
    """
    WIDTH: tl.constexpr = padded(D)
    k = ()
    v = ()
    dk = ()
    dv = ()
    for t in tl.static_range(len(BLOCKS)):
        offs_n = first_key + start_of(BLOCKS, t) + tl.arange(0, get(BLOCKS, t))
        rows_n, takes_part = key_rows(
            offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
        )
        k = k + (
            load_rows(
                k_ptr,
                rows_n,
                stride_kn,
                takes_part,
                D,
                not IS_RAGGED and t + 1 < len(BLOCKS),
            ),
        )
        v = v + (
            load_rows(
                v_ptr,
                rows_n,
                stride_vn,
                takes_part,
                D,
                not IS_RAGGED and t + 1 < len(BLOCKS),
            ),
        )
        dk = dk + (zeros(get(BLOCKS, t), D),)
        dv = dv + (zeros(get(BLOCKS, t), D),)

    for m in tl.range(0, num_queries, BLOCK_M, disable_licm=not LICM):
        offs_m = m + tl.arange(0, BLOCK_M)
        rows_m, mask = query_rows(offs_m, num_queries, keep_ptr, HAS_KEEP)
        q = load_rows(q_ptr, rows_m, stride_qm, mask, D, False)
        do = load_rows(do_ptr, rows_m, stride_dom, mask, D, False)
        lse = load_lse(lse_ptr, offs_m, mask)
        if HAS_PARTS:
            # Predicates, no branches, around which products of sm_90 do not compile.
            is_later = (offs_m >= 0) & (first_key > 0)
            o = load_rows(o_ptr, rows_m, H * D, mask & (first_key == 0), D, False)
            delta = row_sums(o, do) + tl.load(delta_ptr + offs_m, mask=is_later, other=0.0)
            tl.store(delta_ptr + offs_m, delta)
            dq = load_rows(part_ptr, offs_m, WIDTH, is_later, WIDTH, False)
        else:
            delta = row_sums(load_rows(o_ptr, rows_m, H * D, mask, D, False), do)
            dq = zeros(BLOCK_M, D)
        new_dk = ()
        new_dv = ()
        for t in tl.static_range(len(BLOCKS)):
            p = tl.exp2(dot_t(k[t], q) * (scale * LOG2E) - lse[None, :])
            if IS_RAGGED or t + 1 == len(BLOCKS):
                offs_n = first_key + start_of(BLOCKS, t) + tl.arange(0, get(BLOCKS, t))
                rows_n, takes_part = key_rows(
                    offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
                )
                # exp2(0 - lse) may be inf, and inf times the zeros of k is not zero.
                p = tl.where(takes_part[:, None], p, 0.0)
            ds = (p * (dot_t(v[t], do) - delta[None, :])).to(q[0].dtype)
            new_dv = new_dv + (dot(p, do, dv[t]),)
            new_dk = new_dk + (dot(ds, q, dk[t]),)
            dq = dot(tl.trans(ds), k[t], dq)
        dk = new_dk
        dv = new_dv
        inside = offs_m < (num_queries if IS_PACKED else M)
        # NaN of a row without keys ends here.
        counts = mask & (lse != float("inf"))
        if HAS_PARTS:
            is_last = first_key + start_of(BLOCKS, len(BLOCKS)) >= N
            store_rows(part_ptr, offs_m, WIDTH, (offs_m >= 0) & (not is_last), dq, WIDTH)
            inside = inside & is_last
        store_counted(dq_ptr, rows_m, stride_d, inside, counts, dq, scale, D)

    for t in tl.static_range(len(BLOCKS)):
        offs_n = first_key + start_of(BLOCKS, t) + tl.arange(0, get(BLOCKS, t))
        rows_n, takes_part = key_rows(
            offs_n, num_keys, keep_ptr, mask_ptr, stride_mn, HAS_KEEP, HAS_MASK
        )
        inside = offs_n < (num_keys if IS_PACKED else N)
        store_counted(dk_ptr, rows_n, stride_d, inside, takes_part, dk[t], scale, D)
        store_counted(dv_ptr, rows_n, stride_d, inside, takes_part, dv[t], 1.0, D)


@triton.jit(do_not_specialize=["M", "N"])
def bwd_resident_kernel(
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
    NUM_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LICM: tl.constexpr,
):
    """One program per sample and head: dK and dV of all keys in registers, dQ block by block."""
    h = tl.program_id(0) % H
    b = (tl.program_id(0) // H).to(tl.int64)
    first, num_queries, num_keys = find_sample(
        b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
    )
    dq_ptr = head_of(dq_ptr, b, first, h, stride_dqb, stride_d, D, 1)
    _backward_of_keys(
        head_of(do_ptr, b, first, h, stride_dob, stride_dom, stride_doh, ALIGN),
        head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN),
        head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN),
        head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN),
        head_of(o_ptr, b, first, h, stride_ob, H * D, D, 1),
        lse_ptr + (b * H + h) * M,
        dq_ptr,
        head_of(dk_ptr, b, first, h, stride_dkb, stride_d, D, 1),
        head_of(dv_ptr, b, first, h, stride_dkb, stride_d, D, 1),
        keep_ptr + b * N,
        mask_ptr + b * stride_mb,
        lse_ptr,
        lse_ptr,
        scale,
        M,
        N,
        num_queries,
        num_keys,
        0,
        stride_dom * ALIGN,
        stride_qm * ALIGN,
        stride_kn * ALIGN,
        stride_vn * ALIGN,
        stride_d,
        stride_mn,
        H,
        D,
        IS_PACKED,
        IS_PACKED or HAS_LENGTHS or HAS_MASK,
        HAS_KEEP,
        HAS_MASK,
        key_blocks(NUM_KEYS),
        False,
        BLOCK_M,
        LICM,
    )
    if HAS_LENGTHS and IS_BOUND:
        zero_rows(dq_ptr, num_queries, M, stride_d, D, BLOCK_M)


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
    LICM: tl.constexpr,
):
    """One head after the other in each program, one slab of keys after the other: dK and dV of it.

    Between slabs dQ waits as fp32 in the program's own part of a buffer, which stays in the L2
    cache, and delta beside it.
    """
    num_rows = tl.cdiv(M, BLOCK_M) * BLOCK_M
    part_ptr += tl.program_id(0).to(tl.int64) * num_rows * padded(D)
    delta_ptr += tl.program_id(0).to(tl.int64) * num_rows
    for head in tl.range(tl.program_id(0), num_heads, tl.num_programs(0)):
        h = head % H
        b = tl.zeros((), tl.int64) + head // H
        first, num_queries, num_keys = find_sample(
            b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
        )
        dq_head = head_of(dq_ptr, b, first, h, stride_dqb, stride_d, D, 1)
        for slab in tl.range(0, N, SLAB):
            _backward_of_keys(
                head_of(do_ptr, b, first, h, stride_dob, stride_dom, stride_doh, ALIGN),
                head_of(q_ptr, b, first, h, stride_qb, stride_qm, stride_qh, ALIGN),
                head_of(k_ptr, b, first, h, stride_kb, stride_kn, stride_kh, ALIGN),
                head_of(v_ptr, b, first, h, stride_vb, stride_vn, stride_vh, ALIGN),
                head_of(o_ptr, b, first, h, stride_ob, H * D, D, 1),
                lse_ptr + (b * H + h) * M,
                dq_head,
                head_of(dk_ptr, b, first, h, stride_dkb, stride_d, D, 1),
                head_of(dv_ptr, b, first, h, stride_dkb, stride_d, D, 1),
                keep_ptr + b * N,
                mask_ptr + b * stride_mb,
                part_ptr,
                delta_ptr,
                scale,
                M,
                N,
                num_queries,
                num_keys,
                slab,
                stride_dom * ALIGN,
                stride_qm * ALIGN,
                stride_kn * ALIGN,
                stride_vn * ALIGN,
                stride_d,
                stride_mn,
                H,
                D,
                IS_PACKED,
                IS_PACKED or HAS_LENGTHS or HAS_MASK,
                HAS_KEEP,
                HAS_MASK,
                (SLAB,),
                True,
                BLOCK_M,
                LICM,
            )
            # What one thread of the program has stored another may load.
            tl.debug_barrier()
        if HAS_LENGTHS and IS_BOUND:
            zero_rows(dq_head, num_queries, M, stride_d, D, BLOCK_M)
