"""Second and third kernel of the search: from group maxima to the exact first K, and the pick.

Legend: V views, n rows per view, B = V * n rows searched, Q slots, D features, K neighbours, G
groups of slots, C candidates per row, pairs of slots, L entries of a row's list.

`_select_kernel` scores the pairs whose group's maximum comes near the K-th exactly, and certifies
that nothing else can be among the first K. `_finish_kernel` searches by brute force where that
failed, and writes results and pick. One program does one row.
"""

import triton
import triton.language as tl

from maect_fast.kernels.queue_topk.triton_queue import NUM_BOUNDS, TILE, _row_norm
from maect_fast.kernels.queue_topk.triton_score import (
    INFINITY,
    PAIR,
    SMALLEST,
    STRIDE,
    _load_slice,
)

# A list's entry: a score whose bits order as integers do, then the slot, complemented. Below all
# scores come, in this order, NaN and -inf, own slots, no slot at all.
UNORDERED = tl.constexpr(-(1 << 31) + 2)
OWN = tl.constexpr(-(1 << 31) + 1)
EMPTY = tl.constexpr(-(1 << 31))
WORD = tl.constexpr(0xFFFFFFFF)
# The cut lies a little more than one margin below the K-th group maximum: the K-th exact score may
# be smaller than that.
CAUTION = tl.constexpr(1.25)
# The upper half of -inf.
LEAST = tl.constexpr(-128)


@triton.jit
def _slot(entry):
    return WORD - (entry & WORD)


