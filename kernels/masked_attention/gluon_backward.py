"""Attention backward for sm_90 by warp groups with roles: five products, no atomics.

One persistent program per multiprocessor goes through heads, a head's keys in slabs of 128: 64 for
each of two consumers, which hold dK and dV of theirs while tiles of 64 queries pass by. dS^T goes
to shared memory, and consumer m % 2 alone forms dQ of tile m over all 128 keys. Between slabs its
sum waits in the program's own scratch, fp32, written and read by the same threads. The producer
copies and forms delta, once per head.
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
    copy_rows,
    find_sample,
    flat,
    half_of,
    key_rows,
    left_of,
    mma,
    part_of,
    row_copies,
    row_dot,
    row_vector,
    rows_of,
    stage_of,
    store_rows,
    swizzled,
    wait_for,
    zeros,
)
from maect_fast.kernels.masked_attention.triton_rows import (
    LOG2E,
    feature_blocks,
    get,
    padded_dim,
    start_of,
)

__all__ = ["gluon_bwd_kernel"]


@gluon.jit
def _produce(
    pointers,
    strides,
    sample,
    sizes,
    kv,
    qdo,
    rows_smem,
    bars,
    H: gl.constexpr,
    D: gl.constexpr,
    STRIDE_DOM: gl.constexpr,
    STRIDE_DOH: gl.constexpr,
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
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr = pointers
    stride_dob, stride_qb, stride_kb, stride_vb, stride_ob = strides
    bounds_ptr, keep_ptr, mask_ptr, stride_mb, stride_mn = sample
    M, N, num_heads = sizes
    kv_full, kv_empty, q_full, q_empty, _, _ = bars
    lse_smem, delta_smem = rows_smem
    slab = 0
    slot = 0
    step = 0
    for head in tl.range(gl.program_id(0), num_heads, gl.num_programs(0), disable_licm=True):
        b = (head // H).to(gl.int64)
        h = head % H
        first, num_queries, num_keys = find_sample(
            b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
        )
        do = do_ptr + (b * stride_dob * 8 + first * STRIDE_DOM + h * STRIDE_DOH)
        q = q_ptr + (b * stride_qb * 8 + first * STRIDE_QM + h * STRIDE_QH)
        k = k_ptr + (b * stride_kb * 8 + first * STRIDE_KN + h * STRIDE_KH)
        v = v_ptr + (b * stride_vb * 8 + first * STRIDE_VN + h * STRIDE_VH)
        o = o_ptr + (b * stride_ob + first * (H * D) + h * D)
        lse_of_head = lse_ptr + head.to(gl.int64) * M
        keep = keep_ptr + b * N
        mask = mask_ptr + b * stride_mb
        if (num_queries > 0) & (num_keys > 0):
            for n in tl.range(0, num_keys, 128, disable_licm=True):
                stage = slab % STAGES
                mbarrier.wait(kv_empty.index(stage), ((slab // STAGES) & 1) ^ 1)
                copy_rows(
                    k,
                    n,
                    num_keys,
                    keep,
                    mask,
                    stride_mn,
                    stage_of(kv[0], stage),
                    128,
                    D,
                    STRIDE_KN,
                    HAS_KEEP,
                    HAS_MASK,
                    False,
                )
                copy_rows(
                    v,
                    n,
                    num_keys,
                    keep,
                    mask,
                    stride_mn,
                    stage_of(kv[1], stage),
                    128,
                    D,
                    STRIDE_VN,
                    HAS_KEEP,
                    HAS_MASK,
                    False,
                )
                async_copy.mbarrier_arrive(kv_full.index(stage), increment_count=False)
                slab += 1
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
                        stage_of(qdo[0], place),
                        64,
                        D,
                        STRIDE_QM,
                        HAS_KEEP,
                        False,
                        False,
                    )
                    copy_rows(
                        do,
                        m,
                        num_queries,
                        keep,
                        mask,
                        stride_mn,
                        stage_of(qdo[1], place),
                        64,
                        D,
                        STRIDE_DOM,
                        HAS_KEEP,
                        False,
                        False,
                    )
                    async_copy.mbarrier_arrive(q_full.index(place), increment_count=False)
                    if n == 0:
                        offs_m = m + gl.arange(0, 64, row_vector())
                        inside = offs_m < num_queries
                        lse = gl.load(lse_of_head + offs_m, mask=inside, other=float("inf"))
                        # A row without keys has -inf; +inf makes its weights zeros.
                        lse = gl.where(lse == float("-inf"), float("inf"), lse)
                        row = (step % 2) * TILES + m // 64
                        lse_smem.index(row).store(lse)
                        delta = row_dot(o, do, m, num_queries, keep, D, H * D, STRIDE_DOM, HAS_KEEP)
                        delta_smem.index(row).store(delta)
                    mbarrier.arrive(q_full.index(place), count=1)
                    slot += 1
            step += 1


@gluon.jit
def _consume(
    number: gl.constexpr,
    pointers,
    strides,
    sample,
    sizes,
    scale,
    kv,
    qdo,
    ds_smem,
    rows_smem,
    bars,
    H: gl.constexpr,
    D: gl.constexpr,
    STRIDE_D: gl.constexpr,
    IS_PACKED: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    IS_BOUND: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):
    dq_ptr, dk_ptr, dv_ptr, part_ptr = pointers
    stride_dqb, stride_dkb = strides
    bounds_ptr, keep_ptr, mask_ptr, stride_mb, stride_mn = sample
    M, N, num_heads = sizes
    kv_full, kv_empty, q_full, q_empty, ds_full, ds_empty = bars
    lse_smem, delta_smem = rows_smem
    SIZES: gl.constexpr = feature_blocks(D)
    COUNT: gl.constexpr = len(SIZES)
    dtype: gl.constexpr = dq_ptr.dtype.element_ty
    IS_RAGGED: gl.constexpr = IS_PACKED or HAS_LENGTHS or HAS_MASK
    part_ptr += gl.program_id(0).to(gl.int64) * (TILES * 64 * padded_dim(D))
    slab = 0
    slot = 0
    step = 0
    for head in tl.range(gl.program_id(0), num_heads, gl.num_programs(0), disable_licm=True):
        b = (head // H).to(gl.int64)
        h = head % H
        first, num_queries, num_keys = find_sample(
            b, M, N, bounds_ptr, IS_PACKED, HAS_LENGTHS, IS_BOUND
        )
        dq = dq_ptr + (b * stride_dqb + first * STRIDE_D + h * D)
        dk = dk_ptr + (b * stride_dkb + first * STRIDE_D + h * D)
        dv = dv_ptr + (b * stride_dkb + first * STRIDE_D + h * D)
        keep = keep_ptr + b * N
        mask = mask_ptr + b * stride_mb
        if (num_queries > 0) & (num_keys > 0):
            for n in tl.range(0, num_keys, 128, disable_licm=True):
                stage = slab % STAGES
                mbarrier.wait(kv_full.index(stage), (slab // STAGES) & 1)
                k_all = stage_of(kv[0], stage)
                own = n + 64 * number
                is_last = n + 128 >= num_keys
                if own < num_keys:
                    k = half_of(k_all, number)
                    v = half_of(stage_of(kv[1], stage), number)
                    offs_n = own + gl.arange(0, 64, rows_of(64))
                    _, takes_part = key_rows(
                        offs_n, num_keys, keep, mask, stride_mn, HAS_KEEP, HAS_MASK
                    )
                    dk_acc = zeros(D)
                    dv_acc = zeros(D)
                    for m in tl.range(0, num_queries, 64, disable_licm=True):
                        place = slot % SLOTS
                        buf = slot % 2
                        row = (step % 2) * TILES + m // 64
                        mbarrier.wait(q_full.index(place), (slot // SLOTS) & 1)
                        fence_async_shared()
                        q = stage_of(qdo[0], place)
                        do = stage_of(qdo[1], place)
                        st = gl.zeros([64, 64], gl.float32, mma(64))
                        dp = gl.zeros([64, 64], gl.float32, mma(64))
                        for i in gl.static_range(COUNT):
                            st = warpgroup_mma(
                                k[i], q[i].permute((1, 0)), st, use_acc=i > 0, is_async=True
                            )
                        for i in gl.static_range(COUNT):
                            dp = warpgroup_mma(
                                v[i], do[i].permute((1, 0)), dp, use_acc=i > 0, is_async=True
                            )
                        lse = lse_smem.index(row).load(columns_of(64))
                        delta = delta_smem.index(row).load(columns_of(64))
                        st = wait_for((st,), COUNT)[0]
                        p = gl.exp2(st * (scale * LOG2E) - lse[None, :])
                        # exp2(0 - lse) may be inf, and inf times the zeros of k is not zero.
                        p = gl.where(takes_part[:, None], p, 0.0)
                        new_dv = ()
                        for i in gl.static_range(COUNT):
                            operand = gl.convert_layout(p.to(dtype), left_of(get(SIZES, i)))
                            new_dv = new_dv + (
                                warpgroup_mma(operand, do[i], dv_acc[i], is_async=True),
                            )
                        dp = wait_for((dp,), COUNT)[0]
                        ds = (p * (dp - delta[None, :])).to(dtype)
                        mbarrier.wait(ds_empty.index(buf), ((slot // 2) & 1) ^ 1)
                        ds_smem.index(buf).slice(64 * number, 64).store(ds)
                        fence_async_shared()
                        mbarrier.arrive(ds_full.index(buf), count=1)
                        new_dk = ()
                        for i in gl.static_range(COUNT):
                            operand = gl.convert_layout(ds, left_of(get(SIZES, i)))
                            new_dk = new_dk + (
                                warpgroup_mma(operand, q[i], dk_acc[i], is_async=True),
                            )
                        done = wait_for(new_dv + new_dk, 0)
                        dv_acc = part_of(done, 0, COUNT)
                        dk_acc = part_of(done, COUNT, COUNT)
                        mbarrier.arrive(q_empty.index(place), count=1)
                        if (m // 64) % 2 == number:
                            _add_dq(
                                dq,
                                part_ptr,
                                scale,
                                m,
                                n,
                                is_last,
                                num_queries,
                                M,
                                keep,
                                k_all,
                                ds_smem.index(buf),
                                lse_smem.index(row),
                                ds_full.index(buf),
                                ds_empty.index(buf),
                                (slot // 2) & 1,
                                D,
                                STRIDE_D,
                                HAS_LENGTHS,
                                HAS_KEEP,
                                IS_RAGGED,
                            )
                        slot += 1
                    dk_out = ()
                    dv_out = ()
                    for i in gl.static_range(COUNT):
                        x = dk_acc[i] * scale
                        y = dv_acc[i]
                        if IS_RAGGED:
                            counts = gl.convert_layout(takes_part, rows_of(get(SIZES, i)))
                            x = gl.where(counts[:, None], x, 0.0)
                            y = gl.where(counts[:, None], y, 0.0)
                        dk_out = dk_out + (x,)
                        dv_out = dv_out + (y,)
                    num_inside = N if HAS_LENGTHS else num_keys
                    store_rows(dk, own, num_inside, keep, dk_out, D, STRIDE_D, HAS_KEEP)
                    store_rows(dv, own, num_inside, keep, dv_out, D, STRIDE_D, HAS_KEEP)
                else:
                    # Its half of the slab has no keys: zeros as dS, and its share of dQ.
                    for m in tl.range(0, num_queries, 64, disable_licm=True):
                        place = slot % SLOTS
                        buf = slot % 2
                        row = (step % 2) * TILES + m // 64
                        mbarrier.wait(q_full.index(place), (slot // SLOTS) & 1)
                        mbarrier.arrive(q_empty.index(place), count=1)
                        mbarrier.wait(ds_empty.index(buf), ((slot // 2) & 1) ^ 1)
                        ds_smem.index(buf).slice(64 * number, 64).store(
                            gl.zeros([64, 64], dtype, row_copies(64))
                        )
                        fence_async_shared()
                        mbarrier.arrive(ds_full.index(buf), count=1)
                        if (m // 64) % 2 == number:
                            _add_dq(
                                dq,
                                part_ptr,
                                scale,
                                m,
                                n,
                                is_last,
                                num_queries,
                                M,
                                keep,
                                k_all,
                                ds_smem.index(buf),
                                lse_smem.index(row),
                                ds_full.index(buf),
                                ds_empty.index(buf),
                                (slot // 2) & 1,
                                D,
                                STRIDE_D,
                                HAS_LENGTHS,
                                HAS_KEEP,
                                IS_RAGGED,
                            )
                        slot += 1
                # Both have read K for dQ when both have arrived here.
                mbarrier.arrive(kv_empty.index(stage), count=1)
                slab += 1
            step += 1
        else:
            num_queries = num_queries * 0
            num_keys = num_keys * 0
        if HAS_LENGTHS:
            # Tiles and blocks behind a length, or of a sample without keys.
            for tile in tl.range((num_queries + 63) // 64, (M + 63) // 64, disable_licm=True):
                if tile % 2 == number:
                    store_rows(dq, tile * 64, M, keep, zeros(D), D, STRIDE_D, False)
            for tile in tl.range((num_keys + 63) // 64, (N + 63) // 64, disable_licm=True):
                if tile % 2 == number:
                    store_rows(dk, tile * 64, N, keep, zeros(D), D, STRIDE_D, False)
                    store_rows(dv, tile * 64, N, keep, zeros(D), D, STRIDE_D, False)


@gluon.jit
def _add_dq(
    dq_ptr,
    part_ptr,
    scale,
    m,
    n,
    is_last,
    num_queries,
    M,
    keep_ptr,
    k,
    ds_smem,
    lse_smem,
    ds_full,
    ds_empty,
    parity,
    D: gl.constexpr,
    STRIDE_D: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    IS_RAGGED: gl.constexpr,
):
    """A slab's part of a tile's dQ: to the parts before, or with them to its place."""
    SIZES: gl.constexpr = feature_blocks(D)
    COUNT: gl.constexpr = len(SIZES)
    mbarrier.wait(ds_full, parity)
    fence_async_shared()
    x = ()
    for i in gl.static_range(COUNT):
        nothing = gl.zeros([64, get(SIZES, i)], gl.float32, mma(get(SIZES, i)))
        x = x + (
            warpgroup_mma(ds_smem.permute((1, 0)), k[i], nothing, use_acc=False, is_async=True),
        )
    x = wait_for(x, 0)
    mbarrier.arrive(ds_empty, count=1)
    sums = ()
    for i in gl.static_range(COUNT):
        ptrs = _part_ptrs(part_ptr + m * padded_dim(D) + 64 * start_of(SIZES, i), get(SIZES, i))
        y = x[i]
        if n > 0:
            y += gl.load(ptrs)
        if not is_last:
            gl.store(ptrs, y)
        sums = sums + (y,)
    if is_last:
        out = ()
        for i in gl.static_range(COUNT):
            y = sums[i] * scale
            if IS_RAGGED:
                # NaN of a row without keys ends here.
                offs_m = m + gl.arange(0, 64, rows_of(get(SIZES, i)))
                has_keys = lse_smem.load(rows_of(get(SIZES, i))) != float("inf")
                y = gl.where(((offs_m < num_queries) & has_keys)[:, None], y, 0.0)
            out = out + (y,)
        num_inside = M if HAS_LENGTHS else num_queries
        store_rows(dq_ptr, m, num_inside, keep_ptr, out, D, STRIDE_D, HAS_KEEP)


@gluon.jit
def _part_ptrs(ptr, WIDTH: gl.constexpr):
    """Where a warp group's threads keep a block of a tile's dQ."""
    rows = gl.arange(0, 64, rows_of(WIDTH))
    cols = gl.arange(0, WIDTH, columns_of(WIDTH))
    return ptr + (rows[:, None] * WIDTH + cols[None, :])


@gluon.jit(do_not_specialize=["M", "N", "num_heads"])
def gluon_bwd_kernel(
    do_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    part_ptr,
    bounds_ptr,
    keep_ptr,
    mask_ptr,
    scale,
    M,
    N,
    num_heads,
    stride_dob,
    stride_qb,
    stride_kb,
    stride_vb,
    stride_ob,
    stride_dqb,
    stride_dkb,
    stride_mb,
    stride_mn,
    H: gl.constexpr,
    D: gl.constexpr,
    STRIDE_DOM: gl.constexpr,
    STRIDE_DOH: gl.constexpr,
    STRIDE_QM: gl.constexpr,
    STRIDE_QH: gl.constexpr,
    STRIDE_KN: gl.constexpr,
    STRIDE_KH: gl.constexpr,
    STRIDE_VN: gl.constexpr,
    STRIDE_VH: gl.constexpr,
    STRIDE_D: gl.constexpr,
    IS_PACKED: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
    IS_BOUND: gl.constexpr,
    HAS_KEEP: gl.constexpr,
    HAS_MASK: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """STAGES slabs of keys and values, SLOTS tiles of queries; up to TILES tiles a head.

    Strides of samples that are given are in units of 8.
    """
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    kv = (buffers(dtype, STAGES, 128, D), buffers(dtype, STAGES, 128, D))
    qdo = (buffers(dtype, SLOTS, 64, D), buffers(dtype, SLOTS, 64, D))
    ds_smem = gl.allocate_shared_memory(dtype, [2, 128, 64], swizzled(64))
    # Rows of two heads: two stages of keys keep the producer from being further ahead.
    gl.static_assert(STAGES == 2)
    rows_smem = (
        gl.allocate_shared_memory(gl.float32, [2 * TILES, 64], flat()),
        gl.allocate_shared_memory(gl.float32, [2 * TILES, 64], flat()),
    )
    # A copy arrives once per thread of the producer, lse and delta once more.
    bars = (
        barriers(STAGES, 128),
        barriers(STAGES, 2),
        barriers(SLOTS, 129),
        barriers(SLOTS, 2),
        barriers(2, 2),
        barriers(2, 1),
    )
    sample = (bounds_ptr, keep_ptr, mask_ptr, stride_mb, stride_mn)
    sizes = (M, N, num_heads)
    sources = (do_ptr, q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr)
    strides = (stride_dob, stride_qb, stride_kb, stride_vb, stride_ob)
    results = (dq_ptr, dk_ptr, dv_ptr, part_ptr)
    result_strides = (stride_dqb, stride_dkb)
    # Constants lose their constancy in a tuple with a name.
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0,
                    results,
                    result_strides,
                    sample,
                    sizes,
                    scale,
                    kv,
                    qdo,
                    ds_smem,
                    rows_smem,
                    bars,
                    H,
                    D,
                    STRIDE_D,
                    IS_PACKED,
                    HAS_LENGTHS,
                    IS_BOUND,
                    HAS_KEEP,
                    HAS_MASK,
                    TILES,
                    STAGES,
                    SLOTS,
                ),
            ),
            (
                _consume,
                (
                    1,
                    results,
                    result_strides,
                    sample,
                    sizes,
                    scale,
                    kv,
                    qdo,
                    ds_smem,
                    rows_smem,
                    bars,
                    H,
                    D,
                    STRIDE_D,
                    IS_PACKED,
                    HAS_LENGTHS,
                    IS_BOUND,
                    HAS_KEEP,
                    HAS_MASK,
                    TILES,
                    STAGES,
                    SLOTS,
                ),
            ),
            (
                _produce,
                (
                    sources,
                    strides,
                    sample,
                    sizes,
                    kv,
                    qdo,
                    rows_smem,
                    bars,
                    H,
                    D,
                    STRIDE_DOM,
                    STRIDE_DOH,
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
                    TILES,
                    STAGES,
                    SLOTS,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
