"""First kernel of the search: products with the shadow, of which group maxima are all that is kept.

Legend: B rows searched, Q slots, D features, G groups of slots.

The scores of a tile stay in registers. Slots are in spans, a span's in STRIDE groups of every
STRIDE-th slot, a group's in pairs. Of each group the largest score is kept with the number of its
pair, and an upper bound of the scores of the other pairs.

Source: groups' delegates, Dr. Top-k, arXiv 2109.08219; maxima in the product's epilogue, TPU-KNN,
arXiv 2206.14286. New are the strided groups of pairs and the second maxima.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maect_fast.kernels._common.gpu import num_multiprocessors, table_arch
from maect_fast.kernels._common.launch import H200, Launch, LaunchRow, Limits, fitting
from maect_fast.kernels._common.plan import launch
from maect_fast.kernels.queue_topk.triton_queue import (
    EPS,
    NUM_BOUNDS,
    SLICE,
    TILE,
    WIDEST,
    padded_dim,
)

__all__ = ["MAX_PARTS", "machine_code", "num_groups", "score", "span_of"]

# A thread owns the columns 8 i + c of an accumulator's row, so that the maxima of groups of every
# eighth column never leave its registers.
STRIDE = tl.constexpr(8)
# One operation makes one score of two, before the four that each takes: and two exact scores later
# cost less than that.
PAIR = tl.constexpr(2)
INFINITY = tl.constexpr(float("inf"))
# Stands for the magnitude of a zero row.
SMALLEST = tl.constexpr(1e-37)


@triton.jit
def _tag(score, number, MASK: tl.constexpr):
    """Scores with a number in place of the low bits, by at most so much smaller or larger."""
    return ((score.to(tl.int32, bitcast=True) & ~MASK) | number).to(tl.float32, bitcast=True)


@triton.jit
def _upper_half(x):
    """Upper 16 bits of an fp32 number that is not below x."""
    bits = x.to(tl.int32, bitcast=True)
    # Cutting bits off makes a negative number larger already.
    return ((bits + tl.where(bits >= 0, 0xFFFF, 0)) >> 16).to(tl.int16)


@triton.jit
def _first_two(scores, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """The two largest of each group: scores [ROWS, COUNT * STRIDE] -> twice [ROWS, STRIDE]."""
    pairs = scores.reshape(ROWS, COUNT // 2, 2, STRIDE)
    one, two = tl.max(pairs, axis=2), tl.min(pairs, axis=2)
    LEVELS: tl.constexpr = (COUNT >= 4) + (COUNT >= 8) + (COUNT >= 16)
    for level in tl.static_range(LEVELS):
        ones = one.reshape(ROWS, COUNT >> (level + 2), 2, STRIDE)
        twos = two.reshape(ROWS, COUNT >> (level + 2), 2, STRIDE)
        one, two = tl.max(ones, axis=2), tl.maximum(tl.min(ones, axis=2), tl.max(twos, axis=2))
    return one.reshape(ROWS, STRIDE), two.reshape(ROWS, STRIDE)


@triton.jit
def _load_slice(row_ptrs, mask, d, D, BLOCK_D: tl.constexpr):
    """Features d .. d + BLOCK_D of the rows, fp32."""
    offs_d = d + tl.arange(0, BLOCK_D)
    x = tl.load(row_ptrs[:, None] + offs_d[None, :], mask[:, None] & (offs_d < D), other=0.0)
    return x.to(tl.float32)


@triton.jit
def _inverse_norms(row_ptrs, mask, D, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """1 / max(norm, EPS) of the rows and their largest magnitude; no square overflows."""
    largest = tl.zeros((ROWS,), tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_slice(row_ptrs, mask, d, D, BLOCK_D)
        largest = tl.maximum(largest, tl.max(tl.abs(x), axis=1))
    largest = tl.maximum(largest, SMALLEST)
    square = tl.zeros((ROWS,), tl.float32)
    for d in range(0, D, BLOCK_D):
        x = _load_slice(row_ptrs, mask, d, D, BLOCK_D) / largest[:, None]
        square += tl.sum(x * x, axis=1)
    return 1 / tl.maximum(largest * tl.sqrt(square), EPS), largest


@triton.jit
def _round_unit(unit, largest, IS_INT8: tl.constexpr):
    """Unit rows in the shadow's type; in int8 the unit is largest / 127."""
    if IS_INT8:
        # NaN becomes anything: no score of its row will be believed.
        rounded = tl.floor(unit * (127 / largest)[:, None] + 0.5).to(tl.int8)
    else:
        rounded = unit.to(tl.float16)
    return rounded