@triton.jit
def _score(entry):
    """The score in a list's entry, -inf for what is none."""
    ordered = (entry >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(ordered > UNORDERED, bits.to(tl.float32, bitcast=True), -INFINITY)


@triton.jit
def _exact(
    query_ptr, queue_ptr, slot, mask, D, norm, stride_qq, BLOCK_D: tl.constexpr, N: tl.constexpr
):
    """Scores of slots [N]: exact products of fp32 numbers, summed in fp64, rounded to fp32."""
    acc = tl.zeros((N,), tl.float64)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(query_ptr + offs_d, offs_d < D, other=0.0).to(tl.float32)
        unit = tl.div_rn(x, norm)
        c = _load_slice(queue_ptr + slot * stride_qq, mask, d, D, BLOCK_D)
        acc += tl.sum(unit.to(tl.float64)[None, :] * c.to(tl.float64), axis=1)
    return acc.to(tl.float32)


@triton.jit
def _entries(score, slot, mask, query_id, queue_id_ptr):
    """List entries of scored slots: own slots below all others, masked ones below these."""
    # Both zeros are one number.
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(score > -INFINITY, ordered, UNORDERED)
    if queue_id_ptr is not None:
        own = (tl.load(queue_id_ptr + slot, mask, other=-1) == query_id) & (query_id != -1)
        ordered = tl.where(own, OWN, ordered)
    ordered = tl.where(mask, ordered, EMPTY)
    return (ordered.to(tl.int64) << 32) | (WORD - slot)


@triton.jit
def _merge(list_ptr, entries, N: tl.constexpr, L: tl.constexpr):
    """Make the list [L], in descending order, that of the L largest of itself and entries [N]."""
    offs_l, offs_n = tl.arange(0, L), tl.arange(0, N)
    tl.debug_barrier()
    listed = tl.load(list_ptr + offs_l)
    # Of equal ones, all of them empty, listed come before new ones, each in their order.
    rank_l = tl.sum((listed[:, None] < entries[None, :]).to(tl.int32), axis=1) + offs_l
    rank_n = tl.sum((entries[:, None] <= listed[None, :]).to(tl.int32), axis=1)
    above = (entries[:, None] < entries[None, :]) | (
        (entries[:, None] == entries[None, :]) & (offs_n[:, None] > offs_n[None, :])
    )
    rank_n += tl.sum(above.to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(list_ptr + rank_l, listed, rank_l < L)
    tl.store(list_ptr + rank_n, entries, rank_n < L)
    tl.debug_barrier()


@triton.jit
def _begin_list(list_ptr, before_ptr, L: tl.constexpr):
    """The list of the parts of the queue searched before, or an empty one."""
    offs_l = tl.arange(0, L)
    if before_ptr is not None:
        listed = tl.load(before_ptr + offs_l)
    else:
        listed = tl.full((L,), EMPTY, tl.int64) << 32
    tl.store(list_ptr + offs_l, listed)


@triton.jit
def _margin(
    query_ptr,
    bound_ptr,
    norm,
    num_tiles,
    D,
    IS_INT8: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """How far any score of the row's may be from the exact one, by Cauchy-Schwarz."""
    largest = SMALLEST
    if IS_INT8:
        for d in range(0, D, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            x = tl.load(query_ptr + offs_d, offs_d < D, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(tl.div_rn(x, norm))))
    square, residual = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        x = tl.load(query_ptr + offs_d, offs_d < D, other=0.0).to(tl.float32)
        unit = tl.div_rn(x, norm)
        if IS_INT8:
            rounded = tl.floor(unit * (127 / largest) + 0.5) * (largest / 127)
        else:
            rounded = unit.to(tl.float16).to(tl.float32)
        rounded, unit = rounded.to(tl.float64), unit.to(tl.float64)
        square += tl.sum(rounded * rounded)
        residual += tl.sum((unit - rounded) * (unit - rounded))
    furthest, longest = 0.0, 0.0
    for t in range(0, num_tiles, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        bound_ptrs = bound_ptr + offs_t * NUM_BOUNDS
        furthest = tl.maximum(furthest, tl.max(tl.load(bound_ptrs, offs_t < num_tiles, other=0.0)))
        longest = tl.maximum(
            longest, tl.max(tl.load(bound_ptrs + 1, offs_t < num_tiles, other=0.0))
        )
    # Sums of D products, the tag, and what normalising in another order changes.
    relative = D * 2.0**-22 + (MASK + 1) * 2.0**-23 + 2.0**-20
    norm_q = tl.sqrt(square).to(tl.float32)
    margin = tl.sqrt(residual).to(tl.float32) * longest + norm_q * furthest
    # No product of these numbers that vanishes is larger than the last one.
    return 1.001 * (margin + relative * norm_q * (longest + furthest)) + SMALLEST


@triton.jit(do_not_specialize=["start", "n", "k", "offset", "end"])
def _select_kernel(
    query_ptr,
    queue_ptr,
    query_id_ptr,
    queue_id_ptr,
    bound_ptr,
    first_ptr,
    second_ptr,
    before_ptr,
    list_ptr,
    candidate_ptr,
    verdict_ptr,
    start,
    n,
    k,
    offset,
    end,
    num_groups,
    stride_qb,
    stride_qq,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    IS_INT8: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row: the groups that matter, exact scores of their best pairs, and a verdict.

    The verdict is infinite if the list is right, else all slots whose score may reach it matter.
    """
    MASK: tl.constexpr = SPAN // STRIDE // PAIR - 1
    row = tl.program_id(0).to(tl.int64)
    query_ptr += row * stride_qb
    first_ptr += row * num_groups
    second_ptr += row * num_groups
    list_ptr += row * L
    candidate_ptr += row * C
    if before_ptr is not None:
        before_ptr += row * L
    query_id = tl.full((), -1, tl.int64)
    if query_id_ptr is not None:
        query_id = tl.load(query_id_ptr + (start + row) % n)
    norm = _norm(query_ptr, D, BLOCK_D)
    num_tiles = tl.cdiv(end - offset, TILE)
    margin = _margin(query_ptr, bound_ptr, norm, num_tiles, D, IS_INT8, MASK, BLOCK_D, 512)

    # The K-th largest group maximum, from below: K slots score so much, less a margin.
    offs_g = tl.arange(0, BLOCK_G)
    score = tl.load(first_ptr + offs_g, offs_g < num_groups, other=-INFINITY)
    # Of a group without a number.
    score = tl.where(score == score, score, -INFINITY)
    needed = k
    if query_id_ptr is not None:
        # A slot or two may be the row's own.
        needed += 4
    count = tl.sum((score > -INFINITY).to(tl.int32))
    low = tl.min(tl.where(score > -INFINITY, score, INFINITY))
    high = tl.max(score)
    is_cut = count >= needed
    trial = 0
    while (count > needed) & (trial < 32):
        middle = 0.5 * low + 0.5 * high
        above = tl.sum((score >= middle).to(tl.int32))
        low = tl.where(above >= needed, middle, low)
        high = tl.where(above >= needed, high, middle)
        count = tl.where(above >= needed, above, count)
        trial += 1
    cut = tl.where(is_cut & (margin < INFINITY), low - CAUTION * margin, -INFINITY)
    matters = (score >= cut) & (score > -INFINITY)
    count = tl.sum(matters.to(tl.int32))
    place = tl.cumsum(matters.to(tl.int32)) - 1
    tl.store(candidate_ptr + place, offs_g, matters & (place < C))
    tl.debug_barrier()

    _begin_list(list_ptr, before_ptr, L)
    num_pairs = tl.minimum(count, C)
    is_stale = tl.zeros((), tl.int1)
    highest = -INFINITY
    for c in range(0, num_pairs, BLOCK_C):
        offs_e = c * PAIR + tl.arange(0, BLOCK_C * PAIR)
        is_listed = offs_e // PAIR < num_pairs
        group = tl.load(candidate_ptr + offs_e // PAIR, is_listed, other=0)
        rough = tl.load(first_ptr + group)
        member = (rough.to(tl.int32, bitcast=True) & MASK) * PAIR + offs_e % PAIR
        slot = offset + (group // STRIDE).to(tl.int64) * SPAN + member * STRIDE + group % STRIDE
        mask = is_listed & (slot < end)
        exact = _exact(
            query_ptr, queue_ptr, slot, mask, D, norm, stride_qq, BLOCK_D, BLOCK_C * PAIR
        )
        entries = _entries(exact, slot, mask, query_id, queue_id_ptr)
        _merge(list_ptr, entries, BLOCK_C * PAIR, L)
        # Scores further off than rounding explains: the shadow is not this queue's.
        exact_pairs = exact.reshape(BLOCK_C, PAIR)
        distance = tl.abs(
            tl.max(exact_pairs, axis=1) - tl.max(rough.reshape(BLOCK_C, PAIR), axis=1)
        )
        is_number = tl.sum(exact_pairs, axis=1) == tl.sum(exact_pairs, axis=1)
        is_far = is_number & (distance > margin) & (c + tl.arange(0, BLOCK_C) < num_pairs)
        is_stale |= tl.max(is_far.to(tl.int32)) > 0
        rest = tl.load(second_ptr + group, is_listed, other=LEAST).to(tl.int32) << 16
        highest = tl.maximum(highest, tl.max(rest.to(tl.float32, bitcast=True)))

    # The other pairs of a group count where the second maximum reaches the K-th score.
    kth = _score(tl.load(list_ptr + k - 1))
    if (highest >= kth - margin) & (margin < INFINITY):
        for i in range(num_pairs):
            group_i = tl.load(candidate_ptr + i)
            rest_i = tl.load(second_ptr + group_i).to(tl.int32) << 16
            if rest_i.to(tl.float32, bitcast=True) >= kth - margin:
                number = tl.load(first_ptr + group_i).to(tl.int32, bitcast=True) & MASK
                base = offset + (group_i // STRIDE).to(tl.int64) * SPAN + group_i % STRIDE
                for m in range(0, SPAN // STRIDE, 16):
                    member_i = m + tl.arange(0, 16)
                    slot_i = base + member_i * STRIDE
                    mask_i = (slot_i < end) & (member_i // PAIR != number)
                    exact_i = _exact(
                        query_ptr, queue_ptr, slot_i, mask_i, D, norm, stride_qq, BLOCK_D, 16
                    )
                    entries_i = _entries(exact_i, slot_i, mask_i, query_id, queue_id_ptr)
                    _merge(list_ptr, entries_i, 16, L)
                kth = _score(tl.load(list_ptr + k - 1))

    # What was left out scores below cut + margin.
    is_right = (count <= C) & (kth > -INFINITY) & (kth >= cut + margin)
    # Without a margin, no group maximum tells anything.
    margin = tl.where(is_stale, INFINITY, margin)
    reach = tl.where(margin < INFINITY, kth - margin, -INFINITY)
    tl.store(verdict_ptr + row * 2, tl.where(is_right & (margin < INFINITY), INFINITY, reach))
    tl.store(verdict_ptr + row * 2 + 1, margin)


@triton.jit
def _norm(query_ptr, D, BLOCK_D: tl.constexpr):
    """max(norm, EPS) of one row, as `_row_norm`."""
    only = tl.zeros((1,), tl.int64)
    return tl.sum(_row_norm(query_ptr + only, only[:, None] == 0, D, BLOCK_D, 1))


@triton.jit
def _scalar(x):
    """A number, or the number at an address."""
    if x.dtype.is_ptr():
        x = tl.load(x)
    return x


@triton.jit
def _word(x):
    """The low 32 bits."""
    return (x.to(tl.int64) & WORD).to(tl.uint32)


@triton.jit(
    do_not_specialize=["start", "n", "k", "offset", "end", "seed", "step", "view", "row_number"]
)
def _finish_kernel(
    query_ptr,
    queue_ptr,
    query_id_ptr,
    queue_id_ptr,
    query_label_ptr,
    queue_label_ptr,
    first_ptr,
    before_ptr,
    list_ptr,
    verdict_ptr,
    rank_ptr,
    row_ptr,
    values_ptr,
    indices_ptr,
    picked_ptr,
    neighbour_ptr,
    hit_ptr,
    seed,
    step,
    view,
    row_number,
    start,
    n,
    k,
    offset,
    end,
    num_groups,
    stride_qb,
    stride_qq,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    IS_LAST: tl.constexpr,
    HAS_PICK: tl.constexpr,
    L: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row: search by brute force what the verdict tells, then write the list and the pick."""
    row = tl.program_id(0).to(tl.int64)
    list_ptr += row * L
    reach = tl.load(verdict_ptr + row * 2)
    if reach < INFINITY:
        margin = tl.load(verdict_ptr + row * 2 + 1)
        query_id = tl.full((), -1, tl.int64)
        if query_id_ptr is not None:
            query_id = tl.load(query_id_ptr + (start + row) % n)
        if before_ptr is not None:
            _begin_list(list_ptr, before_ptr + row * L, L)
        else:
            _begin_list(list_ptr, None, L)
        x_ptr = query_ptr + row * stride_qb
        norm = _norm(x_ptr, D, BLOCK_D)
        for span in range(num_groups // STRIDE):
            group_ptrs = first_ptr + row * num_groups + span * STRIDE + tl.arange(0, STRIDE)
            score = tl.load(group_ptrs)
            if tl.max(tl.where(score == score, score, -INFINITY)) >= reach:
                for s in range(0, SPAN, BLOCK_Q):
                    slot = offset + tl.cast(span, tl.int64) * SPAN + s + tl.arange(0, BLOCK_Q)
                    mask = slot < end
                    exact = _exact(
                        x_ptr, queue_ptr, slot, mask, D, norm, stride_qq, BLOCK_D, BLOCK_Q
                    )
                    entries = _entries(exact, slot, mask, query_id, queue_id_ptr)
                    if tl.max(entries) > tl.load(list_ptr + k - 1):
                        _merge(list_ptr, entries, BLOCK_Q, L)
                kth = _score(tl.load(list_ptr + k - 1))
                reach = tl.maximum(reach, tl.where(margin < INFINITY, kth - margin, -INFINITY))
    if IS_LAST:
        offs_l = tl.arange(0, L)
        entry = tl.load(list_ptr + offs_l)
        value = tl.where((entry >> 32) == OWN, -1.0, _score(entry))
        tl.store(values_ptr + row * k + offs_l, value, offs_l < k)
        tl.store(indices_ptr + row * k + offs_l, _slot(entry), offs_l < k)
        if HAS_PICK:
            view_row, i = (start + row) // n, (start + row) % n
            if rank_ptr is None:
                number = _scalar(row_number) + i
                if row_ptr is not None:
                    number = tl.load(row_ptr + i)
                word, _, _, _ = tl.philox(
                    _scalar(seed),
                    _word(number),
                    _word(_scalar(view) + view_row),
                    _word(_scalar(step)),
                    _word(_scalar(step).to(tl.int64) >> 32),
                )
                rank = tl.umulhi(word, _word(k)).to(tl.int64)
            else:
                rank = tl.minimum(tl.maximum(tl.load(rank_ptr + row), 0), k - 1)
            slot = _slot(tl.load(list_ptr + rank))
            tl.store(picked_ptr + row, slot)
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                c = tl.load(queue_ptr + slot * stride_qq + offs_d, offs_d < D)
                tl.store(neighbour_ptr + row * D + offs_d, c, offs_d < D)
            if query_label_ptr is not None:
                label = tl.load(query_label_ptr + i)
                is_hit = (tl.load(queue_label_ptr + slot) == label) & (label >= 0)
                tl.store(hit_ptr + row, is_hit)
