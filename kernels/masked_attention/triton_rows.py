"""Rows of the attention kernels: where they lie, how they are loaded, multiplied and stored.

Triton's blocks have powers of two as sizes; a head of D features and a row of N keys have not. They
are tuples of blocks instead: D = 80 is (64, 16), N = 257 is (128, 128, 16).
"""

import triton
import triton.language as tl

__all__ = [
    "LOG2E",
    "dot",
    "dot_t",
    "feature_blocks",
    "find_sample",
    "finite",
    "get",
    "head_of",
    "key_blocks",
    "key_rows",
    "load_lse",
    "load_rows",
    "padded_dim",
    "query_rows",
    "row_sums",
    "start_of",
    "store_counted",
    "store_rows",
    "zero_tail_kernel",
    "zeros",
]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def feature_blocks(D):
    """Block sizes that D features fill: the largest power of two, and what the rest needs."""
    width = 16 * triton.cdiv(D, 16)
    first = 1 << (width.bit_length() - 1)
    rest = width - first
    return (first, triton.next_power_of_2(rest)) if rest else (first,)


@triton.constexpr_function
def padded_dim(D):
    """Width of D features in blocks."""
    return sum(feature_blocks(D))


@triton.constexpr_function
def key_blocks(N):
    """Block sizes that N keys, a multiple of 16, fill: of 128, and at most two for the rest."""
    rest = N % 128
    sizes = [size for size in (64, 32, 16) if rest & size]
    if len(sizes) > 2:
        sizes = [triton.next_power_of_2(rest)]
    return (128,) * (N // 128) + tuple(sizes)


@triton.constexpr_function
def start_of(sizes, i):
    """Where block i of a tuple begins."""
    return sum(sizes[:i])


@triton.constexpr_function
def get(sizes, i):
    """The size of block i, as a shape takes it."""
    return sizes[i]


@triton.jit
def find_sample(
    b,
    M,
    N,
    bounds_ptr,
    IS_PACKED: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    IS_BOUND: tl.constexpr,
):
    """Of sample b: its first row among packed ones, its numbers of queries and of keys."""
    first = tl.zeros((), tl.int64)
    if IS_PACKED:
        first += tl.load(bounds_ptr + b)
        N = tl.minimum(tl.load(bounds_ptr + b + 1) - first, N).to(tl.int32)
    elif HAS_LENGTHS:
        length = tl.load(bounds_ptr + b).to(tl.int64)
        N = tl.minimum(tl.maximum(length, 0), N).to(tl.int32)
    if IS_BOUND:
        M = N
    return first, M, N


@triton.jit
def head_of(ptr, b, first, h, stride_b, stride_n, stride_h, ALIGN: tl.constexpr):
    """Where the rows of a sample's head begin; strides are in units of `ALIGN` numbers."""
    return ptr + (b * stride_b + first * stride_n + h * stride_h) * ALIGN


@triton.jit
def query_rows(offs, num_rows, keep_ptr, HAS_KEEP: tl.constexpr):
    """Rows of some queries in their sample, and which of the queries there are."""
    mask = offs < num_rows
    rows = offs
    if HAS_KEEP:
        rows = tl.load(keep_ptr + offs, mask=mask, other=0).to(tl.int32)
    return rows, mask


@triton.jit
def key_rows(
    offs,
    num_rows,
    keep_ptr,
    mask_ptr,
    stride_mn,
    HAS_KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Rows of some keys in their sample, and which of the keys take part."""
    rows, mask = query_rows(offs, num_rows, keep_ptr, HAS_KEEP)
    if HAS_MASK:
        mask = mask & (tl.load(mask_ptr + rows * stride_mn, mask=mask, other=0) != 0)
    return rows, mask


@triton.jit
def load_rows(ptr, rows, stride, mask, D: tl.constexpr, IS_FULL: tl.constexpr):
    """Rows of D features, [rows, D] in blocks; zeros where the mask is False, unless `IS_FULL`."""
    SIZES: tl.constexpr = feature_blocks(D)
    x = ()
    for i in tl.static_range(len(SIZES)):
        offs_d = start_of(SIZES, i) + tl.arange(0, get(SIZES, i))
        ptrs = ptr + rows[:, None] * stride + offs_d[None, :]
        if start_of(SIZES, i + 1) > D:
            inside = (offs_d < D)[None, :] & mask[:, None]
            x = x + (tl.load(ptrs, mask=inside, other=0.0),)
        elif IS_FULL:
            x = x + (tl.load(ptrs),)
        else:
            x = x + (tl.load(ptrs, mask=mask[:, None], other=0.0),)
    return x


@triton.jit
def store_rows(ptr, rows, stride, mask, x, D: tl.constexpr):
    """Store x [rows, D], in blocks, where the mask is True."""
    SIZES: tl.constexpr = feature_blocks(D)
    for i in tl.static_range(len(SIZES)):
        offs_d = start_of(SIZES, i) + tl.arange(0, get(SIZES, i))
        ptrs = ptr + rows[:, None] * stride + offs_d[None, :]
        inside = mask[:, None]
        if start_of(SIZES, i + 1) > D:
            inside = inside & (offs_d < D)[None, :]
        tl.store(ptrs, x[i].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zeros(num_rows: tl.constexpr, D: tl.constexpr):
    """Accumulators [num_rows, D] fp32, in blocks."""
    SIZES: tl.constexpr = feature_blocks(D)
    x = ()
    for i in tl.static_range(len(SIZES)):
        x = x + (tl.zeros((num_rows, get(SIZES, i)), tl.float32),)
    return x


@triton.jit
def dot_t(x, y):
    """``x @ y.T`` over the features of both, fp32."""
    acc = tl.dot(x[0], tl.trans(y[0]))
    for i in tl.static_range(1, len(x)):
        acc = tl.dot(x[i], tl.trans(y[i]), acc)
    return acc


@triton.jit
def dot(p, x, acc):
    """``acc + p @ x`` for x and acc in blocks of features; p is rounded to the type of x."""
    p = p.to(x[0].dtype)
    new = ()
    for i in tl.static_range(len(x)):
        new = new + (tl.dot(p, x[i], acc[i]),)
    return new


@triton.jit
def finite(row_max):
    """Maxima of rows of scores; 0 for rows without keys, whose scores are all -inf."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)


@triton.jit
def row_sums(x, y):
    """``sum_d x[., d] * y[., d]`` of blocks, fp32."""
    total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), axis=1)
    for i in tl.static_range(1, len(x)):
        total += tl.sum(x[i].to(tl.float32) * y[i].to(tl.float32), axis=1)
    return total


@triton.jit
def load_lse(lse_ptr, offs_m, mask):
    """Load lse; +inf, so that P = 0, for rows outside and for those without keys."""
    lse = tl.load(lse_ptr + offs_m, mask=mask, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def store_counted(ptr, rows, stride, inside, counts, x, factor, D: tl.constexpr):
    """Store factor * x in the rows inside; zeros where a row does not count."""
    y = ()
    for i in tl.static_range(len(x)):
        y = y + (tl.where(counts[:, None], x[i] * factor, 0.0),)
    store_rows(ptr, rows, stride, inside, y, D)


@triton.jit(do_not_specialize=["T"])
def zero_tail_kernel(x_ptr, bounds_ptr, T, WIDTH, BLOCK: tl.constexpr):
    """Zero the packed rows x [T, WIDTH] behind the last segment, whose end lies at the pointer."""
    end = T.to(tl.int64) * WIDTH
    start = tl.load(bounds_ptr).to(tl.int64) * WIDTH + tl.program_id(0) * BLOCK
    while start < end:
        offs = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=offs < end)
        start += tl.num_programs(0) * BLOCK