@triton.jit
def _keep_bounds(bound_ptr, reach_ptr, Q, SPAN: tl.constexpr):
    """Store the largest bounds of the program's spans."""
    num_tiles = tl.cdiv(tl.cdiv(Q, SPAN), tl.num_programs(1)) * (SPAN // TILE)
    start = tl.program_id(1) * num_tiles
    end = tl.minimum(start + num_tiles, tl.cdiv(Q, TILE))
    furthest, longest = 0.0, 0.0
    for t in tl.range(start, end, 64):
        offs_t = t + tl.arange(0, 64)
        bound_ptrs = bound_ptr + offs_t * NUM_BOUNDS
        furthest = tl.maximum(furthest, tl.max(tl.load(bound_ptrs, offs_t < end, other=0.0)))
        longest = tl.maximum(longest, tl.max(tl.load(bound_ptrs + 1, offs_t < end, other=0.0)))
    tl.store(reach_ptr + tl.program_id(1) * 2, furthest)
    tl.store(reach_ptr + tl.program_id(1) * 2 + 1, longest)


@triton.jit(do_not_specialize=["B", "Q"])
def _score_kernel(
    query_ptr,
    shadow_ptr,
    bound_ptr,
    first_ptr,
    second_ptr,
    reach_ptr,
    B,
    Q,
    num_groups,
    stride_qb,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    SPAN: tl.constexpr,
    IS_INT8: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Queries stay in shared memory, the shadow streams; a program has some spans for its rows.

    A span of SPAN slots has STRIDE groups. Of each, `first` [B, G] fp32 is the largest score, with
    the number of its pair in the low bits, and `second` [B, G] int16 the upper half of an fp32
    number not below the largest score of all other pairs. A tile has PARTS products, each in
    SLICES of the features; with more than one the query is read once. `reach`
    [programs, 2] gets the largest bounds of the spans: of a row's distance to its rounding, and of
    its norm.
    """
    WIDTH: tl.constexpr = BLOCK_Q // PARTS
    COUNT: tl.constexpr = WIDTH // STRIDE // PAIR
    MEMBERS: tl.constexpr = PARTS * COUNT
    TILES: tl.constexpr = SPAN // BLOCK_Q
    MASK: tl.constexpr = SPAN // STRIDE // PAIR - 1
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    offs_d = tl.arange(0, BLOCK_D // SLICES)
    offs_c = tl.arange(0, WIDTH)[:, None] * PADDED_D + offs_d[None, :]
    query_ptrs = query_ptr + offs_b * stride_qb
    if SLICES == 1:
        NARROW: tl.constexpr = min(BLOCK_D, 64)
        inverse, largest = _inverse_norms(query_ptrs, mask_b, D, NARROW, BLOCK_B)
        raw = (_load_slice(query_ptrs, mask_b, 0, D, BLOCK_D),)
    else:
        # Read once, all under way together, where the other form makes nine trips in a chain.
        raw = ()
        for i in tl.static_range(SLICES):
            offs_x = i * BLOCK_D // SLICES + tl.arange(0, BLOCK_D // SLICES)
            inside = mask_b[:, None] & (offs_x < D)[None, :]
            raw = raw + (tl.load(query_ptrs[:, None] + offs_x[None, :], inside, other=0.0),)
        largest = tl.full((BLOCK_B,), SMALLEST, tl.float32)
        for i in tl.static_range(SLICES):
            largest = tl.maximum(largest, tl.max(tl.abs(raw[i].to(tl.float32)), axis=1))
        square = tl.zeros((BLOCK_B,), tl.float32)
        for i in tl.static_range(SLICES):
            scaled = raw[i].to(tl.float32) / largest[:, None]
            square += tl.sum(scaled * scaled, axis=1)
        inverse = 1 / tl.maximum(largest * tl.sqrt(square), EPS)
    largest *= inverse
    q = ()
    for i in tl.static_range(SLICES):
        q = q + (_round_unit(raw[i].to(tl.float32) * inverse[:, None], largest, IS_INT8),)
    pair = tl.arange(0, COUNT * STRIDE) // STRIDE

    num_tiles = tl.cdiv(Q, BLOCK_Q)
    per_program = tl.cdiv(tl.cdiv(Q, SPAN), tl.num_programs(1)) * TILES
    start = tl.program_id(1) * per_program
    best = tl.full((BLOCK_B, STRIDE), -INFINITY, tl.float32)
    other = tl.full((BLOCK_B, STRIDE), -INFINITY, tl.float32)
    for tile in tl.range(start, tl.minimum(start + per_program, num_tiles)):
        number = (tile % TILES) * MEMBERS
        for part in tl.static_range(PARTS):
            # One scalar and offsets that do not change: the copies need no addresses of their own.
            c_ptr = shadow_ptr + (tl.cast(tile, tl.int64) * PARTS + part) * (WIDTH * PADDED_D)
            c = tl.load(c_ptr + offs_c)
            acc = tl.dot(q[0], tl.trans(c))  # [BLOCK_B, WIDTH] fp32, int32
            for i in tl.static_range(1, SLICES):
                c = tl.load(c_ptr + i * (BLOCK_D // SLICES) + offs_c)
                acc = tl.dot(q[i], tl.trans(c), acc, out_dtype=acc.dtype)
            if PADDED_D > BLOCK_D:
                for d in range(BLOCK_D, PADDED_D, BLOCK_D):
                    x = _load_slice(query_ptrs, mask_b, d, D, BLOCK_D) * inverse[:, None]
                    c = tl.load(c_ptr + d + offs_c)
                    acc = tl.dot(
                        _round_unit(x, largest, IS_INT8), tl.trans(c), acc, out_dtype=acc.dtype
                    )
            pairs = acc.reshape(BLOCK_B, COUNT, PAIR, STRIDE)
            score = tl.max(pairs, axis=2).reshape(BLOCK_B, COUNT * STRIDE)
            if IS_INT8:
                # Exact: |score| <= 127 * 127 * D.
                key = score * MEMBERS + (pair + part * COUNT)[None, :]
            else:
                # The numbers are no constants: that makes clearing and setting one instruction.
                key = _tag(score, (number + part * COUNT + pair)[None, :], MASK)
            one, two = _first_two(key, BLOCK_B, COUNT)
            if part == 0:
                first, second = one, two
            else:
                second = tl.maximum(tl.maximum(second, two), tl.minimum(first, one))
                first = tl.maximum(first, one)
        if IS_INT8:
            scale = (
                tl.load(bound_ptr + tile * BLOCK_Q // TILE * NUM_BOUNDS + 2)
                * (largest / 127)[:, None]
            )
            member, rest = first & (MEMBERS - 1), second & (MEMBERS - 1)
            first = ((first - member) // MEMBERS).to(tl.float32) * scale
            first = _tag(first, number + member, MASK)
            second = ((second - rest) // MEMBERS).to(tl.float32) * scale
        both = tl.maximum(tl.maximum(other, second), tl.minimum(best, first))
        is_new = tile % TILES == 0
        other = tl.where(is_new, second, both)
        best = tl.where(is_new, first, tl.maximum(best, first))
        if (tile % TILES == TILES - 1) | (tile == num_tiles - 1):
            offs_g = (tile // TILES) * STRIDE + tl.arange(0, STRIDE)
            place = offs_b[:, None] * num_groups + offs_g[None, :]
            tl.store(first_ptr + place, best, mask_b[:, None])
            tl.store(second_ptr + place, _upper_half(other), mask_b[:, None])
    # Last, when the tiles' registers are free.
    if tl.program_id(0) == 0:
        _keep_bounds(bound_ptr, reach_ptr, Q, SPAN)


# Rows that are scored again together, features whose products are summed in fp32, slots at a time.
AGAIN_ROWS, AGAIN_FEATURES, AGAIN_SLOTS = tl.constexpr(16), tl.constexpr(32), tl.constexpr(64)
# How far such a score may be from the exact one, next to the norms: the sum of AGAIN_FEATURES
# products, what tf32x3 leaves out of each, and the normalised row's own rounding.
AGAIN_ERROR = tl.constexpr(AGAIN_FEATURES * 2.0**-22 + 2.0**-19 + 2.0**-22)


@triton.jit
def _score_again(
    query_ptrs,
    queue_ptr,
    first_ptrs,
    second_ptrs,
    norm,
    mask_b,
    offset,
    end,
    num_groups,
    stride_qq,
    D: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Maxima of rows [AGAIN_ROWS] as `_score_kernel` leaves them, from the fp32 rows themselves."""
    COUNT: tl.constexpr = AGAIN_SLOTS // STRIDE // PAIR
    MASK: tl.constexpr = SPAN // STRIDE // PAIR - 1
    pair = tl.arange(0, COUNT * STRIDE) // STRIDE
    offs_g = tl.arange(0, STRIDE)
    for span in range(num_groups // STRIDE):
        best = tl.full((AGAIN_ROWS, STRIDE), -INFINITY, tl.float32)
        other = tl.full((AGAIN_ROWS, STRIDE), -INFINITY, tl.float32)
        for tile in range(SPAN // AGAIN_SLOTS):
            slot = offset + tl.cast(span, tl.int64) * SPAN + tile * AGAIN_SLOTS
            slot += tl.arange(0, AGAIN_SLOTS)
            mask = slot < end
            # In fp64, lest the compiler lets the tensor cores add up all D: each sum of few
            # products errs by their own norms, and these add up to that of the whole row.
            score = tl.zeros((AGAIN_ROWS, AGAIN_SLOTS), tl.float64)
            for d in range(0, D, AGAIN_FEATURES):
                x = _load_slice(query_ptrs, mask_b, d, D, AGAIN_FEATURES)
                c = _load_slice(queue_ptr + slot * stride_qq, mask, d, D, AGAIN_FEATURES)
                unit = tl.div_rn(x, norm[:, None])
                score += tl.dot(unit, tl.trans(c), input_precision="tf32x3").to(tl.float64)
            # Beyond the end scores are 0, which as in the shadow's last tile only adds candidates.
            pairs = score.to(tl.float32).reshape(AGAIN_ROWS, COUNT, PAIR, STRIDE)
            key = tl.max(pairs, axis=2).reshape(AGAIN_ROWS, COUNT * STRIDE)
            key = _tag(key, (pair + tile * COUNT)[None, :], MASK)
            first, second = _first_two(key, AGAIN_ROWS, COUNT)
            other = tl.maximum(tl.maximum(other, second), tl.minimum(best, first))
            best = tl.maximum(best, first)
        place = span * STRIDE + offs_g[None, :]
        tl.store(first_ptrs[:, None] + place, best, mask_b[:, None])
        tl.store(second_ptrs[:, None] + place, _upper_half(other), mask_b[:, None])


# Scores stay in registers: shuffles and shared memory are for the maxima that are stored. Products
# leave time for eight operations per score on an H100, of which six may be taken.
EPILOGUE: dict[str, Any] = {
    "loop_opcodes": {"SHFL": 8, "STS": 8, "LDS": 12},
    "alu_per_result": 6.0,
}
# By ascending BLOCK_B; the first that holds all rows is taken, or else the last.
ANY_SHADOW = (
    LaunchRow(
        label="few rows",
        num_warps=4,
        num_stages=2,
        blocks={"BLOCK_B": 64, "BLOCK_Q": 128, "PARTS": 4, "SLICES": 1},
        archs=(80, 86),
        sizes={"B": 64, "Q": 65_536, "D": 256, "K": 20},
        limits=Limits(registers=184, blocks_per_sm=1, products=4 * ((64, 32, 256),), **EPILOGUE),
    ),
    LaunchRow(
        label="few rows",
        num_warps=4,
        num_stages=2,
        blocks={"BLOCK_B": 64, "BLOCK_Q": 128, "PARTS": 1, "SLICES": 1},
        archs=(90,),
        sizes={"B": 64, "Q": 65_536, "D": 256, "K": 20},
        limits=Limits(registers=222, blocks_per_sm=1, products=((64, 128, 256),), **EPILOGUE),
        backing=f"measured: 12 us at 64 rows, alone, {H200}",
    ),
    LaunchRow(
        label="two views",
        num_warps=8,
        num_stages=2,
        blocks={"BLOCK_B": 128, "BLOCK_Q": 128, "PARTS": 4, "SLICES": 1},
        archs=(80,),
        sizes={"B": 1024, "Q": 65_536, "D": 256, "K": 20},
        limits=Limits(registers=186, blocks_per_sm=1, products=4 * ((128, 32, 256),), **EPILOGUE),
    ),
    LaunchRow(
        label="128 rows",
        num_warps=8,
        num_stages=2,
        blocks={"BLOCK_B": 128, "BLOCK_Q": 128, "PARTS": 1, "SLICES": 1},
        archs=(90,),
        sizes={"B": 128, "Q": 65_536, "D": 256, "K": 20},
        limits=Limits(registers=212, blocks_per_sm=1, products=((128, 128, 256),), **EPILOGUE),
        backing=f"measured: 53 us at 512 rows, alone, {H200}",
    ),
)
# Four warp groups queue at the tensor cores, so that one's maxima run beside another's products,
# and the shadow is read half as often as by 128 rows. Triton 3.9 spills 24 bytes.
TWO_VIEWS = LaunchRow(
    label="two views",
    triton_below=(3, 9),
    num_warps=16,
    num_stages=3,
    blocks={"BLOCK_B": 256, "BLOCK_Q": 64, "PARTS": 1, "SLICES": 2},
    archs=(90,),
    sizes={"B": 1024, "Q": 65_536, "D": 256, "K": 20},
    limits=Limits(registers=128, blocks_per_sm=1, products=((256, 64, 256),), **EPILOGUE),
    backing="predicted to take less time than 128 x 128, not timed",
)
# By the shadow's type. In int8 each tile's scale is a second epilogue: 6.1 operations per score
# with 64 slots, 4.3 with 128, beside products that take half the time.
NARROW = {torch.float16: (*ANY_SHADOW, TWO_VIEWS), torch.int8: ANY_SHADOW}
# More than WIDEST features, as in the gallery of a k-NN evaluation.
WIDE = (
    LaunchRow(
        label="wide rows",
        num_warps=4,
        num_stages=2,
        blocks={"BLOCK_B": 64, "BLOCK_Q": 64, "PARTS": 2, "SLICES": 1},
        archs=(80, 86),
        sizes={"B": 4096, "Q": 65_536, "D": 1280, "K": 20},
        limits=Limits(registers=255, blocks_per_sm=2, products=4 * ((64, 32, 128),)),
    ),
    LaunchRow(
        label="wide rows",
        num_warps=8,
        num_stages=2,
        blocks={"BLOCK_B": 128, "BLOCK_Q": 128, "PARTS": 1, "SLICES": 1},
        archs=(90,),
        sizes={"B": 4096, "Q": 65_536, "D": 1280, "K": 20},
        limits=Limits(registers=252, blocks_per_sm=1, products=2 * ((128, 128, 128),)),
    ),
)
# Programs that share the queue, at most: a row reads the bounds of each.
MAX_PARTS = 512
# So many groups per row, up to twice as many: enough to tell the first 200 slots apart.
FEWEST_GROUPS = 1024


def span_of(num_slots: int) -> int:
    """Slots per span; fixed for a queue, so that compilations depend on its magnitude alone."""
    most_spans = 2 * FEWEST_GROUPS // STRIDE.value
    span: int = triton.next_power_of_2(triton.cdiv(num_slots, most_spans))
    shortest: int = TILE.value
    return max(shortest, span)


def num_groups(num_slots: int, span: int) -> int:
    """G."""
    groups: int = triton.cdiv(num_slots, span) * STRIDE.value
    return groups


def score(
    query: Tensor,
    shadow: Tensor,
    bound: Tensor,
    first: Tensor,
    second: Tensor,
    reach: Tensor,
    *,
    num_slots: int,
    span: int,
    row: LaunchRow | None = None,
) -> int:
    """Fill first [B, G] fp32 and second [B, G] int16 for query [B, D], rows of any norm.

    Returns:
        How many rows of reach [MAX_PARTS, 2] hold the largest bounds of a part of the slots.
    """
    B, D = query.shape
    row = row or _launch_row(B, D, table_arch(query.device), shadow.dtype)
    width = padded_dim(D)
    grid_b = triton.cdiv(B, row.blocks["BLOCK_B"])
    blocks = num_multiprocessors(query.device) * row.limits.blocks_per_sm
    grid_q: int = max(1, min(blocks // grid_b, triton.cdiv(num_slots, span), MAX_PARTS))
    launch(
        _score_kernel,
        (grid_b, grid_q),
        query,
        shadow,
        bound,
        first,
        second,
        reach,
        B,
        num_slots,
        first.shape[1],
        query.stride(0),
        D=D,
        PADDED_D=width,
        SPAN=span,
        IS_INT8=shadow.dtype == torch.int8,
        BLOCK_D=width if width <= WIDEST else SLICE,
        **row.options,
    )
    return grid_q


def _launch_row(B: int, D: int, arch: int, dtype: torch.dtype) -> LaunchRow:
    rows = fitting(NARROW[dtype] if D <= WIDEST else WIDE, arch)
    return next((row for row in rows if row.blocks["BLOCK_B"] >= B), rows[-1])


def machine_code(arch: int) -> Iterator[Launch]:
    """Launches for the compiler."""
    meta = partial(torch.empty, device="meta")
    for dtype, rows in NARROW.items():
        for row in fitting(rows + WIDE, arch):
            B, Q, D = (row.sizes[letter] for letter in "BQD")
            span = span_of(Q)
            first = meta(B, num_groups(Q, span))
            second = torch.empty_like(first, dtype=torch.int16)
            bound = meta(Q // TILE.value, NUM_BOUNDS.value)
            shadow = meta(Q, padded_dim(D), dtype=dtype)
            query = meta(B, D, dtype=torch.bfloat16)
            arguments = (query, shadow, bound, first, second, meta(MAX_PARTS, 2))
            call = partial(score, *arguments, num_slots=Q, span=span, row=row)
            yield Launch(kernel=_score_kernel, row=row, call=call, variant=str(dtype)[6:])
