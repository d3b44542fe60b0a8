"""Exact scores of single slots, and the list of the largest of them.

Legend: Q slots, D features, K neighbours, N places of a row's list.

A list grows at its end. It is never sorted: an entry's place is the number of larger ones, counted
when the list is full and in the end.
"""

import triton
import triton.language as tl

from maect_fast.kernels.queue_topk.triton_score import INFINITY, PAIR, STRIDE

# A list's entry: a score whose bits order as integers do, then the slot, complemented. Below all
# scores come, in this order, NaN and -inf, own slots, no slot at all.
UNORDERED = tl.constexpr(-(1 << 31) + 2)
OWN = tl.constexpr(-(1 << 31) + 1)
EMPTY = tl.constexpr(-(1 << 31))
NOTHING = tl.constexpr(-(1 << 63))
WORD = tl.constexpr(0xFFFFFFFF)
# Features that are summed at a time, and such slices whose loads are under way together.
FEATURES, SLICES = tl.constexpr(64), tl.constexpr(4)
# Of a group's slots, so many at a time.
CHUNK = tl.constexpr(16)


@triton.jit
def _slot(entry):
    return WORD - (entry & WORD)


@triton.jit
def _score(entry):
    """The score in an entry, -inf for what is none."""
    ordered = (entry >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return tl.where(ordered > UNORDERED, bits.to(tl.float32, bitcast=True), -INFINITY)


@triton.jit
def _sum_pairs(x, ROWS: tl.constexpr):
    """Sums of rows [ROWS, FEATURES]: neighbours, then neighbouring sums, and so on.

    So no layout, and with it no number of rows or warps, has a say in the order.
    """
    tl.static_assert(FEATURES == 64)
    for level in tl.static_range(6):
        x = tl.sum(x.reshape(ROWS, FEATURES >> (level + 1), 2), axis=2)
    return x.reshape(ROWS)


@triton.jit
def _exact(query_ptr, queue_ptr, slot, mask, norm, stride_qq, D: tl.constexpr, ROWS: tl.constexpr):
    """Scores of slots [ROWS]: exact products of fp32 numbers, summed in fp64, rounded to fp32."""
    PARTS: tl.constexpr = min(SLICES, (D + FEATURES - 1) // FEATURES)
    row_ptrs = queue_ptr + slot * stride_qq
    total = tl.zeros((ROWS,), tl.float64)
    for d in range(0, D, PARTS * FEATURES):
        queries, slots = (), ()
        for i in tl.static_range(PARTS):
            offs_d = d + i * FEATURES + tl.arange(0, FEATURES)
            mask_d = offs_d < D
            c_ptrs = row_ptrs[:, None] + offs_d[None, :]
            slots = slots + (tl.load(c_ptrs, mask[:, None] & mask_d[None, :], other=0.0),)
            queries = queries + (tl.load(query_ptr + offs_d, mask_d, other=0.0),)
        for i in tl.static_range(PARTS):
            unit = tl.div_rn(queries[i].to(tl.float32), norm).to(tl.float64)
            c = slots[i].to(tl.float32).to(tl.float64)
            total += _sum_pairs(unit[None, :] * c, ROWS)
    return total.to(tl.float32)


@triton.jit
def _entries(score, slot, mask, query_id, queue_id_ptr):
    """Entries of scored slots: own slots below all others."""
    # Both zeros are one number.
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(score > -INFINITY, ordered, UNORDERED)
    if queue_id_ptr is not None:
        own = (tl.load(queue_id_ptr + slot, mask, other=-1) == query_id) & (query_id != -1)
        ordered = tl.where(own, OWN, ordered)
    return (ordered.to(tl.int64) << 32) | (WORD - slot)


@triton.jit
def _begin(entry_ptr, before_ptr, L: tl.constexpr):
    """Begin the list with that of the parts of the queue searched before; how many it has."""
    stored = 0
    if before_ptr is not None:
        offs_l = tl.arange(0, L)
        entry = tl.load(before_ptr + offs_l)
        # In order, so that what is missing is missing at the end.
        is_slot = (entry >> 32) > EMPTY
        tl.store(entry_ptr + offs_l, entry, is_slot)
        stored = tl.sum(is_slot.to(tl.int32))
    return stored


@triton.jit
def _append(entry_ptr, stored, entries, mask):
    """Write entries behind the `stored` ones; how many there are then."""
    place = stored + tl.cumsum(mask.to(tl.int32)) - 1
    tl.store(entry_ptr + place, entries, mask)
    return stored + tl.sum(mask.to(tl.int32))


@triton.jit
def _places(entry_ptr, stored, k, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """The list [N], for each entry the number of larger ones (N for none), and the K-th."""
    tl.debug_barrier()
    offs_n = tl.arange(0, N)
    entry = tl.load(entry_ptr + offs_n, offs_n < stored, other=NOTHING)
    place = tl.zeros((N,), tl.int32)
    for i in range(0, stored, BLOCK_N):
        offs_i = i + tl.arange(0, BLOCK_N)
        other = tl.load(entry_ptr + offs_i, offs_i < stored, other=NOTHING)
        place += tl.sum((other[None, :] > entry[:, None]).to(tl.int32), axis=1)
    place = tl.where(offs_n < stored, place, N)
    return entry, place, tl.max(tl.where(place == k - 1, entry, NOTHING))


@triton.jit
def _make_room(
    entry_ptr, stored, bar, k, ROOM: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Cut a list without room to its K largest: how many they are, and the least that may enter."""
    if stored + ROOM > N:
        entry, place, bar = _places(entry_ptr, stored, k, N, BLOCK_N)
        tl.debug_barrier()
        tl.store(entry_ptr + place, entry, place < k)
        stored = tl.minimum(stored, k)
    return stored, bar


@triton.jit
def _append_group(
    entry_ptr,
    stored,
    bar,
    group,
    known,
    query_ptr,
    queue_ptr,
    query_id,
    queue_id_ptr,
    norm,
    k,
    offset,
    end,
    stride_qq,
    D: tl.constexpr,
    SPAN: tl.constexpr,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add of a group's slots, the pair `known` excepted, those above the K-th; as `_make_room`."""
    MEMBERS: tl.constexpr = SPAN // STRIDE
    ROWS: tl.constexpr = min(CHUNK, MEMBERS)
    base = offset + (group // STRIDE).to(tl.int64) * SPAN + group % STRIDE
    for m in range(0, MEMBERS, ROWS):
        stored, bar = _make_room(entry_ptr, stored, bar, k, ROWS, N, BLOCK_N)
        member = m + tl.arange(0, ROWS)
        slot = base + member * STRIDE
        mask = (slot < end) & (member // PAIR != known)
        exact = _exact(query_ptr, queue_ptr, slot, mask, norm, stride_qq, D, ROWS)
        entries = _entries(exact, slot, mask, query_id, queue_id_ptr)
        stored = _append(entry_ptr, stored, entries, mask & (entries > bar))
    return stored, bar
