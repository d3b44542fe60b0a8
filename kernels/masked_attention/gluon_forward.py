"""Attention forward for sm_90 by warp groups with roles: one copies, two multiply.

One persistent program per multiprocessor goes through heads. Its producer copies the next head's
keys and values and the next tiles of 64 queries while two consumers, in turn, take tiles: one's
softmax overlaps the other's products. A whole row of scores is in registers, as in the resident
form of `triton_forward`. Copies are cp.async that arrive on barriers, not TMA: rows that are left
out are zeros, rows may be gathered, and no call encodes tensor maps.
"""

from triton import language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from maect_fast.kernels.masked_attention.gluon_rows import (
    barriers,
    buffers,
    columns_of,
    copy_key_flags,
    copy_rows,
    find_sample,
    flat,
    left_of,
    mma,
    rows_of,
    stage_of,
    store_rows,
    wait_for,
    zeros,
)
from maect_fast.kernels.masked_attention.triton_rows import (
    LOG2E,
    feature_blocks,
    get,
    key_blocks,
    start_of,
)

__all__ = ["gluon_fwd_kernel"]


@gluon.jit
def _produce(
    pointers,
    strides,
    sample,
    sizes,
    kv,
    q_bufs,
    flags,
    bars,
    H: gl.constexpr,
    D: gl.constexpr,
    STRIDE_QM: gl.constexpr,
    STRIDE_QH: gl.constexpr,
    STRIDE_KN: gl.constexpr,
    STRIDE_KH: gl.constexpr,
    STRIDE_VN: gl.constexpr,
    STRIDE_VH: gl.constexpr,
    IS_PACKED: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    IS_BOUND: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    q_ptr, k_ptr, v_ptr = pointers
    stride_qb, stride_kb, stride_vb = strides
    bounds_ptr, keep_ptr, mask_ptr, stride_mb, stride_mn = sample
    M, N, num_heads = sizes
    k_full, v_full, kv_empty, q_full, q_empty = bars
    IS_RAGGED: gl.constexpr = IS_PACKED or HAS_LENGTHS or HAS_MASK
    step = 0
    slot = 0
    for head in tl.range(gl.program_id(0), num_heads, gl.num_programs(0), disable_licm=True):
        b = (head // H).to(gl.int64)
        h = head % H
        first, num_queries, num_keys = find_sample(
            b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
        )
        q = q_ptr + (b * stride_qb * 8 + first * STRIDE_QM + h * STRIDE_QH)
        k = k_ptr + (b * stride_kb * 8 + first * STRIDE_KN + h * STRIDE_KH)
        v = v_ptr + (b * stride_vb * 8 + first * STRIDE_VN + h * STRIDE_VH)
        keep = keep_ptr + b * N
        mask = mask_ptr + b * stride_mb
        if num_queries > 0:
            stage = step % STAGES
            mbarrier.wait(kv_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            for t in gl.static_range(len(BLOCKS)):
                copy_rows(
                    k,
                    start_of(BLOCKS, t),
                    num_keys,
                    keep,
                    mask,
                    stride_mn,
                    stage_of(kv[0][t], stage),
                    get(BLOCKS, t),
                    D,
                    STRIDE_KN,
                    HAS_KEEP,
                    HAS_MASK,
                    not IS_RAGGED and t + 1 < len(BLOCKS),
                )
                if HAS_MASK:
                    copy_key_flags(
                        start_of(BLOCKS, t),
                        num_keys,
                        keep,
                        mask,
                        stride_mn,
                        flags[t].index(stage),
                        get(BLOCKS, t),
                        HAS_KEEP,
                    )
            async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
            if HAS_MASK:
                mbarrier.arrive(k_full.index(stage), count=1)
            for m in tl.range(0, num_queries, 64, disable_licm=True):
                place = slot % SLOTS
                mbarrier.wait(q_empty.index(place), ((slot // SLOTS) & 1) ^ 1)
                copy_rows(
                    q,
                    m,
                    num_queries,
                    keep,
                    mask,
                    stride_mn,
                    stage_of(q_bufs, place),
                    64,
                    D,
                    STRIDE_QM,
                    HAS_KEEP,
                    False,
                    False,
                )
                async_copy.mbarrier_arrive(q_full.index(place), increment_count=False)
                slot += 1
                if m == 0:
                    # Scores need keys and queries first.
                    for t in gl.static_range(len(BLOCKS)):
                        copy_rows(
                            v,
                            start_of(BLOCKS, t),
                            num_keys,
                            keep,
                            mask,
                            stride_mn,
                            stage_of(kv[1][t], stage),
                            get(BLOCKS, t),
                            D,
                            STRIDE_VN,
                            HAS_KEEP,
                            HAS_MASK,
                            not IS_RAGGED and t + 1 < len(BLOCKS),
                        )
                    async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
            step += 1


@gluon.jit
def _consume(
    number: gl.constexpr,
    o_ptr,
    lse_ptr,
    stride_ob,
    sample,
    sizes,
    scale,
    kv,
    q_bufs,
    flags,
    bars,
    H: gl.constexpr,
    D: gl.constexpr,
    IS_PACKED: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    IS_BOUND: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    SAVE_LSE: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    bounds_ptr, keep_ptr, _, _, _ = sample
    M, N, num_heads = sizes
    k_full, v_full, kv_empty, q_full, q_empty = bars
    SIZES: gl.constexpr = feature_blocks(D)
    LAST: gl.constexpr = len(BLOCKS) - 1
    IS_RAGGED: gl.constexpr = IS_PACKED or HAS_LENGTHS or HAS_MASK
    # Rows of every product are spread alike, whatever its width.
    ROW: gl.constexpr = rows_of(get(SIZES, 0))
    step = 0
    slot = 0
    for head in tl.range(gl.program_id(0), num_heads, gl.num_programs(0), disable_licm=True):
        b = (head // H).to(gl.int64)
        h = head % H
        first, num_queries, num_keys = find_sample(
            b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
        )
        o = o_ptr + (b * stride_ob + first * (H * D) + h * D)
        lse = lse_ptr + head.to(gl.int64) * M
        keep = keep_ptr + b * N
        if num_queries > 0:
            stage = step % STAGES
            parity = (step // STAGES) & 1
            mbarrier.wait(k_full.index(stage), parity)
            for m in tl.range(0, num_queries, 64, disable_licm=True):
                if slot % 2 == number:
                    place = slot % SLOTS
                    mbarrier.wait(q_full.index(place), (slot // SLOTS) & 1)
                    fence_async_shared()
                    q = stage_of(q_bufs, place)
                    scores = ()
                    for t in gl.static_range(len(BLOCKS)):
                        k = stage_of(kv[0][t], stage)
                        s = gl.zeros([64, get(BLOCKS, t)], gl.float32, mma(get(BLOCKS, t)))
                        for i in gl.static_range(len(SIZES)):
                            s = warpgroup_mma(
                                q[i], k[i].permute((1, 0)), s, use_acc=i > 0, is_async=True
                            )
                        scores = scores + (s,)
                    scores = wait_for(scores, 0)
                    mbarrier.arrive(q_empty.index(place), count=1)
                    masked = ()
                    row_max = gl.full([64], float("-inf"), gl.float32, ROW)
                    for t in gl.static_range(len(BLOCKS)):
                        s = scores[t]
                        if HAS_MASK:
                            takes_part = flags[t].index(stage).load(columns_of(get(BLOCKS, t))) != 0
                            s = gl.where(takes_part[None, :], s, float("-inf"))
                        elif IS_RAGGED or t == LAST:
                            offs_n = gl.arange(0, get(BLOCKS, t), columns_of(get(BLOCKS, t)))
                            s = gl.where(
                                (start_of(BLOCKS, t) + offs_n < num_keys)[None, :], s, float("-inf")
                            )
                        row_max = gl.maximum(row_max, gl.convert_layout(gl.max(s, axis=1), ROW))
                        masked = masked + (s,)
                    if IS_RAGGED:
                        row_max = gl.where(row_max == float("-inf"), 0.0, row_max)
                    row_max = row_max * (scale * LOG2E)
                    row_sum = gl.zeros([64], gl.float32, ROW)
                    acc = zeros(D)
                    mbarrier.wait(v_full.index(stage), parity)
                    fence_async_shared()
                    for t in gl.static_range(len(BLOCKS)):
                        shift = gl.convert_layout(row_max, rows_of(get(BLOCKS, t)))
                        p = gl.exp2(masked[t] * (scale * LOG2E) - shift[:, None])
                        row_sum += gl.convert_layout(gl.sum(p, axis=1), ROW)
                        v = stage_of(kv[1][t], stage)
                        new = ()
                        for i in gl.static_range(len(SIZES)):
                            operand = gl.convert_layout(
                                p.to(o_ptr.dtype.element_ty),
                                left_of(get(SIZES, i)),
                            )
                            new = new + (warpgroup_mma(operand, v[i], acc[i], is_async=True),)
                        # Exponentials of the next block, made beside this product, would spill;
                        # the other consumer's are.
                        acc = wait_for(new, 0)
                    _finish(
                        acc,
                        row_max,
                        row_sum,
                        o,
                        lse,
                        m,
                        num_queries,
                        M,
                        keep,
                        H,
                        D,
                        HAS_LENGTHS,
                        HAS_KEEP,
                        IS_RAGGED,
                        SAVE_LSE,
                    )
                slot += 1
            mbarrier.arrive(kv_empty.index(stage), count=1)
            step += 1
        if IS_BOUND:
            tiles = (num_queries + 63) // 64
            for tile in tl.range(tiles, (M + 63) // 64, disable_licm=True):
                if tile % 2 == number:
                    nothing = gl.zeros([64], gl.float32, ROW)
                    _finish(
                        zeros(D),
                        nothing,
                        nothing,
                        o,
                        lse,
                        tile * 64,
                        num_queries,
                        M,
                        keep,
                        H,
                        D,
                        HAS_LENGTHS,
                        HAS_KEEP,
                        True,
                        SAVE_LSE,
                    )


@gluon.jit
def _finish(
    acc,
    row_max,
    row_sum,
    o_ptr,
    lse_ptr,
    m,
    num_queries,
    M,
    keep_ptr,
    H: gl.constexpr,
    D: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    IS_RAGGED: gl.constexpr,
    SAVE_LSE: gl.constexpr,
):
    """Store O = acc / row_sum and lse (base 2); zeros and -inf for rows outside or without keys."""
    SIZES: gl.constexpr = feature_blocks(D)
    ROW: gl.constexpr = rows_of(get(SIZES, 0))
    offs_m = m + gl.arange(0, 64, ROW)
    is_row = offs_m < num_queries
    inverse = 1.0 / row_sum
    if IS_RAGGED:
        is_row = is_row & (row_sum != 0)
        inverse = 1.0 / gl.where(is_row, row_sum, 1.0)
    o = ()
    for i in gl.static_range(len(SIZES)):
        x = acc[i] * gl.convert_layout(inverse, rows_of(get(SIZES, i)))[:, None]
        if IS_RAGGED:
            # Selected, not multiplied: rows outside may hold NaN.
            x = gl.where(gl.convert_layout(is_row, rows_of(get(SIZES, i)))[:, None], x, 0.0)
        o = o + (x,)
    # Behind its length a sample still owns rows; behind its end a packed segment does not.
    num_inside = M if HAS_LENGTHS else num_queries
    store_rows(o_ptr, m, num_inside, keep_ptr, o, D, H * D, HAS_KEEP)
    if SAVE_LSE:
        value = row_max + gl.log2(row_sum)
        if IS_RAGGED:
            value = gl.where(is_row, value, float("-inf"))
        gl.store(lse_ptr + offs_m, value, mask=offs_m < M)


@gluon.jit(do_not_specialize=["M", "N", "num_heads"])
def gluon_fwd_kernel(
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
    num_heads,
    stride_qb,
    stride_kb,
    stride_vb,
    stride_ob,
    stride_mb,
    stride_mn,
    H: gl.constexpr,
    D: gl.constexpr,
    STRIDE_QM: gl.constexpr,
    STRIDE_QH: gl.constexpr,
    STRIDE_KN: gl.constexpr,
    STRIDE_KH: gl.constexpr,
    STRIDE_VN: gl.constexpr,
    STRIDE_VH: gl.constexpr,
    IS_PACKED: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    IS_BOUND: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    SAVE_LSE: gl.constexpr,
    NUM_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """STAGES heads of keys and values, SLOTS tiles of queries; strides of samples in units of 8."""
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    BLOCKS: gl.constexpr = key_blocks(NUM_KEYS)
    keys = ()
    values = ()
    flags = ()
    for t in gl.static_range(len(BLOCKS)):
        keys = keys + (buffers(dtype, STAGES, get(BLOCKS, t), D),)
        values = values + (buffers(dtype, STAGES, get(BLOCKS, t), D),)
        if HAS_MASK:
            flags = flags + (gl.allocate_shared_memory(gl.int32, [STAGES, get(BLOCKS, t)], flat()),)
    kv = (keys, values)
    q_bufs = buffers(dtype, SLOTS, 64, D)
    # A copy arrives once per thread of the producer, flags once more.
    bars = (
        barriers(STAGES, 129 if HAS_MASK else 128),
        barriers(STAGES, 128),
        barriers(STAGES, 2),
        barriers(SLOTS, 128),
        barriers(SLOTS, 1),
    )
    sample = (bounds_ptr, keep_ptr, mask_ptr, stride_mb, stride_mn)
    sizes = (M, N, num_heads)
    pointers = (q_ptr, k_ptr, v_ptr)
    strides = (stride_qb, stride_kb, stride_vb)
    # Constants lose their constancy in a tuple with a name.
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    o_ptr,
                    lse_ptr,
                    stride_ob,
                    sample,
                    sizes,
                    scale,
                    kv,
                    q_bufs,
                    flags,
                    bars,
                    H,
                    D,
                    IS_PACKED,
                    HAS_LENGTHS,
                    IS_BOUND,
                    HAS_KEEP,
                    HAS_MASK,
                    SAVE_LSE,
                    BLOCKS,
                    STAGES,
                    SLOTS,
                ),
            ),
            (
                _consume,
                (
                    1,
                    o_ptr,
                    lse_ptr,
                    stride_ob,
                    sample,
                    sizes,
                    scale,
                    kv,
                    q_bufs,
                    flags,
                    bars,
                    H,
                    D,
                    IS_PACKED,
                    HAS_LENGTHS,
                    IS_BOUND,
                    HAS_KEEP,
                    HAS_MASK,
                    SAVE_LSE,
                    BLOCKS,
                    STAGES,
                    SLOTS,
                ),
            ),
            (
                _produce,
                (
                    pointers,
                    strides,
                    sample,
                    sizes,
                    kv,
                    q_bufs,
                    flags,
                    bars,
                    H,
                    D,
                    STRIDE_QM,
                    STRIDE_QH,
                    STRIDE_KN,
                    STRIDE_KH,
                    STRIDE_VN,
                    STRIDE_VH,
                    IS_PACKED,
                    HAS_LENGTHS,
                    IS_BOUND,
                    HAS_KEEP,
                    HAS_MASK,
                    BLOCKS,
                    STAGES,
                    SLOTS,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
