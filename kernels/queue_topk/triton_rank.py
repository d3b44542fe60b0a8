"""Second and third kernel of the search: from group maxima to the exact first K, and the pick.

Legend: V views, n rows per view, B = V * n rows searched, Q slots, D features, K neighbours, G
groups of slots, C candidates of a row, pairs of slots, N places of its list.

`_rank_kernel` scores the pairs whose group's maximum comes near the K-th exactly, certifies that
nothing else can be among the first K, and writes what it certified. `_rescue_kernel` makes good the
rows that failed.
"""

import triton
import triton.language as tl

from maect_fast.kernels.queue_topk.triton_exact import (
    EMPTY,
    NOTHING,
    OWN,
    WORD,
    _append,
    _append_group,
    _begin,
    _entries,
    _exact,
    _make_room,
    _places,
    _score,
    _slot,
)
from maect_fast.kernels.queue_topk.triton_queue import EPS
from maect_fast.kernels.queue_topk.triton_score import (
    AGAIN_ERROR,
    AGAIN_ROWS,
    INFINITY,
    PAIR,
    SMALLEST,
    STRIDE,
    _score_again,
)

# The cut lies a little more than one margin below the K-th group maximum: the K-th exact score may
# be smaller than that.
CAUTION = tl.constexpr(1.25)
# The upper half of -inf.
LEAST = tl.constexpr(-128)
# Features of a query that are read at a time.
BLOCK_D = tl.constexpr(256)
# What a row's verdict tells the rescue, in fp32: least score that matters, infinite if the row is
# done; margin, as it is and of scores made again; groups that matter, 0 where scoring again would
# not make them fewer; norm of the query.
VERDICT = tl.constexpr(5)
# AGAIN_ROWS rows are scored again together where they want so many times the queue's groups: to
# do so takes a program about as long as it takes the rows' own programs to walk those. Estimated.
WORTH = tl.constexpr(4)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _maximum(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _load_query(query_ptr, d, D):
    offs_d = d + tl.arange(0, BLOCK_D)
    return tl.load(query_ptr + offs_d, offs_d < D, other=0.0).to(tl.float32)


@triton.jit
def _norm(query_ptr, x, D):
    """max(norm, EPS) of a row whose beginning is x; exact squares, summed in fp64, to fp32."""
    square = tl.sum(x.to(tl.float64) * x.to(tl.float64))
    for d in range(BLOCK_D, D, BLOCK_D):
        y = _load_query(query_ptr, d, D).to(tl.float64)
        square += tl.sum(y * y)
    norm = tl.sqrt(square).to(tl.float32)
    # NaN stays NaN.
    return tl.where(norm < EPS, EPS, norm)


@triton.jit
def _rounded_norms(query_ptr, x, norm, D: tl.constexpr, IS_INT8: tl.constexpr):
    """Of a row as it was multiplied, the norm and the distance to the exact one; about."""
    largest = SMALLEST
    if IS_INT8:
        largest = tl.maximum(largest, tl.max(tl.abs(tl.div_rn(x, norm))))
        for d in range(BLOCK_D, D, BLOCK_D):
            y = _load_query(query_ptr, d, D)
            largest = tl.maximum(largest, tl.max(tl.abs(tl.div_rn(y, norm))))
    square, residual = _squares(x, norm, largest, IS_INT8)
    for d in range(BLOCK_D, D, BLOCK_D):
        y = _load_query(query_ptr, d, D)
        more_square, more_residual = _squares(y, norm, largest, IS_INT8)
        square += more_square
        residual += more_residual
    return tl.sqrt(square), tl.sqrt(residual)


@triton.jit
def _squares(x, norm, largest, IS_INT8: tl.constexpr):
    unit = tl.div_rn(x, norm)
    if IS_INT8:
        rounded = tl.floor(unit * (127 / largest) + 0.5) * (largest / 127)
    else:
        rounded = unit.to(tl.float16).to(tl.float32)
    return tl.reduce((rounded * rounded, (unit - rounded) * (unit - rounded)), 0, _add)


@triton.jit
def _cut(score, needed):
    """A bound that at least `needed` of the group maxima reach, and few more; -inf without one."""
    is_score = score > -INFINITY
    count = tl.sum(is_score.to(tl.int32))
    low = tl.min(tl.where(is_score, score, INFINITY))
    high = tl.max(score)
    is_cut = count >= needed
    enough = needed + needed // 8 + 2
    trial = 0
    while (count > enough) & (trial < 32):
        middle = 0.5 * low + 0.5 * high
        above = tl.sum((score >= middle).to(tl.int32))
        low = tl.where(above >= needed, middle, low)
        high = tl.where(above >= needed, high, middle)
        count = tl.where(above >= needed, above, count)
        trial += 1
    return tl.where(is_cut, low, -INFINITY)


@triton.jit
def _rank_row(
    query_ptr,
    queue_ptr,
    query_id,
    queue_id_ptr,
    second_ptr,
    before_ptr,
    candidate_ptr,
    entry_ptr,
    score,
    norm,
    margin,
    k,
    offset,
    end,
    stride_qq,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first K by the group maxima `score` [BLOCK_G], which are right to a margin.

    Returns:
        the list and its places; the least score that matters beside it (infinite: nothing does);
        the margin, infinite if it does not hold; and a bound that K group maxima reach.
    """
    MASK: tl.constexpr = SPAN // STRIDE // PAIR - 1
    offs_g, offs_c = tl.arange(0, BLOCK_G), tl.arange(0, C)
    needed = k
    if queue_id_ptr is not None:
        # A slot or two may be the row's own.
        needed += 4
    top = _cut(score, needed)
    cut = tl.where(margin < INFINITY, top - CAUTION * margin, -INFINITY)
    matters = (score >= cut) & (score > -INFINITY)
    count = tl.sum(matters.to(tl.int32))
    place = tl.cumsum(matters.to(tl.int32)) - 1
    # Beside it the score, which saves looking it up.
    matters &= place < C
    tl.store(candidate_ptr + place, offs_g, matters)
    tl.store(candidate_ptr + C + place, score.to(tl.int32, bitcast=True), matters)
    stored = _begin(entry_ptr, before_ptr, L)
    tl.debug_barrier()

    num_pairs = tl.minimum(count, C)
    is_listed = offs_c < num_pairs
    group = tl.load(candidate_ptr + offs_c, is_listed, other=0)
    rest = tl.load(second_ptr + group, is_listed, other=LEAST).to(tl.int32) << 16
    rest = rest.to(tl.float32, bitcast=True)
    is_stale = tl.zeros((), tl.int1)
    bar = tl.full((), NOTHING, tl.int64)
    for c in range(0, num_pairs, BLOCK_C):
        stored, bar = _make_room(entry_ptr, stored, bar, k, BLOCK_C * PAIR, N, BLOCK_N)
        offs_e = c * PAIR + tl.arange(0, BLOCK_C * PAIR)
        is_pair = offs_e // PAIR < num_pairs
        group_e = tl.load(candidate_ptr + offs_e // PAIR, is_pair, other=0)
        rough = tl.load(candidate_ptr + C + offs_e // PAIR, is_pair, other=0)
        member = (rough & MASK) * PAIR + offs_e % PAIR
        slot = offset + (group_e // STRIDE).to(tl.int64) * SPAN
        slot += member * STRIDE + group_e % STRIDE
        mask = is_pair & (slot < end)
        exact = _exact(query_ptr, queue_ptr, slot, mask, norm, stride_qq, D, BLOCK_C * PAIR)
        entries = _entries(exact, slot, mask, query_id, queue_id_ptr)
        stored = _append(entry_ptr, stored, entries, mask & (entries > bar))
        # Scores further off than rounding explains: the shadow is not this queue's.
        pairs = exact.reshape(BLOCK_C, PAIR)
        rough = rough.to(tl.float32, bitcast=True).reshape(BLOCK_C, PAIR)
        distance = tl.abs(tl.max(pairs, axis=1) - tl.max(rough, axis=1))
        total = tl.sum(pairs, axis=1)
        is_far = (total == total) & (distance > margin)
        is_far &= c + tl.arange(0, BLOCK_C) < num_pairs
        is_stale |= tl.max(is_far.to(tl.int32)) > 0
    entry, place, kth = _places(entry_ptr, stored, k, N, BLOCK_N)

    # The other pairs of a group count where the second maximum reaches the K-th score.
    bar = tl.maximum(bar, kth)
    c = _next_candidate(rest, is_listed, -1, bar, margin, C)
    if c < C:
        while c < C:
            stored, bar = _append_group(
                entry_ptr,
                stored,
                bar,
                tl.load(candidate_ptr + c),
                tl.load(candidate_ptr + C + c) & MASK,
                query_ptr,
                queue_ptr,
                query_id,
                queue_id_ptr,
                norm,
                k,
                offset,
                end,
                stride_qq,
                D,
                SPAN,
                N,
                BLOCK_N,
            )
            c = _next_candidate(rest, is_listed, c, bar, margin, C)
        entry, place, kth = _places(entry_ptr, stored, k, N, BLOCK_N)

    # What was left out scores below cut + margin.
    least = _score(kth)
    is_right = (count <= C) & (least > -INFINITY) & (least >= cut + margin)
    # Without a margin, no group maximum tells anything.
    margin = tl.where(is_stale, INFINITY, margin)
    reach = tl.where(margin < INFINITY, least - margin, -INFINITY)
    reach = tl.where(is_right & (margin < INFINITY), INFINITY, reach)
    return entry, place, reach, margin, top


@triton.jit
def _next_candidate(rest, is_listed, after, bar, margin, C: tl.constexpr):
    """The next candidate after one whose other pairs may come above the bar, or else C."""
    offs_c = tl.arange(0, C)
    reach = tl.where(margin < INFINITY, _score(bar) - margin, INFINITY)
    return tl.min(tl.where((rest >= reach) & is_listed & (offs_c > after), offs_c, C))


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


@triton.jit
def _write_row(
    entry,
    place,
    row,
    queue_ptr,
    query_label_ptr,
    queue_label_ptr,
    list_ptr,
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
    stride_qq,
    D: tl.constexpr,
    IS_LAST: tl.constexpr,
    HAS_PICK: tl.constexpr,
    L: tl.constexpr,
):
    """Results of a row and its pick, or the list for the next part of the queue."""
    if not IS_LAST:
        offs_l = tl.arange(0, L)
        tl.debug_barrier()
        tl.store(list_ptr + row * L + offs_l, tl.full((L,), EMPTY, tl.int64) << 32)
        tl.debug_barrier()
        tl.store(list_ptr + row * L + place, entry, place < k)
    else:
        value = tl.where((entry >> 32) == OWN, -1.0, _score(entry))
        tl.store(values_ptr + row * k + place, value, place < k)
        tl.store(indices_ptr + row * k + place, _slot(entry), place < k)
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
                rank = tl.umulhi(word, _word(k)).to(tl.int32)
            else:
                rank = tl.minimum(tl.maximum(tl.load(rank_ptr + row), 0), k - 1).to(tl.int32)
            slot = tl.max(tl.where(place == rank, _slot(entry), 0))
            tl.store(picked_ptr + row, slot)
            for d in range(0, D, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                c = tl.load(queue_ptr + slot * stride_qq + offs_d, offs_d < D)
                tl.store(neighbour_ptr + row * D + offs_d, c, offs_d < D)
            if query_label_ptr is not None:
                label = tl.load(query_label_ptr + i)
                is_hit = (tl.load(queue_label_ptr + slot) == label) & (label >= 0)
                tl.store(hit_ptr + row, is_hit)


@triton.jit(
    do_not_specialize=[
        *("num_reach", "seed", "step", "view", "row_number"),
        *("start", "n", "k", "offset", "end"),
    ]
)
def _rank_kernel(
    query_ptr,
    queue_ptr,
    query_id_ptr,
    queue_id_ptr,
    query_label_ptr,
    queue_label_ptr,
    reach_ptr,
    first_ptr,
    second_ptr,
    before_ptr,
    candidate_ptr,
    entry_ptr,
    list_ptr,
    verdict_ptr,
    rank_ptr,
    row_ptr,
    values_ptr,
    indices_ptr,
    picked_ptr,
    neighbour_ptr,
    hit_ptr,
    again_ptr,
    num_reach,
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
    IS_INT8: tl.constexpr,
    IS_LAST: tl.constexpr,
    HAS_PICK: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One row: its first K, a verdict on them, and where that is good the results."""
    MASK: tl.constexpr = SPAN // STRIDE // PAIR - 1
    row = tl.program_id(0).to(tl.int64)
    query_ptr += row * stride_qb
    # All loads that wait for nothing.
    x = _load_query(query_ptr, 0, D)
    offs_g, offs_p = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_P)
    score = tl.load(first_ptr + row * num_groups + offs_g, offs_g < num_groups, other=-INFINITY)
    furthest = tl.load(reach_ptr + offs_p * 2, offs_p < num_reach, other=0.0)
    longest = tl.load(reach_ptr + offs_p * 2 + 1, offs_p < num_reach, other=0.0)
    query_id = tl.full((), -1, tl.int64)
    if query_id_ptr is not None:
        query_id = tl.load(query_id_ptr + (start + row) % n)
    if before_ptr is not None:
        before_ptr += row * L

    # How far any score may be from the exact one, by Cauchy-Schwarz.
    norm = _norm(query_ptr, x, D)
    norm_q, residual = _rounded_norms(query_ptr, x, norm, D, IS_INT8)
    furthest, longest = tl.reduce((furthest, longest), 0, _maximum)
    margin = residual * longest + norm_q * furthest
    # Sums of D products, the tag, and what normalising in another order changes.
    tag = (MASK + 1) * 2.0**-23
    margin += (D * 2.0**-22 + tag + 2.0**-20) * norm_q * (longest + furthest)
    # The fp32 sums above err by less; no product of these numbers that vanishes is larger.
    margin = 1.001 * margin + SMALLEST

    # Of a group without a number.
    score = tl.where(score == score, score, -INFINITY)
    entry, place, reach, margin, top = _rank_row(
        query_ptr,
        queue_ptr,
        query_id,
        queue_id_ptr,
        second_ptr + row * num_groups,
        before_ptr,
        candidate_ptr + row * C * 2,
        entry_ptr + row * N,
        score,
        norm,
        margin,
        k,
        offset,
        end,
        stride_qq,
        D,
        SPAN,
        L,
        C,
        N,
        BLOCK_C,
        BLOCK_G,
        BLOCK_N,
    )
    is_right = reach == INFINITY
    verdict_ptr += row * VERDICT
    tl.store(verdict_ptr, reach)
    is_again = is_right == 0
    if before_ptr is not None:
        is_again |= tl.load(again_ptr + row) != 0
    tl.store(again_ptr + row, is_again)
    if not is_right:
        # Read again, as they would hold registers all the time.
        score = tl.load(first_ptr + row * num_groups + offs_g, offs_g < num_groups, other=-INFINITY)
        # Numbers so small that tensor cores take them for 0 make no larger difference.
        fine = 1.001 * (AGAIN_ERROR + tag) * longest + 1e-30
        num_wanted = tl.sum((score >= reach).to(tl.int32))
        # Equal rows, or nearly so, would stay it; and without K scores there is no bound to refine.
        num_equal = tl.sum((score >= top - 2 * fine).to(tl.int32))
        is_hopeless = (num_equal > C) | (reach == -INFINITY)
        tl.store(verdict_ptr + 1, margin)
        tl.store(verdict_ptr + 2, fine)
        tl.store(verdict_ptr + 3, tl.where(is_hopeless, 0, num_wanted).to(tl.float32))
        tl.store(verdict_ptr + 4, norm)
    if is_right | (not IS_LAST):
        _write_row(
            entry,
            place,
            row,
            queue_ptr,
            query_label_ptr,
            queue_label_ptr,
            list_ptr,
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
            stride_qq,
            D,
            IS_LAST,
            HAS_PICK,
            L,
        )


@triton.jit(
    do_not_specialize=[
        *("B", "seed", "step", "view", "row_number"),
        *("start", "n", "k", "offset", "end"),
    ]
)
def _rescue_kernel(
    query_ptr,
    queue_ptr,
    query_id_ptr,
    queue_id_ptr,
    query_label_ptr,
    queue_label_ptr,
    first_ptr,
    second_ptr,
    before_ptr,
    candidate_ptr,
    entry_ptr,
    list_ptr,
    verdict_ptr,
    rank_ptr,
    row_ptr,
    values_ptr,
    indices_ptr,
    picked_ptr,
    neighbour_ptr,
    hit_ptr,
    B,
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
    C: tl.constexpr,
    N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One row that failed, by what matters in it; or AGAIN_ROWS of them, scored again together."""
    row = tl.program_id(0).to(tl.int64)
    leader = row // AGAIN_ROWS * AGAIN_ROWS
    offs_b = leader + tl.arange(0, AGAIN_ROWS)
    reaches = tl.load(verdict_ptr + offs_b * VERDICT, offs_b < B, other=INFINITY)
    is_failed = reaches < INFINITY
    wanted = tl.load(verdict_ptr + offs_b * VERDICT + 3, is_failed, other=0.0)
    is_shared = tl.sum(wanted.to(tl.int32)) > num_groups * WORTH
    to_share = is_failed & (wanted > 0) & is_shared
    # Rows that share nothing stay with their own programs.
    mine = is_failed & (offs_b == row) & (to_share == 0)
    stop = row + tl.max(mine.to(tl.int32))
    if is_shared & (row == leader):
        stop = row + AGAIN_ROWS
        norm_b = tl.load(verdict_ptr + offs_b * VERDICT + 4, to_share, other=1.0)
        first_ptrs, second_ptrs = first_ptr + offs_b * num_groups, second_ptr + offs_b * num_groups
        query_ptrs = query_ptr + offs_b * stride_qb
        _score_again(
            query_ptrs,
            queue_ptr,
            first_ptrs,
            second_ptrs,
            norm_b,
            to_share,
            offset,
            end,
            num_groups,
            stride_qq,
            D,
            SPAN,
        )
        tl.debug_barrier()
    offs_g = tl.arange(0, BLOCK_G)
    for r in tl.range(row, stop):
        is_turn = tl.max(((to_share | mine) & (offs_b == r)).to(tl.int32)) > 0
        if is_turn:
            verdict_ptrs = verdict_ptr + r * VERDICT
            reach, margin = tl.load(verdict_ptrs), tl.load(verdict_ptrs + 1)
            fine, norm = tl.load(verdict_ptrs + 2), tl.load(verdict_ptrs + 4)
            query_id = tl.full((), -1, tl.int64)
            if query_id_ptr is not None:
                query_id = tl.load(query_id_ptr + (start + r) % n)
            before_ptrs = before_ptr
            if before_ptr is not None:
                before_ptrs += r * L
            x_ptr, entry_ptrs = query_ptr + r * stride_qb, entry_ptr + r * N
            score_ptrs = first_ptr + r * num_groups + offs_g
            score = tl.load(score_ptrs, offs_g < num_groups, other=-INFINITY)
            score = tl.where(score == score, score, -INFINITY)
            entry, place = tl.full((N,), NOTHING, tl.int64), tl.full((N,), N, tl.int32)
            if tl.max((to_share & (offs_b == r)).to(tl.int32)) > 0:
                entry, place, reach, margin, _ = _rank_row(
                    x_ptr,
                    queue_ptr,
                    query_id,
                    queue_id_ptr,
                    second_ptr + r * num_groups,
                    before_ptrs,
                    candidate_ptr + r * C * 2,
                    entry_ptrs,
                    score,
                    norm,
                    fine,
                    k,
                    offset,
                    end,
                    stride_qq,
                    D,
                    SPAN,
                    L,
                    C,
                    N,
                    BLOCK_C,
                    BLOCK_G,
                    BLOCK_N,
                )
                tl.store(verdict_ptrs, reach)
            if reach < INFINITY:
                tl.debug_barrier()
                stored = _begin(entry_ptrs, before_ptrs, L)
                bar = tl.full((), NOTHING, tl.int64)
                g = _next_group(score, reach, -1, num_groups, BLOCK_G)
                while g < num_groups:
                    stored, bar = _append_group(
                        entry_ptrs,
                        stored,
                        bar,
                        g,
                        -1,
                        x_ptr,
                        queue_ptr,
                        query_id,
                        queue_id_ptr,
                        norm,
                        k,
                        offset,
                        end,
                        stride_qq,
                        D,
                        SPAN,
                        N,
                        BLOCK_N,
                    )
                    # Without a margin, no group maximum tells anything.
                    least = tl.where(margin < INFINITY, _score(bar) - margin, -INFINITY)
                    reach = tl.maximum(reach, least)
                    g = _next_group(score, reach, g, num_groups, BLOCK_G)
                entry, place, _ = _places(entry_ptrs, stored, k, N, BLOCK_N)
            _write_row(
                entry,
                place,
                r,
                queue_ptr,
                query_label_ptr,
                queue_label_ptr,
                list_ptr,
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
                stride_qq,
                D,
                IS_LAST,
                HAS_PICK,
                L,
            )


@triton.jit
def _next_group(score, reach, after, num_groups, BLOCK_G: tl.constexpr):
    """The next group after one whose maximum reaches so far, or else num_groups."""
    offs_g = tl.arange(0, BLOCK_G)
    matters = (score >= reach) & (offs_g > after) & (offs_g < num_groups)
    return tl.min(tl.where(matters, offs_g, num_groups))
